"""Quantization-aware training of a prepared graph: quantizers stand in it while it is trained, and are read off and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from pared.graph.fold import read
from pared.quantize.activation_grid import LimitGrid, StepGrid
from pared.quantize.affine import Affine
from pared.quantize.placement import Placement
from pared.quantize.points import Point, Points, insert_quantizers
from pared.quantize.weight_grid import DoReFaGrid, FixedGrid
from pared.runtime import saturates

WeightIntegers = tuple[Tensor, Tensor]
"""int8 integers of the weight's shape, and float32 scales of shape (outputs,)."""

_HOLDER = "quantization_aware"


def train_quantized(
    graph: fx.GraphModule,
    placement: Placement,
    points: Points,
    activations: Mapping[Point, StepGrid | LimitGrid],
    rules: Mapping[str, FixedGrid | DoReFaGrid],
    train: Callable[[nn.Module], None],
) -> tuple[dict[Point, Affine], dict[str, WeightIntegers]]:
    """Train a prepared graph whose layers see rounded weights and rounded inputs (Jacob et al. 2018, 1712.05877, section 3).

    Batch norm is part of the layers already, its statistics frozen: what is trained is what is deployed. The parameters of `graph` are
    trained in place; the quantizers, among whose parameters steps and limits are, stand in it only meanwhile.

    Args:
        graph: from `prepare`.
        placement: for it.
        points: for the placement.
        activations: the quantizer of every point.
        rules: on the weights of layers, by the paths of the weights.
        train: trains a module in place.

    Returns:
        What the quantizers of activations became, and the integers and scales of the weights under rules.
    """
    holder = nn.Module()
    graph.add_module(_HOLDER, holder)
    ours: list[fx.Node] = []

    def call(module: nn.Module, name: str, value: fx.Node) -> fx.Node:
        holder.add_module(name, module)
        ours.append(graph.graph.call_module(f"{_HOLDER}.{name}", (value,)))
        return ours[-1]

    def create(value: fx.Node, point: Point) -> fx.Node:
        return call(activations[point], f"activation_{list(activations).index(point)}", value)

    insert_quantizers(graph, placement, points, create)
    for layer in placement.layers:
        source = layer.args[1]
        assert isinstance(source, fx.Node)
        if str(source.target) in rules:
            with graph.graph.inserting_before(layer):
                node = call(rules[str(source.target)], f"weight_{list(rules).index(str(source.target))}", source)
            layer.args = (layer.args[0], node, *layer.args[2:])
    graph.recompile()
    device = next((tensor.device for tensor in graph.parameters()), torch.device("cpu"))
    holder.to(device)
    train(graph)
    graph.eval()
    for node in reversed(ours):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.graph.erase_node(node)
    delattr(graph, _HOLDER)
    graph.recompile()
    weights = {path: rule.integers(read(graph, path).detach()) for path, rule in rules.items()}
    return {point: quantizer.affine() for point, quantizer in activations.items()}, weights


def weights_of(placement: Placement, bits: Mapping[fx.Node, int]) -> dict[str, int]:
    """The weights of the layers that compute on integers, by path, with their bits; of layers that share one those of the first."""
    found: dict[str, int] = {}
    for layer in placement.layers:
        source = layer.args[1]
        if layer in placement.consumers and isinstance(source, fx.Node):
            found.setdefault(str(source.target), bits[layer])
    return found


def weight_bits(reduce_range: bool | None) -> int:
    """The most bits of a weight: 7 where products of 8 saturate, by choice or because this processor's do."""
    return 7 if (saturates() if reduce_range is None else reduce_range) else 8
