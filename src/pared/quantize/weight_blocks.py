"""How the weight of a layer is laid out in blocks with a grid each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.core.layers import Layer

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class Blocks:
    """How a weight is divided: as one block, a block for each output, or blocks of consecutive entries of an output's row.

    Args:
        granularity: "tensor", "channel" or "group".
        group: entries of a block of "group"; the last of a row may be shorter.
        transposed: the groups of a transposed convolution, whose outputs aren't its first axis; 0 for all other layers.

    >>> weight, blocks = torch.arange(10.0).view(2, 5), Blocks("group", 3)
    >>> blocks.split(weight).tolist()
    [[[0.0, 1.0, 2.0], [3.0, 4.0, 0.0]], [[5.0, 6.0, 7.0], [8.0, 9.0, 0.0]]]
    >>> bool((blocks.join(blocks.split(weight), weight.shape) == weight).all())
    True
    """

    granularity: Granularity
    group: int = 0
    transposed: int = 0

    def split(self, weight: Tensor) -> Tensor:
        """The weight as a tensor of shape (outputs, blocks of an output, entries), or (1, 1, all); short blocks end in zeros."""
        if self.granularity == "tensor":
            return weight.reshape(1, 1, -1)
        rows = weight.flatten(1)
        if self.transposed:
            inputs, outputs, *kernel = weight.shape
            parts = weight.reshape(self.transposed, inputs // self.transposed, outputs, *kernel).transpose(1, 2)
            rows = parts.reshape(self.transposed * outputs, -1)
        if self.granularity == "channel":
            return rows[:, None]
        return functional.pad(rows, (0, -rows.shape[1] % self.group)).reshape(len(rows), -1, self.group)

    def join(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight of this shape that `split` made into `blocks`."""
        if self.granularity == "tensor":
            return blocks.reshape(shape)
        rows = blocks.flatten(1)
        if not self.transposed:
            return rows[:, : math.prod(shape[1:])].reshape(shape)
        inputs, outputs, *kernel = shape
        rows = rows[:, : inputs // self.transposed * math.prod(kernel)]
        parts = rows.reshape(self.transposed, outputs, inputs // self.transposed, *kernel)
        return parts.transpose(1, 2).reshape(shape)

    def sizes(self, weight: Tensor) -> Tensor:
        """How many entries of the weight each block has, shape (outputs, blocks of an output)."""
        return self.split(torch.ones_like(weight)).sum(-1)


def blocks_of(layer: Layer, granularity: Granularity, group: int) -> Blocks:
    """The division of a layer's weight.

    >>> blocks_of(nn.ConvTranspose2d(4, 2, 3, groups=2), "channel", 32)
    Blocks(granularity='channel', group=32, transposed=2)
    """
    transposed = layer.groups if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0
    return Blocks(granularity, group, transposed)
