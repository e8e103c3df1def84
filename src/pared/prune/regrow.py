"""Sparse training in which the connections move: the smallest go, new ones grow where the loss would fall most."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from pared.core.layers import Layer, compressible, readers, stored
from pared.core.problems import Problems
from pared.core.rules import Mask
from pared.prune.importance import Magnitude, Random
from pared.prune.masks import alive, set_mask
from pared.prune.selection import check_scores, highest, share_of
from pared.prune.training_masks import Clock, tune_with
from pared.prune.weights import weight_scores
from pared.training import Task, Train, sum_over_processes

Densities = Literal["erdos-renyi", "uniform"]


def layer_counts(shapes: Sequence[Sequence[int]], keep: float, densities: Densities) -> list[int]:
    """How many weights each layer keeps, together exactly the share `keep` of all.

    "uniform" gives every layer the same share. "erdos-renyi" gives a layer of shape (out, in, height, width) a share in proportion to
    (out + in + height + width) / (out · in · height · width), at most all, so that large layers are sparser (the Erdős–Rényi kernel
    of Evci et al. 2019, 1911.11134, section 3).

    >>> layer_counts([(300, 784), (100, 300), (10, 100)], 0.1, "erdos-renyi")
    [18714, 6906, 1000]
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = share_of(keep, sum(sizes))
    wanted = [float(size if densities == "uniform" else sum(shape)) for size, shape in zip(sizes, shapes, strict=True)]
    full: set[int] = set()
    while True:  # a layer that would get more than it has is full, and the others share the rest
        rest = total - sum(sizes[at] for at in full)
        factor = rest / max(1e-300, sum(want for at, want in enumerate(wanted) if at not in full))
        shares = [float(sizes[at]) if at in full else factor * want for at, want in enumerate(wanted)]
        over = {at for at, share in enumerate(shares) if at not in full and share > sizes[at]}
        if not over:
            break
        full |= over
    counts = [int(share) for share in shares]
    order = sorted(range(len(sizes)), key=lambda at: counts[at] - shares[at])
    for at in order[: total - sum(counts)]:  # what rounding down left over goes to the largest fractions
        counts[at] += 1
    return counts


def regrown(weight: Tensor, gradient: Tensor, keep: Tensor, living: Tensor, count: int) -> Tensor:
    """Drop `count` connections of least magnitude, then grow as many where the gradient is largest (RigL, algorithm 1).

    What was dropped may grow again at once, if its gradient is among the largest.

    Args:
        weight: the layer's weight.
        gradient: of the loss, for all entries of the weight, whether they are connected or not.
        keep: the present connections, True where there is one.
        living: False where there may never be one.
        count: how many to exchange.

    Returns:
        The new connections, as many as before.

    >>> both = torch.tensor([True, True, False])
    >>> regrown(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.0, 0.5, -2.0]), both, torch.ones(3, dtype=torch.bool), 1)
    tensor([ True, False,  True])
    """
    before = int(keep.sum())
    stays = highest(weight.abs().masked_fill(~keep, -torch.inf), before - count) & keep
    free = living & ~stays
    return stays | (highest(gradient.abs().masked_fill(~free, -torch.inf), before - int(stays.sum())) & free)


