"""Repair after a cut, without labels: the weights that are left are solved for, so that each layer gives what it gave before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pared.core.errors import ModelError
from pared.core.problems import Problems
from pared.graph.analysis_pass import attribute
from pared.graph.capture import Captured, capture
from pared.graph.cutting import Cut
from pared.prune.consumers import Consumer, consumers
from pared.prune.layer_equations import Equations
from pared.prune.observe import Batches, Prefix, fitting, isolated, levels, unlabelled
from pared.training import Task

POSITIONS = 64  # of every sample that become equations: neighbours say nearly the same
CHUNK = 2048  # equations that are held at a time


@dataclass(frozen=True)
class RepairedLayer:
    """What `reconstruct` did to a layer that had lost inputs.

    Attributes:
        layer: its path, or the name of its weight if it has none.
        before: mean squared distance of an output from that of the original network, on the inputs used and with the earlier layers
            already repaired; None if left alone.
        after: the same with the new weights; never more than `before`.
        why: why it was left alone; "" if it wasn't.
    """

    layer: str
    before: float | None = None
    after: float | None = None
    why: str = ""


def ridge(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Solve least squares from its sums: the x that minimises |A x - b|² + damping Σ gramᵢᵢ xᵢ², for gram = AᵀA and cross = Aᵀb.

    Every unknown is damped on the scale of its own column, so that units don't matter, and a bias (a column of ones) is damped like a
    weight. An unknown whose column is zero becomes 0. The penalty makes the solution unique where columns depend on each other: it is
    shared among them (Hoerl & Kennard 1970).

    Args:
        gram: (…, n, n), symmetric.
        cross: (…, n, m).
        damping: greater than 0.

    Returns:
        (…, n, m), of the type of `gram`.

    >>> ridge(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[8.0], [0.0]]), 1.0).tolist()
    [[1.0], [0.0]]
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    scaled = gram * scale[..., :, None] * scale[..., None, :] + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solved = torch.cholesky_solve(cross * scale[..., None], torch.linalg.cholesky(scaled))
    return solved * scale[..., None]


def reconstruct(cut: Cut, original: nn.Module, task: Task, samples: int = 256, damping: float = 1e-3) -> tuple[RepairedLayer, ...]:
    """Change the weights of every layer that lost inputs, in place, so that it gives again what it gave in the original network.

    For each such linear layer or convolution, least squares over the weights that are left (and the bias): its outputs, computed from what
    the cut network really feeds it, against the outputs that were kept of the same layer of the original (He, Zhang & Sun 1707.06168,
    section 3.1; Luo et al. 1707.06342, equation 7). Layers are solved in the order in which they are computed, with all earlier ones
    already repaired, so errors don't add up. What is solved for is the change of the weights, and it is the change that is damped: a layer
    that lost nothing of value keeps its weights, and on the inputs used no output of a layer gets worse. An output whose
    error wouldn't shrink keeps its weights to the bit.

    Only inputs are looked at, never labels. Equations are accumulated into Gram matrices, so memory depends on a layer's inputs and not on
    the samples; of every sample at most 64 output positions are used, evenly spread and always the same.

    Args:
        cut: from `cut_model` or `Chooser.cut`; `cut.model` is changed, and moved to the task's device.
        original: the network that was given to that cut; it is moved too and otherwise unchanged.
        task: gives inputs, from the training split and without augmentation.
        samples: how many. With 64 positions each, 256 are 16,384 equations for a convolution.
        damping: in units of every input's own mean square. It keeps a fully connected layer with more inputs than samples from fitting
            the samples alone.

    Returns:
        One entry for each linear layer or convolution that had lost inputs, in order. Left alone are those whose weight is shared or
        computed from other parameters, grouped transposed convolutions, and those whose equations would take more than half a gigabyte.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: if the training split is empty.
        ModelError, CaptureError: if a network can't be run or captured, or values aren't finite.

    >>> from pared.graph.cutting import cut_model
    >>> from pared.prune import Magnitude
    >>> from pared.prune.chooser import Chooser
    >>> _ = torch.manual_seed(0)
    >>> inputs = torch.randn(64, 3)
    >>> task = Task(*[[(inputs, torch.zeros(64, dtype=torch.long))]] * 3)
    >>> model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))  # 6 linear neurons of 3 inputs: 3 are as good
    >>> small = Chooser(0.5, Magnitude()).cut(model, inputs)
    >>> [layer.layer for layer in reconstruct(small, model, task, damping=1e-9)]
    ['1']
    >>> torch.allclose(small.model(inputs), model(inputs), atol=1e-4)
    True
    """
    problems = Problems("prune.reconstruct")
    problems.number("samples", samples, low=1, integer=True)
    problems.number("damping", damping, low=1e-12)
    problems.raise_if_any()
    if not cut.kept:
        return ()
    batches = unlabelled(task, samples, "the outputs of layers are matched on them")
    before = capture(original.to(task.machine.device), batches[0])
    after = capture(cut.model.to(task.machine.device), batches[0])
    batches = fitting(before, fitting(after, batches))
    before, after = isolated(before), isolated(after)
    found = consumers(before, after, cut.kept)
    done = {each: RepairedLayer(each.layer, why=each.why) for each in found}
    for level in levels(after.module.graph, {each.node: each for each in found if not each.why}):
        done.update(_solve_level(level, (before, after), batches, damping))
    return tuple(done[each] for each in found)


class _Sums:
    """The normal equations of one layer, added up batch by batch in double precision: by group."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None
        self.error: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor, missing: Tensor, with_bias: bool) -> None:
        """Equations: rows (groups, n, inputs) times the change should be what is missing (n, outputs)."""
        groups = rows.shape[0]
        if with_bias:
            rows = torch.cat([rows, rows.new_ones(groups, rows.shape[1], 1)], dim=2)
        wanted = missing.unflatten(1, (groups, -1)).transpose(0, 1)
        for part, want in zip(rows.split(CHUNK, dim=1), wanted.split(CHUNK, dim=1), strict=True):
            part, want = _double(part), _double(want)
            sums = (part.mT @ part, part.mT @ want, (want**2).sum(dim=1))
            if self.gram is None or self.cross is None or self.error is None:
                self.gram, self.cross, self.error = sums
            else:
                self.gram += sums[0]
                self.cross += sums[1]
                self.error += sums[2]
        self.count += rows.shape[1]

    def error_after(self, change: Tensor) -> Tensor:
        """The summed squared error of every output (groups, outputs) after a change of the weights (groups, inputs, outputs)."""
        assert self.gram is not None
        assert self.cross is not None
        assert self.error is not None
        return self.error - 2 * (change * self.cross).sum(dim=1) + (change * (self.gram @ change)).sum(dim=1)


