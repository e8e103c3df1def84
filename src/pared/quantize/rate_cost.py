"""What a matrix of whole numbers costs the adaptive coding of a packed file, in bits, and what one more entry would cost."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FEATURES = 7
"""What is known about a place: a constant, row, column, left and right, above and below, the lines of pixels around, the next channels."""

_RIDGE = 1e-2
_LONGEST_STEP = 2.0
_LARGEST_LOGIT = 14.0


class Cost(NamedTuple):
    """What a matrix costs.

    Attributes:
        filling: bits that each entry costs for not being zero (or would cost), its sign and its magnitude of 1 included; shape (rows,
            columns), never negative.
        growing: bits that each further unit of a magnitude costs, a scalar.
        total: bits of the whole matrix, a scalar.
        coefficients: of the model of which places are filled, shape (FEATURES,), to begin with next time.
    """

    filling: Tensor
    growing: Tensor
    total: Tensor
    coefficients: Tensor


def cost_of(magnitudes: Tensor, coefficients: Tensor, width: int = 0, period: int = 0, *, steps: int = 2) -> Cost:
    """Fit a model of the coding to a matrix of whole numbers, and read the costs from it.

    The coding (FORMAT.md, section 8) asks of every place whether it is zero, and mixes what rows, columns and neighbours say; here a
    logistic model says it, whose coefficients are fitted by Newton's method. A place is seen given all others, not only those before it:
    then, as in Besag's pseudo-likelihood (1974), the log-odds of a place are what the cost of the matrix changes by when it is filled.
    A sign costs one bit; magnitudes are geometric.

    Args:
        magnitudes: shape (rows, columns), whole numbers of at least 0, as floats.
        coefficients: from the last time, or zeros, shape (FEATURES,).
        width: columns of a line of pixels, where rows are flattened pictures or kernels; 0: none.
        period: columns of a channel; 0: none.
        steps: of Newton's method; 0 keeps the coefficients. 2 are enough where the matrix changed little since the last time.

    A place in a full row costs less to fill than one in an empty row:

    >>> rows = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
    >>> cost = cost_of(rows, torch.zeros(FEATURES), steps=20)
    >>> bool(cost.filling[0, 3] < cost.filling[1, 3])
    True
    """
    filled = (magnitudes > 0).to(magnitudes.dtype)
    features = features_of(filled, width, period).flatten(1)
    target = filled.flatten()
    for _ in range(steps):
        coefficients = _newton(features, target, coefficients)
    logits = _logits(features, coefficients)
    count, total = filled.sum(), magnitudes.sum()
    more = (total - count + 0.5) / (total + 1)  # the share of units beyond the first
    last, growing = -torch.log2(1 - more), -torch.log2(more)
    filling = (1 + last - logits / math.log(2)).clamp(min=0).view_as(filled)
    places = (functional.softplus(logits) - target * logits).sum() / math.log(2)
    return Cost(filling, growing, places + count * (1 + last) + (total - count) * growing, coefficients)


def plain_cost(magnitudes: Tensor) -> Cost:
    """The costs without any context: every place is filled with the same probability."""
    filled = (magnitudes > 0).to(magnitudes.dtype)
    coefficients = filled.new_zeros(FEATURES)
    coefficients[0] = torch.log((filled.sum() + 0.5) / (filled.numel() - filled.sum() + 0.5))
    return cost_of(magnitudes, coefficients, steps=0)


def features_of(filled: Tensor, width: int = 0, period: int = 0) -> Tensor:
    """What is known about each place from all others, shape (FEATURES, rows, columns).

    1; the log-odds of the rest of the row, and of the rest of the column; how many of the places left and right, and of those above and
    below, are filled; of the six on the lines of pixels before and after; of the two of the channels before and after.

    Args:
        filled: shape (rows, columns), 1 where an entry isn't zero, else 0.
        width: as in `cost_of`.
        period: as in `cost_of`.
    """
    rows, columns = filled.shape
    parts = torch.zeros(FEATURES, rows, columns, dtype=filled.dtype, device=filled.device)
    parts[0] = 1
    if min(rows, columns) > 1:  # the rest of the only line gives away the place that is left out
        parts[1] = _log_odds(filled, 1)
        parts[2] = _log_odds(filled, 0)
    parts[3, :, 1:] += filled[:, :-1]
    parts[3, :, :-1] += filled[:, 1:]
    parts[4, 1:] += filled[:-1]
    parts[4, :-1] += filled[1:]
    if 0 < width < columns:
        beside = filled + parts[3]
        parts[5, :, width:] += beside[:, :-width]
        parts[5, :, :-width] += beside[:, width:]
    if 0 < period < columns:
        parts[6, :, period:] += filled[:, :-period]
        parts[6, :, :-period] += filled[:, period:]
    return parts


def _log_odds(filled: Tensor, axis: int) -> Tensor:
    """Of the others on a line, only two different values: for a filled place there is one filled less."""
    count, places = filled.sum(axis, keepdim=True), filled.shape[axis]
    empty = places - count
    of_empty = torch.log((count + 0.5) / (empty - 1 + 0.5).clamp(min=0.5))
    of_filled = torch.log((count - 1 + 0.5).clamp(min=0.5) / (empty + 0.5))
    return torch.where(filled > 0, of_filled, of_empty)


def _logits(features: Tensor, coefficients: Tensor) -> Tensor:
    return (coefficients @ features).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)


def _newton(features: Tensor, target: Tensor, coefficients: Tensor) -> Tensor:
    expected = torch.sigmoid(_logits(features, coefficients))
    slope = features @ (target - expected) - _RIDGE * coefficients
    curvature = (features * (expected * (1 - expected))) @ features.T
    ridge = _RIDGE * torch.eye(FEATURES, dtype=features.dtype, device=features.device)
    step = torch.linalg.solve((curvature + ridge).double(), slope.double()).to(features.dtype)
    return coefficients + step.clamp(-_LONGEST_STEP, _LONGEST_STEP)