@dataclass(frozen=True)
class Regrow:
    """Train a sparse network whose connections move, at a constant count (RigL: Evci et al. 2019, 1911.11134).

    It begins with the most important weights of the model that it is given, trained or fresh. Every so many batches each layer drops
    its smallest weights and grows as many where the gradient of the dense weight on the present batch is largest. New connections begin
    at zero and without momentum; weights that are masked stay exactly zero whatever the optimiser remembers of them.

    Args:
        keep: share of the weights that stay, exactly, counted over all prunable layers.
        train: the training, in one piece. The paper trains sparse networks longer than dense ones.
        densities: how the layers share them, see `layer_counts`; the paper finds "erdos-renyi" better at the same count.
        fraction: of a layer's connections that the first exchange moves; it falls to 0 along half a cosine (the paper's α, 0.3).
        every: batches between two exchanges, the paper's 100; a short training makes at least ten exchanges nevertheless.
        end: the part of the training after which connections stay where they are (three quarters, as in the paper).
        importance: which weights the first connections are: `Magnitude()`, or `Random()`, the paper's choice for a fresh network.
        leave: paths of modules whose weights are not pruned.

    Raises:
        SettingsError: for a wrong setting, a path that the model doesn't have, or a model without prunable layers.
        WeightsError: if a weight or a gradient is NaN.

    >>> from pared.core.rules import bake
    >>> task = Task(*[[(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))] * 4] * 3)
    >>> small = bake(Regrow(keep=0.25, train="2ep")(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), task))
    >>> sum(int(layer.weight.count_nonzero()) for layer in small) <= 10
    True
    """

    keep: float = 0.1
    train: Train = field(default_factory=Train)
    densities: Densities = "erdos-renyi"
    fraction: float = 0.3
    every: int = 100
    end: float = 0.75
    importance: Magnitude | Random = field(default_factory=Magnitude)
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("prune.regrow")
        problems.number("keep", self.keep, low=0, high=1)
        problems.check(self.densities in ("erdos-renyi", "uniform"), "densities", "erdos-renyi or uniform", self.densities)
        problems.number("fraction", self.fraction, low=0, high=1)
        problems.number("every", self.every, low=1, integer=True)
        problems.number("end", self.end, low=0, high=1)
        known = isinstance(self.importance, Magnitude | Random)
        problems.check(known, "importance", "Magnitude() or Random()", self.importance)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.raise_if_any()
        object.__setattr__(self, "train", Train.parse(self.train))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a trained copy of `model` with masks on its weights."""
        model = copy.deepcopy(model)
        layers = compressible(model, self.leave, "prune.regrow")
        living = {path: alive(layer) for path, layer in layers.items()}
        scores = weight_scores(self.importance, model, task, layers)
        check_scores(scores)
        counts = layer_counts([tuple(layer.weight.shape) for layer in layers.values()], self.keep, self.densities)
        growing: list[_Growing] = []
        for (path, layer), count in zip(layers.items(), counts, strict=True):
            keep = highest(scores[path].masked_fill(~living[path], -torch.inf), count) & living[path]
            growing.append(_Growing(model, layer, set_mask(model, layer, keep), living[path]))
        for each in growing:
            each.clear()

        def step(clock: Clock, loss: Callable[[], Tensor]) -> Tensor:
            last = clock.total * self.end
            interval = max(1, min(self.every, int(last) // 10))
            if clock.seen == 0 or clock.seen % interval or clock.seen >= last:
                return loss()
            return _exchange(growing, self.fraction * (1 + math.cos(math.pi * clock.seen / last)) / 2, loss)

        hook = register_optimizer_step_post_hook(partial(_forget, {id(each.parameter): each for each in growing}))
        try:
            tune_with(model, task, self.train, step)
        finally:
            hook.remove()
        return model


class _Growing:
    """A layer, its mask, and where it may have connections."""

    def __init__(self, model: nn.Module, layer: Layer, mask: Mask, living: Tensor) -> None:
        parameter = stored(layer, "weight")
        assert parameter is not None
        self.parameter, self.mask, self.living = parameter, mask, living
        self.places = [(owner, name) for _, owner, name in readers(model, layer)]

    def read(self) -> list[Tensor]:
        """The masked weight, wherever it is read."""
        return [getattr(owner, name) for owner, name in self.places]

    def move(self, gradient: Tensor, fraction: float) -> None:
        """Exchange connections. The mask is replaced, not written to: the graph of the present batch still needs the old one."""
        weight, keep = self.parameter.detach(), self.mask.keep
        self.mask.keep = regrown(weight, gradient, keep, self.living.to(keep.device), int(fraction * int(keep.sum())))
        self.clear()

    def clear(self) -> None:
        """Set what is masked to zero also in the parameter behind the mask, so that it is zero when it grows again."""
        with torch.no_grad():
            self.parameter.masked_fill_(~self.mask.keep, 0.0)


def _exchange(growing: Sequence[_Growing], fraction: float, loss: Callable[[], Tensor]) -> Tensor:
    """Compute the loss and move the connections of all layers by the gradients of the masked weights, which are dense."""
    with parametrize.cached():  # so that the tensors read here are those that the forward uses
        places = [each.read() for each in growing]
        tensors = [tensor for place in places for tensor in place if tensor.requires_grad]
        value = loss()
        found = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True) if tensors else ()
    gradients = {id(tensor): gradient for tensor, gradient in zip(tensors, found, strict=True) if gradient is not None}
    for each, place in zip(growing, places, strict=True):
        known = [gradients[id(tensor)] for tensor in place if id(tensor) in gradients]
        if known:  # frozen layers, and those that this batch didn't use, keep their connections
            each.move(sum_over_processes(torch.stack(known).sum(0)), fraction)
    return value


def _forget(growing: Mapping[int, _Growing], optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step: what is masked is zero, and so is all that the optimiser remembers of it (momentum, Adam's moments)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            each = growing.get(id(parameter))
            if each is None:
                continue
            each.clear()
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(~each.mask.keep, 0.0)
