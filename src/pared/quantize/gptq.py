"""GPTQ: round the columns of a weight matrix one by one, and let those to come make up for the error."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.core.problems import Problems
from pared.quantize.row_rounding import better_rows, check_rows, round_to_nearest, spread


def gptq(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    low: int,
    high: int,
    damping: float = 0.01,
    block: int = 128,
    by_activation: bool = True,
) -> Tensor:
    """Round a weight matrix so that the layer's outputs on the calibration inputs change little (Frantar et al. 2023, 2210.17323).

    The columns are rounded in turn. The error of one, w - q, is divided by the diagonal of the inverse of the damped G and moved to
    the columns that come later along the row of that inverse (section 3, equations 2 and 3), all by its Cholesky factor (algorithm 1).
    A row that doesn't come out better than rounding to nearest is rounded to nearest, so the error trace((W - Q) G (W - Q)ᵀ) is never
    larger. Weights that are exactly 0 stay 0: a pruned network stays pruned. A column whose input is always 0 is rounded to nearest.

    Args:
        weight: W, shape (…, rows, columns), one row for each output; the axes before are of matrices that don't depend on each other.
        gram: G = XᵀX of the layer's inputs, shape (…, columns, columns), any positive scale.
        scales: shape (…, rows), the step between two values, or (…, rows, columns), that of every weight.
        low: the smallest integer.
        high: the largest integer.
        damping: added to the diagonal of `gram`, as a share of its mean; greater than 0. 0.01 is the paper's.
        block: columns after which the ones to come are brought up to date; it changes the speed only. 128 is the paper's.
        by_activation: round the columns with the largest inputs first, while most others are left to make up for them, instead of in
            the order in which they stand.

    Returns:
        int32 integers of the weight's shape; `integer * scale` are the new weights.

    Raises:
        SettingsError: for shapes that don't fit each other, or a number out of its range.
        torch.linalg.LinAlgError: if the damped `gram` isn't positive definite.

    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> weight, scale = torch.tensor([[0.4, 0.4]]), torch.ones(1)
    >>> gptq(weight, gram, scale, -7, 7).tolist(), round_to_nearest(weight, scale, -7, 7).tolist()
    ([[0, 1]], [[0, 0]])
    """
    problems = Problems("quantize.gptq")
    check_rows(problems, weight, gram, scales, low, high)
    problems.number("damping", damping, above=0)
    problems.number("block", block, low=1, integer=True)
    problems.raise_if_any()
    plain = round_to_nearest(weight, scales, low, high)
    if not weight.numel():
        return plain
    exact, dense = gram.double(), weight.detach().double()
    diagonal = exact.diagonal(dim1=-2, dim2=-1)
    columns = torch.arange(weight.shape[-1], device=weight.device).expand_as(diagonal)
    order = diagonal.argsort(dim=-1, descending=True, stable=True) if by_activation else columns
    damped = _damped(exact, damping).take_along_dim(order[..., :, None], -2).take_along_dim(order[..., None, :], -1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse).mT  # row j: what the columns from j on do when those before are settled
    steps = spread(scales, weight).double().expand(weight.shape).take_along_dim(order[..., None, :], -1)
    rounded = _sweep(dense.take_along_dim(order[..., None, :], -1), factor, steps, (low, high), block)
    return better_rows(weight, plain, rounded.take_along_dim(order.argsort(-1)[..., None, :], -1), exact, scales)


def _damped(gram: Tensor, damping: float) -> Tensor:
    """The diagonal a little larger, and 1 where all inputs were always zero."""
    more = damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(gram.shape[:-1])
    dead = gram.diagonal(dim1=-2, dim2=-1) + more == 0
    return gram + torch.diag_embed(more + dead.to(gram.dtype))


def _sweep(weight: Tensor, factor: Tensor, scales: Tensor, limits: tuple[int, int], block: int) -> Tensor:
    left, columns, kept = weight.clone(), weight.shape[-1], weight != 0
    rounded = torch.zeros_like(weight)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros_like(left[..., start:stop])
        for at in range(start, stop):
            rounded[..., at] = torch.round(left[..., at] / scales[..., at]).clamp(*limits) * kept[..., at]
            errors[..., at - start] = (left[..., at] - rounded[..., at] * scales[..., at]) / factor[..., at, at, None]
            left[..., at:stop] -= errors[..., at - start, None] * factor[..., at, None, at:stop]
        left[..., stop:] -= errors @ factor[..., start:stop, stop:]
    return rounded.to(torch.int32)
