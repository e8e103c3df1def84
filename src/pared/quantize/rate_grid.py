"""Weights on a grid whose entries are charged for the bits that they cost in the packed file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from pared.codec import integers
from pared.core.layers import Layer, stored, weight_names
from pared.core.rules import WeightRule, add_rule
from pared.quantize.grid import scale_gradient
from pared.quantize.rate_cost import FEATURES, cost_of, plain_cost
from pared.quantize.weight_grid import scale_outputs

UNIT = 10.0
"""Levels in a unit of the parameter behind a weight. Adam moves a parameter by about the learning rate, so at the usual 0.001 a level
by 0.01, and a weight that is to leave 0 takes 50 steps."""

_QUICKER = 20.0
"""The same for the logarithm of a step: where levels shrink under the price, the step makes up for it, so it has to keep up."""


class RateGrid(WeightRule):
    """A weight rule: every entry is step · round(level). What is trained are the levels, and the step.

    The parameter behind the weight is the level, in units of `UNIT`: real numbers, rounded in the forward, while the gradient passes the
    rounding as if it weren't there. So Adam, which moves every number by about the learning rate, moves all layers by equal parts of their
    steps. What is trained of the step is its logarithm.

    Args:
        weight: of which the grid is to be; frozen weights have frozen steps.
        step: the distance of the grid's values, greater than 0: one number, or a tensor that broadcasts against the weight.
        kernel: width and area of a convolution's kernel, as the coding sees them; (0, 0) where there is none.

    >>> from pared.core.rules import add_rule
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight = nn.Parameter(torch.tensor([[0.9, -0.2]]))
    >>> add_rule(layer, "weight", RateGrid(layer.weight, 0.5))
    >>> layer.weight.tolist()
    [[1.0, 0.0]]
    """

    step: Tensor
    slope: Tensor
    coefficients: Tensor
    neighbours: Tensor
    bits: Tensor
    clock: Tensor
    control: Tensor

    def __init__(self, weight: Tensor, step: float | Tensor, kernel: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        kind, device = torch.promote_types(weight.dtype, torch.float32), weight.device
        self.growth = nn.Parameter(torch.zeros(1, dtype=kind, device=device), weight.requires_grad)
        self.register_buffer("step", torch.as_tensor(step).detach().to(kind).to(device).clone())
        # buffers, so that a checkpoint has all that a training needs to go on
        self.register_buffer("slope", torch.zeros_like(weight, dtype=kind, requires_grad=False))
        self.register_buffer("coefficients", torch.zeros(FEATURES, dtype=kind, device=device))
        self.register_buffer("neighbours", torch.tensor(kernel))
        self.register_buffer("bits", torch.zeros((), dtype=kind, device=device))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.register_buffer("control", torch.zeros(4, dtype=torch.float64))
        self.damping = 1 / math.sqrt(max(1, weight.numel()))

    def scale(self) -> Tensor:
        """The present step."""
        return self.step * torch.exp(_QUICKER * scale_gradient(self.growth, self.damping)).view([1] * self.step.dim())

    def forward(self, stored: Tensor) -> Tensor:
        """Return the weight on the grid; there is no -0 in it, which would cost bits."""
        return _OnGrid.apply(stored, self.scale().to(stored.dtype))  # pyright: ignore[reportReturnType]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Accept a new value for the weight."""
        return weight / (UNIT * self.scale().detach().to(weight.dtype))

    @torch.no_grad()
    def follow(self, layer: Layer, factor: Tensor) -> None:
        """Follow a weight whose outputs are multiplied by `factor`, shape (outputs,): the levels stay, and each output has its step."""
        step = self.scale().detach()
        moved = scale_outputs(layer, step.expand(layer.weight.shape), factor)
        is_tiny = moved.abs() < torch.finfo(step.dtype).tiny
        stored: Tensor = layer.parametrizations["weight"].original  # pyright: ignore
        stored[is_tiny] = 0
        moved = torch.where(is_tiny, step, moved)
        first = [slice(0, 1)] * (moved.dim() - 2)
        self.step = moved[(slice(None), slice(None) if isinstance(layer, _ConvTransposeNd) else slice(0, 1), *first)].clone()
        self.growth = nn.Parameter(torch.zeros_like(self.growth), self.growth.requires_grad)

    def at(self, weight: Tensor, step: Tensor) -> RateGrid:
        """The same grid for a smaller weight, with that step, and all that was learned about the price."""
        new = RateGrid(weight, step)
        for name in ("coefficients", "neighbours", "control"):
            getattr(new, name).copy_(getattr(self, name))
        return new

    @torch.no_grad()
    def refresh(self, stored: Tensor, *, contexts: bool = True) -> None:
        """Learn from the present weights what filling each place costs, what growing costs, and what all of it costs together."""
        magnitudes = levels_of(stored).abs().to(self.slope.dtype)
        if not contexts:
            cost = plain_cost(magnitudes)
        else:
            width, period = self.neighbours.tolist()
            cost = cost_of(magnitudes, self.coefficients, width, period)
        self.slope.copy_(torch.where(magnitudes < 1, cost.filling, cost.growing).view_as(self.slope))
        self.bits.copy_(cost.total)
        self.coefficients.copy_(cost.coefficients)

    @torch.no_grad()
    def look(self, stored: Tensor) -> None:
        """Find at which distance columns resemble each other, as the coding does where there is no kernel."""
        matrix = levels_of(stored)
        if not self.neighbours[1] and min(matrix.shape) > 1:
            self.neighbours[0] = integers.line(matrix.to(torch.int64).cpu().numpy())

    def charge(self, stored: Tensor) -> Tensor:
        """What the levels cost by the slopes found last, a scalar; near the levels of then right up to a constant."""
        return UNIT * torch.dot(self.slope.to(stored.dtype).flatten(), stored.abs().flatten())


