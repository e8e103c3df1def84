"""Which ranks thin layers get: by energy, by share, or so that the whole network meets a budget at the least loss."""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pared.architecture.factors import compose, cp, spatial_values, tucker2
from pared.architecture.thin_layers import (
    Convolution,
    cp_convolution,
    spatial_convolution,
    square_root,
    svd_convolution,
    svd_linear,
    tucker_convolution,
)  # fmt: skip

Form: TypeAlias = Literal["channels", "tucker", "spatial", "cp"]
Ranks: TypeAlias = tuple[int, ...]
FORMS = ("channels", "tucker", "spatial", "cp")

_BLOCK = 8  # engines compute the channels of a convolution in blocks of 8: a rank of 5 takes as long as one of 8
_MANY = 32  # output channels from which a few channels more or less don't matter
_SHARES = tuple(0.9 * 0.85**n for n in range(18))  # of a layer's weights: what a budget chooses from


@dataclass(frozen=True)
class Place:
    """A layer and what it sees.

    Attributes:
        layer: linear, or a convolution without groups.
        form: what it would become; linear layers have one form only.
        inputs: lengths of the axes of the image that it gets, () for linear layers.
        outputs: of those that it gives; for linear layers the positions of a sample that it is applied to, as one number.
        moment: mean of x xᵀ over what it multiplies, or None where the weight alone decides.
    """

    layer: nn.Linear | Convolution
    form: Form
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = (1,)
    moment: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, and weights of each."""
        rows, columns = self.layer.weight.flatten(1).shape
        return rows, columns

    @property
    def highest(self) -> Ranks:
        """Ranks at which nothing is lost; for "cp" those from which it surely pays no more."""
        rows, columns = self.shape
        if self.form == "tucker":
            return rows, self.layer.weight.shape[1]
        if self.form == "spatial":
            outputs, inputs, height, width = self.layer.weight.shape
            return (min(inputs * height, outputs * width),)
        return (min(rows, columns),) if self.form == "channels" else (rows * columns // min(rows, columns),)

    def weights(self, ranks: Ranks | None = None) -> int:
        """Weights of the chain, or of the layer itself."""
        return sum(weights for weights, _ in self._parts(ranks))

    def macs(self, ranks: Ranks | None = None) -> int:
        """Multiply-adds of a sample."""
        return sum(weights * positions for weights, positions in self._parts(ranks))

    def _parts(self, ranks: Ranks | None) -> list[tuple[int, int]]:
        """Weights of every layer of the chain, and at how many positions they are applied."""
        rows, columns = self.shape
        after = math.prod(self.outputs)
        if ranks is None:
            return [(rows * columns, after)]
        if self.form == "channels":
            return [(ranks[0] * columns, after), (rows * ranks[0], after)]
        inputs, kernel = self.layer.weight.shape[1], self.layer.weight.shape[2:]
        before = math.prod(self.inputs)
        if self.form == "tucker":
            return [(inputs * ranks[1], before), (math.prod(kernel) * ranks[0] * ranks[1], after), (ranks[0] * rows, after)]
        passing = [math.prod((*self.outputs[: axis + 1], *self.inputs[axis + 1 :])) for axis in range(len(kernel))]
        if self.form == "spatial":
            return [(ranks[0] * inputs * kernel[0], passing[0]), (rows * ranks[0] * kernel[1], passing[1])]
        depthwise = [(ranks[0] * length, positions) for length, positions in zip(kernel, passing, strict=True)]
        return [(inputs * ranks[0], before), *depthwise, (rows * ranks[0], after)]

    def pays(self, ranks: Ranks) -> bool:
        """Whether the chain has fewer weights and fewer multiply-adds than the layer."""
        return self.weights(ranks) < self.weights() and self.macs(ranks) < self.macs()

    def build(self, ranks: Ranks) -> nn.Sequential:
        """The chain."""
        if isinstance(self.layer, nn.Linear):
            return svd_linear(self.layer, ranks[0], self.moment)
        if self.form == "channels":
            return svd_convolution(self.layer, ranks[0], self.moment)
        if self.form == "tucker":
            return tucker_convolution(self.layer, *ranks)
        if self.form == "spatial":
            assert isinstance(self.layer, nn.Conv2d)
            return spatial_convolution(self.layer, ranks[0])
        return cp_convolution(self.layer, ranks[0])


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The smallest rank whose squared singular values sum up to the share `energy` of all of them; at least 1.

    Args:
        singular_values: shape (n,), in descending order.
        energy: in [0, 1].

    >>> rank_for_energy(torch.tensor([3.0, 1.0, 0.0]), 0.9), rank_for_energy(torch.tensor([3.0, 1.0, 0.0]), 1.0)
    (1, 2)
    """
    sums = singular_values.double().square().cumsum(0)
    return min(int((sums < energy * sums[-1]).sum()) + 1, len(singular_values))


