"""The arithmetic of k bits: grids of whole multiples of a step, rounding onto them, and gradients straight through. On tensors alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

GridMethod = Literal["minmax", "mse"]

LEAST_RATIO = 2.0**-7
"""A learned step stays above this part of its start, so that it can't pass through 0."""

_CANDIDATES = 32
_NARROWEST = 1 / 32
"""The smallest part of the range that "mse" tries; weights with a peak 32 times as large as the best clip are rare."""
_REFINEMENTS = 4


class Grid(NamedTuple):
    """The values step · k for whole k from `lowest` to `highest`; the three broadcast against the values. 0 is always among them."""

    step: Tensor
    lowest: Tensor
    highest: Tensor


def range_grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool = True) -> Grid:
    """The grid of `bits` bits for values from `low` to `high`.

    Args:
        low: least values, any shape.
        high: greatest values, of the same shape.
        bits: 2 or more.
        symmetric: 2^bits - 1 integers, as many on both sides of 0; else 2^bits, of which the ends are those of the range, moved by at
            most half a step so that 0 is exact (Jacob et al. 2018, 1712.05877, section 2.1).

    Returns:
        A step of 1 where the range is empty; steps are never denormal, because a processor may take such for 0.

    >>> grid = range_grid(torch.tensor(-1.0), torch.tensor(2.0), 2, symmetric=False)
    >>> [float(part) for part in grid]
    [1.0, -1.0, 2.0]
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        limit = 2 ** (bits - 1) - 1
        step = _positive(torch.maximum(-low, high) / limit)
        return Grid(step, torch.full_like(step, -limit), torch.full_like(step, limit))
    step = _positive((high - low) / (2**bits - 1))
    lowest = torch.round(low / step).clamp(1 - 2**bits, 0)
    return Grid(step, lowest, lowest + (2**bits - 1))


def find_grid(blocks: Tensor, bits: int, method: GridMethod = "mse", *, symmetric: bool = True) -> Grid:
    """The grid of each block of weights.

    "minmax" clips nothing. "mse" looks for the range of least squared error: of 32 between all and a thirty-second of it the best,
    then the step is fitted by least squares to the integers that were found, four times in turn.

    Args:
        blocks: shape (…, entries), of which every block of entries gets a grid of its own.
        bits: 2 or more.
        method: how much of the tails is given up.
        symmetric: see `range_grid`.

    Returns:
        A grid of shape (…, 1). A block of zeros gets the largest step of all.

    >>> find_grid(torch.tensor([[0.5, -1.5], [0.0, 0.0]]), 3, "minmax").step.tolist()
    [[0.5], [0.5]]
    """
    blocks = blocks.detach()
    if blocks.numel() == 0:
        empty = torch.zeros(*blocks.shape[:-1], 1, dtype=blocks.dtype, device=blocks.device)
        return range_grid(empty, empty, bits, symmetric=symmetric)
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    grid = range_grid(low, high, bits, symmetric=symmetric)
    if method == "mse":
        grid = _least_squares(blocks, low, high, bits, symmetric)
    zero = low == high
    if bool(zero.any()) and not bool(zero.all()):
        grid = grid._replace(step=torch.where(zero, grid.step[~zero].max(), grid.step))
    return grid


def integers(values: Tensor, grid: Grid) -> Tensor:
    """The whole k of the nearest values of a grid, as floats: clipped, and halves rounded to even.

    >>> integers(torch.tensor([0.5, 1.5, -9.0]), range_grid(torch.tensor(-3.0), torch.tensor(3.0), 3)).tolist()
    [0.0, 2.0, -3.0]
    """
    return round_through(torch.clamp(values / grid.step, grid.lowest, grid.highest))


def fake_quantize(values: Tensor, grid: Grid) -> Tensor:
    """The nearest values of a grid, with gradients for training.

    The result is k · step bit for bit, and never -0. The gradient of a value is 1 inside the range, its ends among it, and 0 outside
    (straight through). The gradient of the step is that of LSQ (Esser et al. 2020, 1902.08153, equation 3): k - value / step inside,
    `lowest` or `highest` outside.

    >>> values = torch.tensor([0.4, 1.4, 9.0], requires_grad=True)
    >>> step = torch.tensor(1.0, requires_grad=True)
    >>> fake_quantize(values, Grid(step, torch.tensor(-3.0), torch.tensor(3.0))).sum().backward()
    >>> values.grad.tolist(), round(float(step.grad), 4)
    ([1.0, 1.0, 0.0], 2.2)
    """
    return integers(values, grid) * grid.step + 0.0


def round_through(values: Tensor) -> Tensor:
    """Round to whole numbers, halves to even; the gradient passes as if nothing had happened. The sum is exact, and never -0."""
    return values + (torch.round(values) - values).detach()


def scale_gradient(values: Tensor, factor: Tensor | float) -> Tensor:
    """The same values, whose gradient is multiplied by `factor`.

    >>> value = torch.tensor(3.0, requires_grad=True)
    >>> scale_gradient(value, 0.5).backward()
    >>> value.grad
    tensor(0.5000)
    """
    return values.detach() + (values - values.detach()) * factor


def dorefa_integers(weight: Tensor, bits: int) -> Tensor:
    """DoReFa's weights (Zhou et al. 2016, 1606.06160, equation 9) times 2^bits - 1: odd whole numbers, as floats.

    2 · q(tanh w / (2 max |tanh w|) + 1/2) - 1, where q rounds to 2^bits levels between 0 and 1 and lets the gradient through. The
    maximum is over the whole tensor. Without a level at 0, a weight of 0 becomes one of the two beside it.

    >>> dorefa_integers(torch.tensor([1.0, 0.1, -1.0]), 2).tolist()
    [3.0, 1.0, -3.0]
    """
    levels = 2**bits - 1
    squashed = torch.tanh(weight)
    peak = squashed.abs().max() if weight.numel() else squashed.new_ones(())
    share = squashed / (2 * peak.clamp(min=torch.finfo(weight.dtype).tiny)) + 0.5
    return 2 * round_through(share * levels) - levels


def clip_activation(values: Tensor, limit: Tensor | float, bits: int) -> Tensor:
    """Activations between 0 and `limit` on 2^bits levels, with PACT's gradient (Choi et al. 2018, 1805.06085, section 3).

    The gradient of a value is 1 between 0 and the limit and 0 elsewhere; that of the limit is the sum over all values that reach it.
    With the limit 1 these are DoReFa's activations (1606.06160, equation 11).

    Args:
        values: any shape.
        limit: greater than 0; a parameter where it is learned (the paper adds its square to the loss and begins at 6 to 10).
        bits: 1 or more.

    >>> limit = torch.tensor(3.0, requires_grad=True)
    >>> out = clip_activation(torch.tensor([-1.0, 1.2, 5.0]), limit, 2)
    >>> out.sum().backward()
    >>> out.tolist(), float(limit.grad)
    ([0.0, 1.0, 3.0], 1.0)
    """
    levels = 2**bits - 1
    bound = torch.as_tensor(limit, dtype=values.dtype, device=values.device)
    clipped = torch.where(values >= bound, bound, torch.relu(values))
    rounded = torch.round(clipped * levels / bound) * bound / levels
    return rounded.detach() + (clipped - clipped.detach())


def _positive(step: Tensor) -> Tensor:
    return torch.where(step > 0, step.clamp(min=torch.finfo(step.dtype).tiny), torch.ones_like(step))


def _squared_error(blocks: Tensor, grid: Grid) -> Tensor:
    difference = (blocks / grid.step).clamp_(grid.lowest, grid.highest).round_().mul_(grid.step).sub_(blocks)
    wide = difference.to(torch.promote_types(blocks.dtype, torch.float32))  # the square of a small float16 would be 0
    return wide.square_().sum(-1, keepdim=True, dtype=torch.float64)


def _least_squares(blocks: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    """The best of several ranges, refined; of several equal ones the widest."""
    with torch.no_grad():
        best = range_grid(low, high, bits, symmetric=symmetric)
        least = _squared_error(blocks, best)
        for at in range(1, _CANDIDATES):
            part = _NARROWEST ** (at / (_CANDIDATES - 1))
            best, least = _better(blocks, best, least, range_grid(low * part, high * part, bits, symmetric=symmetric))
        for _ in range(_REFINEMENTS):
            found = integers(blocks, best)
            whole = found.to(torch.promote_types(found.dtype, torch.float32))
            squares = whole.square().sum(-1, keepdim=True, dtype=torch.float64)
            fitted = (whole * blocks).sum(-1, keepdim=True, dtype=torch.float64) / squares.clamp(min=1)
            candidate = best._replace(step=torch.where(squares > 0, _positive(fitted.to(blocks.dtype)), best.step))
            best, least = _better(blocks, best, least, candidate)
    return best


def _better(blocks: Tensor, best: Grid, least: Tensor, candidate: Grid) -> tuple[Grid, Tensor]:
    error = _squared_error(blocks, candidate)
    wins = error < least
    return Grid(*(torch.where(wins, new, old) for new, old in zip(candidate, best, strict=True))), torch.where(wins, error, least)