def levels_of(stored: Tensor) -> Tensor:
    """The whole numbers of a parameter as the coding sees them: the first axis against all others, a vector as one row."""
    whole = (stored.detach() * UNIT).round()
    return whole.reshape(len(whole) if whole.dim() > 1 else 1, -1)


class Charged(NamedTuple):
    """A parameter on a rate grid.

    Attributes:
        rules: the parametrization that holds the levels and all rules on them, masks before the grid.
        grid: that rule.
    """

    rules: parametrize.ParametrizationList
    grid: RateGrid

    @property
    def stored(self) -> Tensor:
        """The parameter that the grid gets: zero where a mask before it holds it so."""
        stored: Tensor = self.rules.original  # pyright: ignore[reportAssignmentType]
        for rule in self.rules:
            if rule is self.grid:
                break
            stored = rule(stored)
        return stored


def rate_grids(model: nn.Module) -> Iterator[Charged]:
    """All rate grids of a model; what several layers share comes once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for rule in module:
                if isinstance(rule, RateGrid) and id(rule) not in seen:
                    seen.add(id(rule))
                    yield Charged(module, rule)


def set_grid(model: nn.Module, layer: Layer, name: str, step: float | Tensor) -> None:
    """Put a rate grid on the weight or bias of a layer, wherever the model reads it; nothing where there is nothing to put one on.

    Args:
        model: of the layer.
        layer: a convolution or linear layer.
        name: "weight" or "bias".
        step: of the grid, as a part of the root mean square of all entries that aren't zero, those of the weight where a bias has none.
    """
    parameter = stored(layer, name)
    if parameter is None or not parameter.numel():
        return
    value = getattr(layer, name).detach().clone()
    unit = _typical(value) or _typical(layer.weight) or 1.0
    rule = RateGrid(value.requires_grad_(parameter.requires_grad), step * unit, kernel_of(layer) if name == "weight" else (0, 0))
    level = rule.right_inverse(value.detach())
    for owner in list(model.modules()):
        if not isinstance(owner, parametrize.ParametrizationList):
            for own in [own for own in weight_names(owner) if stored(owner, own) is parameter]:
                add_rule(owner, own, rule)
    parameter.data = level  # once, however often it is read


def _typical(values: Tensor) -> float:
    wide = values.detach().double()
    return float((wide.square().sum() / wide.count_nonzero().clamp(min=1)).sqrt())


def kernel_of(layer: Layer) -> tuple[int, int]:
    """Width and area of a layer's kernel, as the coding takes them from the shape."""
    if layer.weight.dim() < 3:
        return 0, 0
    area = layer.weight.shape[2:].numel()
    return (layer.weight.shape[-1] if layer.weight.dim() > 3 else 1, area) if area > 1 else (0, 0)


class _OnGrid(torch.autograd.Function):
    """scale · round(level), with the gradient of scale · level: by hand, as it is done at every step on every weight."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, scale: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = (stored * UNIT).round_().mul_(scale).add_(0.0)
        ctx.save_for_backward(weight, scale)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, scale = ctx.saved_tensors
        if scale.dim() == 0:
            return gradient * (UNIT * scale), torch.dot(gradient.flatten(), weight.flatten()) / scale
        return gradient * (UNIT * scale), (gradient * weight / scale).sum_to_size(scale.shape)
