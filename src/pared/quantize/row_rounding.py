"""Integers times a scale for each row of a weight matrix: scales, rounding to nearest, and what rounding does to the outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from pared.core.problems import Problems

_SHRINKINGS = 70
"""Ranges tried by `row_scales`, in steps of 1 % from the whole range down: below a third of it too much is cut off at any width."""


def row_scales(weight: Tensor, limit: int, importance: Tensor | None = None) -> Tensor:
    """The scale of each row for integers from -limit to limit: from its largest entry, or where the squared error is least.

    With few bits it pays to cut off the largest entries, because the steps get smaller for all others.

    Args:
        weight: shape (…, rows, columns).
        limit: the largest integer, 2 ** (bits - 1) - 1.
        importance: shape (…, columns), how much an error in each column counts, such as the mean square of its input. None: the scale
            is that of the largest entry, and nothing is cut off.

    Returns:
        float32 scales of shape (…, rows). A row of zeros gets the largest scale of all rows, 1 if there is none. In float16 and
        bfloat16 scales have so few digits that every product with an integer is exact.

    >>> row_scales(torch.tensor([[0.63, -0.31], [0.0, 0.0]]), 63)
    tensor([0.0100, 0.0100])
    """
    if not weight.numel():
        return weight.new_ones(weight.shape[:-1], dtype=torch.float32)
    peaks = weight.detach().double().abs().amax(-1)
    spare = peaks.max() if bool((peaks > 0).any()) else peaks.new_tensor(float(limit))
    widest = torch.where(peaks > 0, peaks, spare) / limit
    best = _representable(widest, weight.dtype, limit)
    if importance is None:
        return best
    least = _errors(weight, best, limit, importance)
    for step in range(1, _SHRINKINGS):
        scales = _representable(widest * (1 - step / 100), weight.dtype, limit)
        errors = _errors(weight, scales, limit, importance)
        best = torch.where(errors < least, scales, best)
        least = torch.minimum(errors, least)
    return best


def group_scales(weight: Tensor, group: int, limit: int, importance: Tensor | None = None) -> Tensor:
    """The scale of every weight, where `group` consecutive ones of a row share one; the last group of a row may be smaller.

    Args:
        weight: shape (…, rows, columns).
        group: columns that share a scale.
        limit: the largest integer.
        importance: shape (…, columns), see `row_scales`.

    Returns:
        float32 scales of the weight's shape.

    >>> group_scales(torch.tensor([[0.63, -0.31, 6.3]]), 2, 63)
    tensor([[0.0100, 0.0100, 0.1000]])
    """
    columns = weight.shape[-1]
    rest = (0, -columns % group)
    blocks = functional.pad(weight, rest).unflatten(-1, (-1, group)).transpose(-2, -3)
    shares = None if importance is None else functional.pad(importance, rest).unflatten(-1, (-1, group))
    scales = row_scales(blocks, limit, shares).transpose(-1, -2)
    return scales.repeat_interleave(group, -1)[..., :columns]


def round_to_nearest(weight: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """The integers from `low` to `high` that are nearest to `weight` / `scales`; half way between two the even one.

    Args:
        weight: shape (…, rows, columns).
        scales: shape (…, rows), or of every weight (…, rows, columns), greater than 0.
        low: the smallest integer.
        high: the largest integer.

    Returns:
        int32 of the weight's shape.

    >>> round_to_nearest(torch.tensor([[0.14, -0.9]]), torch.tensor([0.1]), -7, 7)
    tensor([[ 1, -7]], dtype=torch.int32)
    """
    return torch.round(weight.detach().double() / spread(scales, weight).double()).clamp(low, high).to(torch.int32)


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    """The weights that the integers stand for, in float32: integer * scale.

    >>> dequantize(torch.tensor([[1, -7]]), torch.tensor([0.5]))
    tensor([[ 0.5000, -3.5000]])
    """
    return integers.to(torch.float32) * spread(scales, integers).to(torch.float32)


def spread(scales: Tensor, weight: Tensor) -> Tensor:
    """Scales of rows or of single weights, so that they broadcast against a weight of shape (…, rows, columns).

    >>> spread(torch.ones(2), torch.zeros(2, 3)).shape, spread(torch.ones(2, 3), torch.zeros(2, 3)).shape
    (torch.Size([2, 1]), torch.Size([2, 3]))
    """
    return scales if scales.dim() == weight.dim() else scales[..., None]


def row_errors(weight: Tensor, integers: Tensor, gram: Tensor, scales: Tensor) -> Tensor:
    """What rounding does to each output, squared and summed over the samples: (w - q) G (w - q)ᵀ by rows, in double precision.

    Their sum is trace((W - Q) G (W - Q)ᵀ) = ‖X (W - Q)ᵀ‖².

    Args:
        weight: shape (…, rows, columns).
        integers: of the same shape.
        gram: G = XᵀX of the inputs, shape (…, columns, columns).
        scales: shape (…, rows).

    >>> row_errors(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 0]]), torch.eye(2), torch.ones(1))
    tensor([4.], dtype=torch.float64)
    """
    change = weight.detach().double() - dequantize(integers, scales).double()
    return ((change @ gram.double()) * change).sum(-1)


def better_rows(weight: Tensor, first: Tensor, second: Tensor, gram: Tensor, scales: Tensor) -> Tensor:
    """Of two roundings the one with the smaller error, row by row; of equals the first.

    Rows don't depend on each other, so the error of the result is that of the better of the two or less.

    >>> weight, gram = torch.tensor([[0.6], [0.4]]), torch.ones(1, 1)
    >>> better_rows(weight, torch.tensor([[0], [0]]), torch.tensor([[1], [1]]), gram, torch.ones(2)).tolist()
    [[1], [0]]
    """
    gains = row_errors(weight, second, gram, scales) < row_errors(weight, first, gram, scales)
    return torch.where(gains[..., None], second, first)


def check_rows(problems: Problems, weight: Tensor, gram: Tensor, scales: Tensor, low: int, high: int) -> None:
    """Note the shapes and limits that don't fit each other, of what a rounding of rows is given.

    >>> problems = Problems("quantize.gptq")
    >>> check_rows(problems, torch.zeros(4, 2), torch.eye(3), torch.ones(4), -7, 7)
    >>> problems.found
    ['quantize.gptq: gram must be of shape (2, 2). Got (3, 3).']
    """
    problems.check(weight.dim() >= 2, "weight", "of shape (…, rows, columns)", tuple(weight.shape))
    if not problems.found:
        square, rows = (*weight.shape[:-2], weight.shape[-1], weight.shape[-1]), tuple(weight.shape[:-1])
        problems.check(gram.shape == square, "gram", f"of shape {square}", tuple(gram.shape))
        fits = scales.shape in (rows, weight.shape)
        problems.check(fits, "scales", f"of shape {rows}, or that of the weight", tuple(scales.shape))
    problems.check(low <= high, "low", f"at most high ({high})", low)


def _errors(weight: Tensor, scales: Tensor, limit: int, importance: Tensor) -> Tensor:
    change = weight.detach().double() - dequantize(round_to_nearest(weight, scales, -limit, limit), scales).double()
    return (change.square() @ importance.double()[..., None])[..., 0]


def _representable(scales: Tensor, dtype: torch.dtype, limit: int) -> Tensor:
    """The scales as float32; for a weight of fewer digits rounded up to what leaves room for the digits of the integers."""
    held = torch.finfo(dtype)
    if held.bits > 16:
        return scales.clamp(min=torch.finfo(torch.float32).tiny).to(torch.float32)
    digits = max(1, 1 - round(math.log2(held.eps)) - limit.bit_length())
    scales = scales.clamp(min=held.smallest_normal)
    unit = torch.ldexp(torch.ones_like(scales), torch.frexp(scales).exponent - digits)
    return (torch.ceil(scales / unit) * unit).to(torch.float32)
