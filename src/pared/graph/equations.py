"""A linear layer or convolution as a set of linear equations: one row of inputs for each output position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from pared.graph.fold import CONVOLUTIONS, TRANSPOSED, arguments, packet

LAYERS = frozenset({torch.ops.aten.linear, *CONVOLUTIONS, *TRANSPOSED})


@dataclass(frozen=True)
class Equations:
    """How the outputs of a layer come from its inputs: every output is a weighted sum of a row of inputs, plus a bias.

    Attributes:
        kernel: size along each spatial axis; empty for a linear layer.
        stride: steps of the window over the input (of a transposed convolution: 1).
        padding: zeros before and after each spatial axis; negative ones take away.
        dilation: distances within the window.
        stretch: for a transposed convolution, its stride: the input is spread out by that much, with zeros between.
        groups: sets of channels that don't mix.
        transposed: whether the weight has its inputs first, and lies turned round.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    stretch: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, node: fx.Node, kernel: tuple[int, ...]) -> Equations:
        """Those of a node that calls one of `LAYERS`."""
        given, axes = arguments(node), len(kernel)
        if not axes:
            return cls()
        stride, dilation = _each(given["stride"], axes), _each(given["dilation"], axes)
        if packet(node) not in TRANSPOSED:
            padding = _paddings(given["padding"], kernel, dilation)
            return cls(kernel, stride, padding, dilation, groups=given["groups"])
        more, taken = _each(given["output_padding"], axes), _each(given["padding"], axes)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((r - p, r - p + extra) for r, p, extra in zip(reach, taken, more, strict=True))
        return cls(kernel, (1,) * axes, padding, dilation, stride, given["groups"], transposed=True)

    def places(self, outputs: Tensor, wanted: int) -> Tensor:
        """About `wanted` output positions of a layer, evenly spread: numbers in the order batch, then space."""
        return spread_out(outputs.numel() // outputs.shape[1 if self.kernel else -1], wanted).to(outputs.device)

    def rows(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """The inputs of the output positions `chosen`: (groups, positions, inputs of an output)."""
        if not self.kernel:
            return inputs.reshape(-1, inputs.shape[-1])[chosen][None]
        spread = _stretched(inputs, self.stretch) if self.transposed else inputs
        windows = functional.pad(spread, [side for pair in reversed(self.padding) for side in pair])
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            windows = windows.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
        windows = windows.movedim(1, 1 + len(self.kernel))  # (batch, *space, channels, *kernel), still a view
        rows = windows[torch.unravel_index(chosen, windows.shape[: 1 + len(self.kernel)])]
        return rows.reshape(len(chosen), self.groups, -1).transpose(0, 1)

    def outputs(self, outputs: Tensor, chosen: Tensor) -> Tensor:
        """The outputs at those positions: (positions, outputs)."""
        last = outputs.movedim(1, -1) if self.kernel else outputs
        return last.reshape(-1, last.shape[-1])[chosen]

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (groups, inputs of an output, outputs of a group), so that rows @ matrix are the outputs; a bias isn't in it."""
        if self.transposed:
            weight = weight.transpose(0, 1).flip(tuple(range(2, weight.dim())))
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).mT

    def weight(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Back from `matrix` to the weight of the given shape."""
        if not self.transposed:
            return matrix.mT.reshape(shape)
        turned = matrix.mT.reshape(shape[1], shape[0], *shape[2:])
        return turned.flip(tuple(range(2, len(shape)))).transpose(0, 1)


def spread_out(total: int, wanted: int) -> Tensor:
    """About `wanted` of the numbers below `total`, evenly spread, by a step that shares no factor with `total`.

    So that among the positions of images none is preferred: a step that divides the width would always meet the same columns.

    >>> spread_out(4, 8).tolist(), spread_out(12, 4).tolist()
    ([0, 1, 2, 3], [0, 5, 10])
    """
    step = max(1, -(-total // wanted))
    while step > 1 and math.gcd(step, total) > 1:
        step += 1
    return torch.arange(0, total, step)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) * axes if isinstance(value, list | tuple) and len(value) == 1 else tuple(value)


def _paddings(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((side, side) for side in _each(padding, len(kernel)))


def _stretched(inputs: Tensor, steps: tuple[int, ...]) -> Tensor:
    sizes = [(size - 1) * step + 1 for size, step in zip(inputs.shape[2:], steps, strict=True)]
    result = inputs.new_zeros(*inputs.shape[:2], *sizes)
    result[(..., *(slice(None, None, step) for step in steps))] = inputs
    return result
