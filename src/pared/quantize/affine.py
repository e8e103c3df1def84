"""The arithmetic of affine quantisation: ranges, scales and zero points, integer weights. Pure functions on tensors."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Range = tuple[float, float]
RangeMethod = Literal["minmax", "percentile", "mse", "kl"]

ACTIVATION_LEVELS = 256
PERCENTILE = 99.99
"""Per cent of the values that a percentile range covers."""

_CANDIDATES = 100

_STRIDE = 8
"""Bins between two clips that "kl" tries: 240 of 2048 bins, which moves the range by a 256th of itself at most."""

_EMPTY = 1e-4
"""What "kl" takes for the probability of all bins together that the clipped histogram has and the rounded one has not."""


class Affine(NamedTuple):
    """Integers 0 … levels - 1 that stand for scale · (integer - zero_point)."""

    scale: float
    zero_point: int
    levels: int = ACTIVATION_LEVELS


def affine_range(counts: Tensor, low: float, high: float, method: RangeMethod = "minmax", *, levels: int = ACTIVATION_LEVELS) -> Range:
    """The range of values to represent, always with 0 in it, so that zero padding is exact.

    minmax takes everything. percentile leaves out the outermost 0.01 % of the values. mse shrinks the range in steps of 1 % to where
    the mean squared error of rounding and clipping is least; of several equal ones the widest (whitepaper 1806.08342, section 3).
    kl clips magnitudes where the histogram with everything beyond put into its last bin, and the same histogram in as many levels as
    there are integers, differ least in Kullback and Leibler's divergence (the entropy calibration of TensorRT); of equal ones the
    narrowest.

    Args:
        counts: histogram, shape (bins,), of values from `low` to `high` in bins of equal width.
        low: least value seen.
        high: greatest value seen.
        method: how much of the tails is given up.
        levels: integers there are.

    >>> counts = torch.zeros(100)
    >>> counts[:10], counts[99] = 10_000.0, 1.0      # one outlier
    >>> affine_range(counts, 0.0, 100.0, "minmax"), affine_range(counts, 0.0, 100.0, "percentile")
    ((0.0, 100.0), (0.0, 10.0))
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if method == "minmax" or low == high or counts.sum() == 0:
        return low, high
    if method == "kl":
        return _least_divergence(counts, low, high, levels)
    return _percentile(counts, low, high) if method == "percentile" else _least_squares(counts, low, high, levels)


def choose_qparams(low: float, high: float, levels: int = ACTIVATION_LEVELS) -> tuple[float, int]:
    """Scale and zero point of `levels` integers 0 … levels - 1 for the values from `low` to `high`.

    real = scale * (integer - zero_point). The range is widened to hold 0, which is then represented exactly (1712.05877, section 2.1).

    >>> choose_qparams(-64.0, 191.0)
    (1.0, 64)
    >>> choose_qparams(0.0, 0.0)
    (1.0, 0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 1.0, 0
    # as a float32, since that is what the deployed file divides by; a denormal one would divide by zero
    scale = max((high - low) / (levels - 1), float(torch.finfo(torch.float32).tiny))
    return scale, min(max(round(-low / scale), 0), levels - 1)


def quantize_weight(weight: Tensor, axis: int = 0, bits: int = 7, least_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a weight to integers, symmetric about 0 and with a scale for each output channel.

    7 bits, -63 … 63, are the default because processors without VNNI add products of unsigned and signed bytes in pairs in 16 bits:
    2 * 255 * 127 doesn't fit, 2 * 255 * 63 does.

    Args:
        weight: any floating tensor.
        axis: of the output channels.
        bits: 2 to 8, of the integers.
        least_scale: shape (channels,): scales aren't chosen smaller than this.

    Returns:
        int8 weights of the same shape, and float32 scales of shape (channels,), with weight ≈ scale * integer. A channel of zeros
        gets the largest scale of the others (1 if all are zero).

    >>> quantize_weight(torch.tensor([[0.63, -0.31], [0.0, 0.0]]))
    (tensor([[ 63, -31],
            [  0,   0]], dtype=torch.int8), tensor([0.0100, 0.0100]))
    """
    limit = 2 ** (bits - 1) - 1
    others = [other for other in range(weight.dim()) if other != axis % weight.dim()]
    peaks = weight.detach().to(torch.float32).abs().amax(others) if others else weight.detach().to(torch.float32).abs()
    spare = peaks.max() if bool(peaks.any()) else torch.tensor(float(limit))
    scales = torch.where(peaks > 0, peaks, spare) / limit
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    if least_scale is not None:
        scales = torch.maximum(scales, least_scale)
    shape = [1] * weight.dim()
    shape[axis] = -1
    return torch.round(weight.detach() / scales.reshape(shape)).clamp(-limit, limit).to(torch.int8), scales


