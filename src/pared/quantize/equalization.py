"""Cross-layer equalisation: move scale from one layer to the next, channel by channel, so that both have even ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from pared.core.layers import Layer, join_weight, split_weight
from pared.graph.capture import capture
from pared.graph.fold import CONVOLUTIONS, TRANSPOSED, argument, packet, readers
from pared.graph.fold_layers import fold_layers, layer_of

aten = torch.ops.aten

LAYERS = frozenset({aten.linear, *CONVOLUTIONS, *TRANSPOSED})
POINTWISE = frozenset({aten.relu, aten.relu_, aten.leaky_relu, aten.leaky_relu_, aten.prelu, aten.alias, aten.detach, aten.contiguous})
"""Positively homogeneous: f(s x) = s f(x) for s > 0, number by number."""
POOLS = frozenset(
    {aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d}
    | {aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d}
)
"""Positively homogeneous, channel by channel; channels stand on the second axis."""

_SWEEPS = 50
_SETTLED = 1e-3


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers of which the second alone reads the first, with nothing but positively homogeneous operators between them.

    Attributes:
        first: the layer before.
        second: the layer behind.
        spread: inputs of the second for each output of the first: the positions of a flattened image, else 1.
    """

    first: Layer
    second: Layer
    spread: int


def equalizing_scales(first: Tensor, second: Tensor) -> Tensor:
    """What each channel is divided by in the first layer and multiplied by in the second: s = √(r₁ r₂) / r₂ (1906.04721, equation 11).

    Afterwards both have the range √(r₁ r₂) in every channel. A channel that is zero in one of the layers stays as it is.

    Args:
        first: r₁, the largest weight of each output channel of the first layer, shape (channels,).
        second: r₂, that of each input channel of the second.

    >>> equalizing_scales(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 2.0]))
    tensor([2., 1.])
    """
    used = (first > 0) & (second > 0)
    ones = torch.ones_like(first)
    return torch.where(used, (torch.where(used, first, ones) / torch.where(used, second, ones)).sqrt(), ones)


def equalize(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> nn.Module:
    """Return a copy of `model` with even ranges of weights across layers and the same outputs (Nagel et al. 2019, 1906.04721, section 4.1).

    Batch norms are folded into the layers first. A pair is equalised where nothing but ReLU, leaky ReLU, PReLU, pools and a flattening
    stands between the two, no other operator reads the first, and neither weight is shared. Pairs that form a chain are gone through
    until nothing moves any more. It helps where one scale serves a whole layer, or where some inputs of a layer are far larger.

    Args:
        model: any module.
        example_inputs: a tensor or a tuple of positional inputs.

    Raises:
        ModelError: if the model can't run on the example inputs.
        CaptureError: if `torch.export` can't follow the forward.

    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[4.0], [1.0]])), model[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
    >>> even = equalize(model, torch.zeros(2, 1))
    >>> even[0].weight.flatten().tolist(), even[2].weight.flatten().tolist()
    ([2.0, 1.0], [2.0, 1.0])
    """
    result = fold_layers(model, example_inputs)
    pairs = list(_pairs(capture(result, example_inputs).module, result))
    for _ in range(_SWEEPS):
        if max((_equalize(pair) for pair in pairs), default=0.0) < _SETTLED:
            break
    return result


def _pairs(graph: fx.GraphModule, model: nn.Module) -> Iterator[Pair]:
    for node in graph.graph.nodes:
        if packet(node) in LAYERS and (first := _own(graph, model, node)) is not None:
            reader, spread = _reader(node)
            second = None if reader is None else _own(graph, model, reader)
            if second is not None:
                yield Pair(first, second, spread)


def _own(graph: fx.GraphModule, model: nn.Module, node: fx.Node) -> Layer | None:
    """The layer behind an operator, if no other operator reads its weight or bias."""
    layer = layer_of(graph, model, node)
    if layer is None:
        return None
    tensors = [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
    return layer if all(len(readers(graph, tensor)) == 1 for tensor in tensors) else None


def _reader(node: fx.Node) -> tuple[fx.Node | None, int]:
    """The layer that alone reads a layer's outputs through homogeneous operators, and how many inputs it has for each channel."""
    rank, spread = len(_shape(node)), 1
    axis = rank - 1 if packet(node) is aten.linear else 1
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if argument(reader, 0) is not node:
            return None, 1
        kind, rank = packet(reader), len(_shape(node))
        if kind in LAYERS:
            expected = rank - 1 if kind is aten.linear else 1
            return (reader, spread) if axis == expected and (kind is aten.linear or rank > 2) else (None, 1)
        if kind in (aten.flatten, aten.view, aten.reshape):
            before, after = _shape(node), _shape(reader)
            if axis != 1 or len(after) != 2 or after[1] != math.prod(before[1:]):
                return None, 1
            spread *= math.prod(before[2:])
        elif not (kind in POINTWISE or (kind in POOLS and axis == 1 and rank > 2) or _does_nothing(reader)):
            return None, 1
        node = reader
    return None, 1


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _does_nothing(node: fx.Node) -> bool:
    return packet(node) in (aten.dropout, aten.dropout_, aten.feature_dropout) and argument(node, 2) is False


def _equalize(pair: Pair) -> float:
    """Equalise one pair; returns how far its scales are from 1, as the largest |ln s|."""
    scales = equalizing_scales(*_ranges(pair.first, pair.second, pair.spread))
    if not scales.numel():
        return 0.0
    with torch.no_grad():
        groups = pair.first.groups if isinstance(pair.first, _ConvNd) else 1
        rows = split_weight(pair.first, pair.first.weight).double() / scales.view(groups, -1, 1, 1)
        pair.first.weight.copy_(join_weight(pair.first, rows))
        if pair.first.bias is not None:
            pair.first.bias.copy_(pair.first.bias.double() / scales)
        groups = pair.second.groups if isinstance(pair.second, _ConvNd) else 1
        columns = split_weight(pair.second, pair.second.weight).double()
        pair.second.weight.copy_(join_weight(pair.second, columns * scales.repeat_interleave(pair.spread).view(groups, 1, -1, 1)))
    return float(scales.log().abs().max())


def _ranges(first: Layer, second: Layer, spread: int) -> tuple[Tensor, Tensor]:
    """The largest weight of each channel between two layers: of the first's outputs and of the second's inputs."""
    outputs = split_weight(first, first.weight.detach()).double().abs().flatten(2)
    inputs = split_weight(second, second.weight.detach()).double().abs().transpose(1, 2).flatten(2)
    if not outputs.numel() or not inputs.numel():
        return outputs.new_ones(0), outputs.new_ones(0)
    return outputs.amax(2).flatten(), inputs.amax(2).flatten().unflatten(0, (-1, spread)).amax(1)
