"""AdaRound: learn for every weight whether to round it up or down."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.core.problems import Problems
from pared.quantize.row_rounding import better_rows, check_rows, round_to_nearest, spread

ZETA, GAMMA = 1.1, -0.1
"""How far the sigmoid is stretched beyond 1 and 0, so that it reaches them (the paper's)."""

_STRENGTH = 1.0
"""Of the regulariser. The paper's 0.01 is for errors in the weights' own units; of errors in steps it is too little: many shares end
between 0 and 1, and rounding these in the end costs up to three times the error."""

_WARM_UP = 0.2  # the share of the iterations without the regulariser
_FIRST_BETA, _LAST_BETA = 20.0, 2.0


def rectified_sigmoid(values: Tensor) -> Tensor:
    """A sigmoid stretched beyond 0 and 1, and cut off there: how much of a step is added to the weight that was rounded down.

    >>> rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.clamp(torch.sigmoid(values) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def regularizer(shares: Tensor, beta: float) -> Tensor:
    """Σ (1 - |2h - 1|^β): 0 where every share is 0 or 1; a large β leaves shares in the middle alone.

    >>> regularizer(torch.tensor([0.0, 0.5, 1.0]), 2.0)
    tensor(1.)
    """
    return (1 - (2 * shares - 1).abs().pow(beta)).sum()


def adaround(
    weight: Tensor, gram: Tensor, scales: Tensor, low: int, high: int, iterations: int = 1000, learning_rate: float = 0.03
) -> Tensor:
    """Round every weight up or down so that the layer's outputs on the calibration inputs change little (Nagel et al. 2020, 2004.10568).

    Learned are values V with q = clip(floor(w / s) + h(V)), where h is `rectified_sigmoid`; V starts where q = w / s. Adam minimises the
    squared error of the outputs plus `regularizer`, which comes in after a fifth of the iterations and whose β falls from 20 to 2
    (section 4.1). The error of the outputs over all samples is (w - q) G (w - q)ᵀ, so that only G is needed, and each
    iteration sees all samples; it is counted in squared steps and for a mean input of 1, so that neither the scale of the weights nor
    the number of samples shifts the balance. A row that doesn't come out better than rounding to nearest is rounded to nearest, so the
    error is never larger. Weights that are exactly 0 stay 0. Nothing is drawn at random.

    Args:
        weight: W, shape (…, rows, columns), one row for each output; the axes before are of matrices that don't depend on each other.
        gram: G = XᵀX of the layer's inputs, shape (…, columns, columns), any positive scale.
        scales: shape (…, rows), the step between two values, or (…, rows, columns), that of every weight.
        low: the smallest integer.
        high: the largest integer.
        iterations: of Adam. The paper takes 10,000 on small batches; with the error of all samples in each, 1000 do.
        learning_rate: of Adam; 0.03 lets V cross the sigmoid within a hundred iterations.

    Returns:
        int32 integers of the weight's shape; `integer * scale` are the new weights.

    Raises:
        SettingsError: for shapes that don't fit each other, or a number out of its range.

    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> adaround(torch.tensor([[0.4, 0.45]]), gram, torch.ones(1), -7, 7).tolist()
    [[0, 1]]
    """
    problems = Problems("quantize.adaround")
    check_rows(problems, weight, gram, scales, low, high)
    problems.number("iterations", iterations, low=0, integer=True)
    problems.number("learning_rate", learning_rate, above=0)
    problems.raise_if_any()
    plain = round_to_nearest(weight, scales, low, high)
    if not weight.numel():
        return plain
    steps = weight.detach().double() / spread(scales, weight).double()
    down, size = steps.floor(), gram.double().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    wanted, base, unit = steps.float(), down.float(), (gram.double() / torch.where(size > 0, size, torch.ones_like(size))).float()
    kept = weight != 0
    share = ((steps - down).float() - GAMMA) / (ZETA - GAMMA)
    values = torch.logit(share).requires_grad_()
    optimizer = torch.optim.Adam([values], lr=learning_rate)
    for iteration in range(iterations):
        with torch.enable_grad():
            shares = rectified_sigmoid(values) * kept
            change = (base + shares).clamp(low, high) - wanted
            loss = ((change @ unit) * change).sum()
            if (progress := iteration / iterations) >= _WARM_UP:
                beta = _FIRST_BETA + (_LAST_BETA - _FIRST_BETA) * (progress - _WARM_UP) / (1 - _WARM_UP)
                loss = loss + _STRENGTH * regularizer(shares, beta)
        (values.grad,) = torch.autograd.grad(loss, [values])
        optimizer.step()
    up = (rectified_sigmoid(values.detach()) >= 0.5) & kept
    learned = (down + up).clamp(low, high).to(torch.int32)
    return better_rows(weight, plain, learned, gram, scales)
