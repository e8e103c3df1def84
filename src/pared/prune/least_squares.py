"""Repair after a cut, without labels: the weights that are left are solved for, so that each layer gives what it gave before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pared.core.errors import ModelError
from pared.core.problems import Problems
from pared.graph.analysis_pass import attribute
from pared.graph.capture import Captured, capture
from pared.graph.cutting import Cut
from pared.graph.equations import Equations
from pared.graph.fold import arguments, packet
from pared.prune.consumers import Consumer, consumers
from pared.prune.normal_equations import HalvedSums, double
from pared.prune.observe import fitting, isolated, levels
from pared.prune.stepwise import Stepwise, View
from pared.training import Task
from pared.training.samples import first_inputs

POSITIONS = 64  # of every sample that become equations: neighbours say nearly the same


@dataclass(frozen=True)
class RepairedLayer:
    """What `reconstruct` did to a layer that had lost inputs.

    Attributes:
        layer: its path, or the name of its weight if it has none.
        before: mean squared distance of an output (or of the sum that it is added to) from that of the original network, on the inputs
            used and with the earlier layers already repaired; None if left alone.
        after: the same with the new weights; never more than `before`.
        why: why it was left alone; "" if it wasn't.
    """

    layer: str
    before: float | None = None
    after: float | None = None
    why: str = ""


def reconstruct(cut: Cut, original: nn.Module, task: Task, samples: int = 256, damping: float | None = None) -> tuple[RepairedLayer, ...]:
    """Change the weights of every layer that lost inputs, in place, so that it gives again what it gave in the original network.

    For each such linear layer or convolution, least squares over the weights that are left (and the bias): its outputs, computed from what
    the cut network really feeds it, against the outputs that were kept of the same layer of the original (He, Zhang & Sun 1707.06168,
    section 3.1; Luo et al. 1707.06342, equation 7). Layers are solved in the order in which they are computed, with all earlier ones
    already repaired, so errors don't add up. What is solved for is the change of the weights, and it is the change that is damped: a layer
    that lost nothing of value keeps its weights, and on the inputs used no output of a layer gets worse. An output whose
    error wouldn't shrink keeps its weights to the bit.

    Where the layer is the last of a residual branch, with or without a batch norm behind it, the sum is what is to come out as before: so
    a branch also makes up for what is missing in its shortcut (He, Zhang & Sun, section 3.3). A layer without a bias is shifted by the
    running mean of the batch norm behind it; that way means are right without measuring statistics again.

    Only inputs are looked at, never labels. Equations are accumulated into Gram matrices, whose memory depends on a layer's inputs and not
    on the samples; of every sample at most 64 output positions are used, evenly spread and always the same. Between layers at most a
    gigabyte of activations is held for each network, so that all layers together take about two runs over the samples.

    Args:
        cut: from `cut_model` or `Chooser.cut`; `cut.model` is changed, and moved to the task's device.
        original: the network that was given to that cut; it is moved too and otherwise unchanged.
        task: gives inputs, from the training split and without augmentation.
        samples: how many. With 64 positions each, 256 are 16,384 equations for a convolution.
        damping: in units of every input's own mean square. It keeps a layer with about as many inputs as equations from fitting the
            samples alone. None: for each layer that of six, from 1e-4 to 10, with which a solution from one half of the samples does
            best on the other half; an output that it doesn't help there keeps its weights.

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
    if damping is not None:
        problems.number("damping", damping, low=1e-12)
    problems.raise_if_any()
    if not cut.kept:
        return ()
    batches = first_inputs(task, samples, "the outputs of layers are matched on them")
    before = capture(original.to(task.machine.device), batches[0])
    after = capture(cut.model.to(task.machine.device), batches[0])
    batches = fitting(before, fitting(after, batches))
    before, after = isolated(before), isolated(after, *_running_means(after))
    found = consumers(before, after, cut.kept)
    members = levels(after.module.graph, {each.node: each for each in found if not each.why})
    networks = (
        Stepwise(before.module, batches, [[each.twin_total for each in level] for level in members]),
        Stepwise(after.module, batches, [[node for each in level for node in (each.node, each.total)] for level in members]),
    )
    done = {each: RepairedLayer(each.layer, why=each.why) for each in found}
    for number, level in enumerate(members):
        done.update(_solve_level(number, level, networks, POSITIONS * len(batches[0][0]), damping))
    return tuple(done[each] for each in found)


