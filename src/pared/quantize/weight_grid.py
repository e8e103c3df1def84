"""Weight rules of k bits: a fixed grid, a grid whose step is learned, and DoReFa's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.core.errors import SettingsError
from pared.core.layers import Layer, join_weight, readers, split_weight
from pared.core.rules import Mask, WeightRule, add_rule, find_rule
from pared.quantize.grid import LEAST_RATIO, Grid, dorefa_integers, fake_quantize, integers, scale_gradient
from pared.quantize.weight_blocks import Blocks


class FixedGrid(WeightRule):
    """A weight rule: each block of the weight lies on a grid of its own, which stays as it is.

    Args:
        grid: of every block, shape (outputs, blocks of an output, 1).
        blocks: how the weight is divided.

    >>> from pared.quantize.grid import find_grid
    >>> layer, blocks = nn.Linear(3, 2), Blocks("channel")
    >>> add_rule(layer, "weight", FixedGrid(find_grid(blocks.split(layer.weight), 2), blocks))
    >>> len(layer.weight[0].unique()) <= 3
    True
    """

    step: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, grid: Grid, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks
        for name, part in grid._asdict().items():
            self.register_buffer(name, part.detach().clone())

    def grid(self) -> Grid:
        """The grid as it is now."""
        return Grid(self.step, self.lowest, self.highest)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the nearest weight on the grid."""
        return self.blocks.join(fake_quantize(self.blocks.split(weight), self.grid()), weight.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Accept a new value for the weight: what is trained is the weight before rounding."""
        return weight

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The int8 integers of a weight's nearest values on the grid, and the step of every output; of blocks that are whole outputs."""
        grid = self.grid()
        found = self.blocks.join(integers(self.blocks.split(weight), grid), weight.shape)
        steps = grid.step.detach().to(torch.float32).flatten().expand(len(weight) if self.blocks.granularity == "tensor" else -1)
        return found.detach().to(torch.int8), steps.clone()

    def follow(self, layer: Layer, factor: Tensor) -> None:
        """Follow a weight whose outputs are multiplied by `factor`, shape (outputs,): the integers stay what they are.

        A step may become negative. Where it would be 0 it stays, since all integers there become 0.
        """
        if self.blocks.granularity == "tensor":
            self.blocks = Blocks("channel", 0, self.blocks.transposed)
        step = self.grid().step.detach()
        moved = step * factor.to(step.dtype)[:, None, None]
        moved = torch.where(moved.abs() < torch.finfo(step.dtype).tiny, step, moved)
        self._begin_at(moved)
        self.lowest, self.highest = (part.expand_as(moved).clone() for part in (self.lowest, self.highest))

    def _begin_at(self, step: Tensor) -> None:
        self.step = step


class LearnedGrid(FixedGrid):
    """A grid whose steps are trained together with the weights (LSQ, Esser et al. 2020, 1902.08153).

    The parameter of a block is its step as a part of the step that it began with, so that Adam, which moves every number by about the
    learning rate, moves it by that share. Its gradient is scaled so that plain SGD moves the step as LSQ does: by the learning rate
    times the gradient over sqrt(entries · highest) (section 2.2). It is flat, since training plans apply no weight decay to what has
    a single axis.

    Args:
        grid: where it begins.
        blocks: how the weight is divided.
        weight: that it is for; frozen weights have frozen steps.
    """

    ratio: Tensor
    damping: Tensor

    def __init__(self, grid: Grid, blocks: Blocks, weight: Tensor) -> None:
        super().__init__(grid, blocks)
        kind = torch.promote_types(weight.dtype, torch.float32)
        self.ratio = nn.Parameter(torch.ones(grid.step.numel(), dtype=kind, device=weight.device), weight.requires_grad)
        counts = blocks.sizes(weight.detach()).to(kind).reshape(-1) * self.highest.to(kind).reshape(-1).clamp(min=1)
        start = self.step.to(kind).reshape(-1).clamp(min=1e-12)
        self.register_buffer("damping", 1 / (counts.sqrt() * start.square()))

    def grid(self) -> Grid:
        """The grid as it is now."""
        ratio = scale_gradient(self.ratio, self.damping).clamp(min=LEAST_RATIO)
        return Grid((self.step.to(ratio.dtype) * ratio.view(self.step.shape)).to(self.step.dtype), self.lowest, self.highest)

    def _begin_at(self, step: Tensor) -> None:
        change = self.grid().step.detach() / step
        damping = (self.damping.view(self.step.shape) * change.to(self.damping.dtype).square()).expand_as(step)
        super()._begin_at(step)
        self.ratio = nn.Parameter(torch.ones(step.numel(), dtype=self.ratio.dtype, device=step.device), self.ratio.requires_grad)
        self.damping = damping.reshape(-1).clone()


class DoReFaGrid(WeightRule):
    """DoReFa's weights (Zhou et al. 2016, 1606.06160, equation 9), times the largest weight of the beginning.

    The factor isn't in the paper, which has batch norm behind every layer, to which it makes no difference; with it a network begins
    near to where it was.

    Args:
        bits: of the weight.
        weight: of which the factor is taken.
    """

    step: Tensor

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("step", weight.detach().abs().max() / (2**bits - 1))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on the grid of odd multiples of a step."""
        return dorefa_integers(weight, self.bits) * self.step

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Accept a new value for the weight: what is trained is the weight before rounding."""
        return weight

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The int8 integers of a weight, odd ones, and the step of every output; of at most 7 bits."""
        return dorefa_integers(weight.detach(), self.bits).to(torch.int8), self.step.to(torch.float32).repeat(len(weight))

    def follow(self, layer: Layer, factor: Tensor) -> None:
        """Follow a weight whose outputs are multiplied by `factor`, shape (outputs,); the weight before rounding stays."""
        self.step = scale_outputs(layer, self.step.expand(layer.weight.shape), factor)


def scale_outputs(layer: Layer, tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply a tensor of the shape of the layer's weight by a number for each output.

    >>> scale_outputs(nn.Linear(1, 2), torch.ones(2, 1), torch.tensor([2.0, 3.0])).tolist()
    [[2.0], [3.0]]
    """
    split = split_weight(layer, tensor)
    return join_weight(layer, split * factor.to(tensor.dtype).view(*split.shape[:2], 1, 1))


def set_rule(model: nn.Module, layer: Layer, rule: WeightRule, path: str) -> None:
    """Put a rule on the weight wherever the model reads it.

    A mask that stands before it is put behind it once more where the grid has no 0, because it would fill up what is masked.

    Raises:
        SettingsError: for DoReFa's rule on a weight that several layers share: each would round it once more when it is baked.
    """
    places = readers(model, layer)
    if isinstance(rule, DoReFaGrid) and len(places) > 1:
        raise SettingsError(
            f"quantize.bits: {path}.weight is shared by several layers, which dorefa can't keep. Use lsq, or leave: [{path}]."
        )
    for _, owner, name in places:
        mask = find_rule(owner, name, Mask)
        add_rule(owner, name, rule)
        if mask is not None and isinstance(rule, DoReFaGrid):
            add_rule(owner, name, mask)
