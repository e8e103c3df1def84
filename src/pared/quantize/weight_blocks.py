"""How the weight of a layer is laid out in blocks with a grid each, and which layers have such weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.core.errors import SettingsError
from pared.core.layers import Layer, stored, weight_names
from pared.core.problems import Problems

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


def quantizable(model: nn.Module, leave: tuple[str, ...], where: str, *rules: type[nn.Module]) -> dict[str, Layer]:
    """The convolutions and linear layers of `model` by path, without those in `leave`; a shared weight is listed once, an empty one not.

    Args:
        model: any module.
        leave: paths of modules that are left out, with all that is inside them.
        where: the method, for messages.
        rules: kinds of rules besides masks that may be on weights.

    Raises:
        SettingsError: for an unknown path in `leave`, no layer at all, or a weight that is computed from other parameters.

    >>> list(quantizable(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ("2",), "quantize.bits"))
    ['0']
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    problems = Problems(where)
    for path in leave:
        problems.check(path in paths and path != "", "leave", "the path of a module of the model", path)
    problems.raise_if_any()
    seen = {id(stored(owner, name, *rules)) for path in leave for owner in paths[path].modules() for name in weight_names(owner)}
    layers: dict[str, Layer] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, Layer) or any(path == name or path.startswith(f"{name}.") for name in leave):
            continue
        parameter = stored(layer, "weight", *rules)
        if parameter is None:
            raise SettingsError(
                f"{where}: {path}.weight is computed from other parameters (weight_norm, or quantization already) and can't be "
                f"quantized. Take that off first (pared.bake, or torch's remove_parametrizations), or add it to leave: [{path}]."
            )
        if id(parameter) not in seen and parameter.numel():
            seen.add(id(parameter))
            layers[path] = layer
    if not layers:
        raise SettingsError(f"{where}: {type(model).__name__} has no convolution or linear layer to quantize.")
    return layers