def _running_means(captured: Captured) -> list[Tensor]:
    norms = [node for node in captured.module.graph.nodes if packet(node) is torch.ops.aten.batch_norm]
    means = [arguments(node)["running_mean"] for node in norms]
    return [attribute(mean) for mean in means if isinstance(mean, fx.Node) and mean.op == "get_attr"]


def _solve_level(
    level: int, members: Sequence[Consumer], networks: tuple[Stepwise, Stepwise], wanted: int, damping: float | None
) -> dict[Consumer, RepairedLayer]:
    """Repair layers that don't depend on each other; `wanted` output positions of every batch become equations."""

    def kept(each: Consumer, outputs: Tensor) -> Tensor:
        return chosen(each, outputs)[:, torch.tensor(each.outputs, device=outputs.device)]

    def chosen(each: Consumer, outputs: Tensor) -> Tensor:
        return each.equations.outputs(outputs, each.equations.places(outputs, wanted))

    def read(each: Consumer, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return each.equations.rows(inputs, each.equations.places(outputs, wanted)), chosen(each, outputs)

    old: dict[fx.Node, View] = {each.twin_total: lambda _, y, each=each: kept(each, y) for each in members}
    new: dict[fx.Node, View] = {each.node: lambda x, y, each=each: read(each, x, y) for each in members}
    new.update({each.total: lambda _, y, each=each: ((), chosen(each, y)) for each in members if each.total is not each.node})
    sums = {each: HalvedSums(each.scale()) for each in members}
    for targets, seen in zip(networks[0].look(level, old), networks[1].look(level, new), strict=True):
        for each, equations in sums.items():
            equations.add(seen[each.node][0], targets[each.twin_total] - seen[each.total][1], each.shift is not None)
    return {each: _solve(each, equations, damping) for each, equations in sums.items()}


def _solve(found: Consumer, equations: HalvedSums, damping: float | None) -> RepairedLayer:
    """Set the weights of a layer from its equations; of every output the better of old and new."""
    if not all(bool(torch.isfinite(half.gram).all() and torch.isfinite(half.error).all()) for half in equations.halves):
        raise ModelError(f"{found.layer}: reads or gives values that aren't finite, so it can't be repaired. Check the inputs and weights.")
    weight: Tensor = attribute(found.weight)
    shift: Tensor | None = None if found.shift is None else attribute(found.shift)
    sign = 1 if found.shift is found.bias else -1  # a running mean is taken away
    change, sums = equations.solve(damping)
    before = _matrix(found.equations, weight, None if shift is None else sign * shift).to(change)
    after = (before + change).to(weight.dtype).to(change)  # what the weights can hold
    better = (sums.error_of(after - before) < sums.error)[:, None]
    after = torch.where(better, after, before)
    with torch.no_grad():
        if shift is not None:
            shift.copy_(sign * after[:, -1].reshape(-1))
            weight.copy_(found.equations.weight(after[:, :-1], tuple(weight.shape)))
        else:
            weight.copy_(found.equations.weight(after, tuple(weight.shape)))
    left = sums.error_of(after - before).clamp(min=0).minimum(sums.error)
    entries = sums.count * sums.error.numel()
    means = [float(equations.weighed(errors).sum()) / entries for errors in (sums.error, left)]
    return RepairedLayer(found.layer, means[0], means[1])


def _matrix(equations: Equations, weight: Tensor, shift: Tensor | None) -> Tensor:
    matrix = double(equations.matrix(weight.detach()))
    if shift is None:
        return matrix
    return torch.cat([matrix, double(shift.detach()).reshape(equations.groups, 1, -1)], dim=1)