def for_energy(place: Place, energy: float) -> Ranks:
    """Ranks that keep at least the share `energy` of the squared weights (or outputs, where there is a moment); not for "cp".

    Tucker's two modes lose at most half of what may be lost each (De Lathauwer et al. 2000: the losses of modes add up at most).
    """
    if place.form == "tucker":
        w = place.layer.weight.detach().double().flatten(2)
        half = 1 - (1 - energy) / 2
        modes = (w.flatten(1), w.transpose(0, 1).flatten(1))
        found = tuple(rank_for_energy(torch.linalg.svdvals(mode), half) for mode in modes)
    else:
        found = (rank_for_energy(_values(place), energy),)
    return _in_blocks(place, found, up=True)


def for_share(place: Place, share: float) -> Ranks:
    """The largest ranks with at most `share` of the layer's weights, at least 1; Tucker's two in proportion to its channels."""
    wanted = decimal.Decimal(repr(float(share))) * place.weights()
    low, high = 0, max(place.highest)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if place.weights(_scaled(place, middle)) <= wanted else (low, middle - 1)
    return _in_blocks(place, _scaled(place, max(low, 1)), up=False)


def for_rank(place: Place, rank: int) -> Ranks:
    """The same rank everywhere, as far as the layer has it."""
    return tuple(min(rank, highest) for highest in place.highest)


def for_budget(places: Mapping[str, Place], saved: float) -> dict[str, Ranks]:
    """Ranks that save so many multiply-adds at the least loss: again and again the step that loses least for each one saved.

    The loss of a layer is the squared error of its weight (of its outputs, where there is a moment), as a share of its square.

    Args:
        places: by path.
        saved: multiply-adds of a sample; if all of them together can't save so many, everything is as thin as it gets.
    """
    options = {path: [_Option((), place.macs(), 0.0), *_options(place)] for path, place in places.items()}
    now = {path: found[0] for path, found in options.items()}
    left = saved
    while left > 0:
        steps = [
            ((other.loss - now[path].loss) / (now[path].macs - other.macs), path, other)
            for path, found in options.items()
            for other in found
            if other.macs < now[path].macs
        ]
        if not steps:
            break
        _, path, chosen = min(steps, key=lambda step: step[0])
        left -= now[path].macs - chosen.macs
        now[path] = chosen
    _spend(options, now, -left)
    return {path: each.ranks for path, each in now.items() if each.ranks}


def _spend(options: Mapping[str, list[_Option]], now: dict[str, _Option], spare: float) -> None:
    """Use what the last steps saved too much, where it gains most for each multiply-add."""
    while True:
        steps = [
            ((now[path].loss - other.loss) / (other.macs - now[path].macs), path, other)
            for path, found in options.items()
            for other in found
            if 0 < other.macs - now[path].macs <= spare and other.loss < now[path].loss
        ]
        if not steps:
            return
        _, path, chosen = max(steps, key=lambda step: step[0])
        spare -= chosen.macs - now[path].macs
        now[path] = chosen


class _Option(NamedTuple):
    ranks: Ranks
    macs: int
    loss: float


def _options(place: Place) -> Iterator[_Option]:
    values = None if place.form in ("tucker", "cp") else _values(place).square()
    seen: set[Ranks] = set()
    for share in _SHARES:
        ranks = for_share(place, share)
        if ranks not in seen and place.pays(ranks):
            seen.add(ranks)
            loss = _loss(place, ranks) if values is None else float(values[ranks[0] :].sum() / values.sum().clamp(min=1e-300))
            yield _Option(ranks, place.macs(ranks), loss)


def _loss(place: Place, ranks: Ranks) -> float:
    weight = place.layer.weight.detach().double()
    if place.form == "tucker":
        left = tucker2(weight, *ranks, sweeps=2).core.square().sum()
        return max(float(1 - left / weight.square().sum().clamp(min=1e-300)), 0.0)
    return float((weight - compose(cp(weight, ranks[0], sweeps=20))).square().sum() / weight.square().sum().clamp(min=1e-300))


def _values(place: Place) -> Tensor:
    if place.form == "spatial":
        return spatial_values(place.layer.weight)
    matrix = place.layer.weight.detach().double().flatten(1)
    return torch.linalg.svdvals(matrix if place.moment is None else matrix @ square_root(place.moment)[0])


def _scaled(place: Place, rank: int) -> Ranks:
    """Ranks in the proportion of the highest, of which the largest is `rank`."""
    most = max(place.highest)
    return tuple(max(1, min(highest, round(rank * highest / most))) for highest in place.highest)


def _in_blocks(place: Place, ranks: Sequence[int], *, up: bool) -> Ranks:
    """Multiples of 8 where a convolution has many channels: no fewer than asked for, or no more."""
    if isinstance(place.layer, nn.Linear) or len(place.layer.weight) < _MANY:
        return tuple(min(rank, highest) for rank, highest in zip(ranks, place.highest, strict=True))
    found = []
    for rank, highest in zip(ranks, place.highest, strict=True):
        whole = -(-rank // _BLOCK) * _BLOCK if up else rank // _BLOCK * _BLOCK
        found.append(min(whole or rank, highest))
    return tuple(found)
