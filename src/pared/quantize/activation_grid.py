"""Quantizers of activations that are trained: a step (LSQ), or a limit (PACT, DoReFa). Ordinary modules that stand in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pared.quantize.affine import Affine
from pared.quantize.grid import LEAST_RATIO, Grid, clip_activation, fake_quantize, scale_gradient

LIMIT_DECAY = 1e-4
"""Of PACT: its share of the squared limit in the loss. The paper takes the weight decay of the network."""


class StepGrid(nn.Module):
    """Integers of few bits whose step is trained (LSQ, Esser et al. 2020, 1902.08153); the integer that stands for 0 is fixed.

    The parameter is the step as a part of what it begins with, as for weights: Adam moves it by a share. Its gradient is scaled so that
    plain SGD moves the step as LSQ does, with the entries of one sample for N (section 2.2).

    Args:
        start: where it begins.

    >>> grid = StepGrid(Affine(0.5, 0, 4))
    >>> grid(torch.tensor([[-1.0, 0.6, 9.0]])).tolist(), grid.affine()
    ([[0.0, 0.5, 1.5]], Affine(scale=0.5, zero_point=0, levels=4))
    """

    step: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, start: Affine) -> None:
        super().__init__()
        for name, value in (("step", start.scale), ("lowest", -start.zero_point), ("highest", start.levels - 1 - start.zero_point)):
            self.register_buffer(name, torch.tensor(float(value)))
        self.ratio = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest values on the grid; the first axis of `x` is the batch."""
        entries = max(x.numel() // max(len(x), 1), 1)
        highest = torch.maximum(self.highest, -self.lowest)
        damping = 1 / (torch.sqrt(entries * highest) * self.step.clamp(min=1e-12).square())
        ratio = scale_gradient(self.ratio, damping).clamp(min=LEAST_RATIO)
        return fake_quantize(x, Grid(self.step * ratio, self.lowest, self.highest))

    def affine(self) -> Affine:
        """What it is now."""
        scale = float(self.step * self.ratio.detach().clamp(min=LEAST_RATIO))
        return Affine(scale, -int(self.lowest), int(self.highest - self.lowest) + 1)


class LimitGrid(nn.Module):
    """Integers of few bits for values between 0 and a limit, which is trained (PACT, Choi et al. 2018, 1805.06085) or fixed.

    The fixed limit is DoReFa's (Zhou et al. 2016, 1606.06160, equation 11, where it is 1; here the network begins where it was). PACT adds
    the square of the limit to the loss: here its gradient is added in the backward pass, so that any loss goes. The parameter is the limit
    as a part of what it begins with, as with `StepGrid`.

    Args:
        start: where it begins; the integer 0 must stand for 0.
        bits: of the integers.
        learned: whether the limit is trained.

    >>> LimitGrid(Affine(1.0, 0, 4), 2, learned=True)(torch.tensor([-1.0, 1.2, 5.0])).tolist()
    [0.0, 1.0, 3.0]
    """

    start: Tensor

    def __init__(self, start: Affine, bits: int, *, learned: bool) -> None:
        super().__init__()
        if start.zero_point:
            raise ValueError("values below 0 have no place between 0 and a limit")
        self.bits = bits
        self.register_buffer("start", torch.tensor(start.scale * (start.levels - 1)))
        self.ratio = nn.Parameter(torch.ones(1), learned)

    def limit(self) -> Tensor:
        """The limit as it is now, shape (1,)."""
        return self.start * self.ratio.clamp(min=LEAST_RATIO)

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest of 2^bits values between 0 and the limit."""
        limit: Any = _Decayed.apply(self.limit()) if self.ratio.requires_grad else self.limit()
        return clip_activation(x, limit, self.bits)

    def affine(self) -> Affine:
        """What it is now."""
        return Affine(float(self.limit().detach()) / (2**self.bits - 1), 0, 2**self.bits)


class _Decayed(torch.autograd.Function):
    """The same values, whose gradient is that of the loss with `LIMIT_DECAY` times their squares added to it."""

    @staticmethod
    def forward(ctx: Any, limit: Tensor) -> Tensor:
        ctx.save_for_backward(limit)
        return limit.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (limit,) = ctx.saved_tensors
        return gradients[0] + 2 * LIMIT_DECAY * limit