def _double(values: Tensor) -> Tensor:
    return values.cpu().double() if values.device.type == "mps" else values.double()  # Apple's GPUs have no double precision


def _solve_level(
    level: Sequence[Consumer], networks: tuple[Captured, Captured], batches: Batches, damping: float
) -> dict[Consumer, RepairedLayer]:
    """Repair layers that don't depend on each other."""
    wanted = POSITIONS * len(batches[0][0])

    def target(each: Consumer, outputs: Tensor) -> Tensor:
        places = each.equations.places(outputs, wanted)
        return each.equations.outputs(outputs, places)[:, torch.tensor(each.outputs, device=outputs.device)]

    def present(each: Consumer, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        places = each.equations.places(outputs, wanted)
        return each.equations.rows(inputs, places), each.equations.outputs(outputs, places)

    old = Prefix(networks[0].module, {each.twin: lambda _, y, each=each: target(each, y) for each in level})
    new = Prefix(networks[1].module, {each.node: lambda x, y, each=each: present(each, x, y) for each in level})
    sums = {each: _Sums() for each in level}
    for batch in batches:
        targets, seen = old.look(batch), new.look(batch)
        for each, equations in sums.items():
            rows, outputs = seen[each.node]
            equations.add(rows, targets[each.twin] - outputs, each.bias is not None)
    return {each: _solve(each, equations, damping) for each, equations in sums.items()}


def _solve(found: Consumer, sums: _Sums, damping: float) -> RepairedLayer:
    """Set the weights of a layer from its equations; of every output the better of old and new."""
    assert sums.gram is not None
    assert sums.cross is not None
    assert sums.error is not None
    if not bool(torch.isfinite(sums.gram).all() and torch.isfinite(sums.error).all()):
        raise ModelError(f"{found.layer}: reads or gives values that aren't finite, so it can't be repaired. Check the inputs and weights.")
    weight: Tensor = attribute(found.weight)
    bias: Tensor | None = None if found.bias is None else attribute(found.bias)
    change = ridge(sums.gram, sums.cross, damping)
    before = _matrix(found.equations, weight, bias).to(change)
    after = (before + change).to(weight.dtype).to(change)  # what the weights can hold
    better = (sums.error_after(after - before) < sums.error)[:, None]
    after = torch.where(better, after, before)
    with torch.no_grad():
        if bias is not None:
            bias.copy_(after[:, -1].reshape(-1))
            weight.copy_(found.equations.weight(after[:, :-1], tuple(weight.shape)))
        else:
            weight.copy_(found.equations.weight(after, tuple(weight.shape)))
    entries = sums.count * sums.error.numel()
    left = sums.error_after(after - before).clamp(min=0).minimum(sums.error)
    return RepairedLayer(found.layer, float(sums.error.sum()) / entries, float(left.sum()) / entries)


def _matrix(equations: Equations, weight: Tensor, bias: Tensor | None) -> Tensor:
    matrix = _double(equations.matrix(weight.detach()))
    if bias is None:
        return matrix
    return torch.cat([matrix, _double(bias.detach()).reshape(equations.groups, 1, -1)], dim=1)