def _percentile(counts: Tensor, low: float, high: float) -> Range:
    """Cut each side that has values, where only half of (100 - PERCENTILE) per cent, or all of it if one-sided, lies beyond."""
    bins = len(counts)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    total = counts.sum(dtype=torch.float64)
    beyond = total * (100 - PERCENTILE) / 100 / (2 if low < 0 < high else 1)
    from_left, from_right = counts.double().cumsum(0), counts.double().flip(0).cumsum(0)
    skip_left = int((from_left <= beyond).sum()) if low < 0 else 0
    skip_right = int((from_right <= beyond).sum()) if high > 0 else 0
    return min(float(edges[min(skip_left, bins - 1)]), 0.0), max(float(edges[max(bins - skip_right, 1)]), 0.0)


def _least_squares(counts: Tensor, low: float, high: float, levels: int) -> Range:
    centres = low + (torch.arange(len(counts), dtype=torch.float64) + 0.5) * (high - low) / len(counts)
    best, least = (low, high), float("inf")
    for step in range(_CANDIDATES, 0, -1):
        candidate = (low * step / _CANDIDATES, high * step / _CANDIDATES)
        scale, zero_point = choose_qparams(*candidate, levels)
        rounded = (torch.round(centres / scale) + zero_point).clamp(0, levels - 1)
        error = float((counts.double() * (scale * (rounded - zero_point) - centres) ** 2).sum())
        if error < least:
            best, least = candidate, error
    return best


def _least_divergence(counts: Tensor, low: float, high: float, levels: int) -> Range:
    """Clip at a bin of the histogram of magnitudes; a range with both signs has half of the integers on each side."""
    width = (high - low) / len(counts)
    centres = low + (torch.arange(len(counts), dtype=torch.float64) + 0.5) * width
    bins = max(1, math.ceil(max(-low, high) / width - 1e-9))
    places = (centres.abs() / width).long().clamp(max=bins - 1)
    magnitudes = torch.zeros(bins, dtype=torch.float64).index_add(0, places, counts.detach().cpu().double())
    steps = levels // 2 if low < 0 < high else levels
    clips = [*range(steps, bins, _STRIDE), bins]
    best = min(clips, key=lambda clip: _divergence(magnitudes, clip, steps))
    limit = max(-low, high) if best == bins else (best + 0.5) * width
    return max(low, -limit), min(high, limit)


def _divergence(counts: Tensor, clip: int, steps: int) -> float:
    """The divergence of the first `clip` bins, with the rest in the last of them, from what `steps` even levels leave of them."""
    inside = counts[:clip]
    wanted = inside.clone()
    wanted[-1] += counts[clip:].sum()
    level = torch.arange(clip) * steps // clip
    filled = (inside > 0).double()
    sums, members = (torch.zeros(steps, dtype=torch.float64).index_add(0, level, part) for part in (inside, filled))
    kept = filled * (sums / members.clamp(min=1))[level]
    wanted, kept = wanted / wanted.sum(), kept / kept.sum().clamp(min=1e-300)
    seen = wanted > 0
    return float((wanted[seen] * torch.log(wanted[seen] / kept[seen].clamp(min=_EMPTY / clip))).sum())
