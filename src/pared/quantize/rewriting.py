"""Rewrite a prepared graph: quantizers at the placed values, int8 weights under the user's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.graph.fold import argument, packet, place, read, readers, rebuilt
from pared.quantize.affine import ACTIVATION_LEVELS, Affine, quantize_weight
from pared.quantize.placement import Placement
from pared.quantize.points import Point, Points, insert_quantizers
from pared.runtime import qdq as qdq  # registers torch.ops.pared

aten = torch.ops.aten

_LARGEST_BIAS = 2.0**30


def rewrite(
    module: fx.GraphModule,
    placement: Placement,
    points: Points,
    affines: Mapping[Point, Affine],
    bits: Mapping[fx.Node, int],
    trained: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> fx.GraphModule:
    """Put integers into `module` (which is used up) and return the result.

    Weights become int8 buffers under their old names with `…_scale` beside them; activation ranges become scales and zero points in
    `quantizers`. A linear layer whose output stays float also gets an integer bias, else engines wouldn't compute it in int8.

    Args:
        module: from `prepare`.
        placement: for this module.
        points: for this placement.
        affines: of every point.
        bits: of the weights of the placement's layers.
        trained: integers and scales of weights that are known already, by the paths of the weights.
    """
    writer = _Writer(module, trained or {})
    made = insert_quantizers(module, placement, points, lambda value, point: writer.quantize(value, point, affines[point]))
    for layer, axis in placement.layers.items():
        computes = layer in placement.consumers
        input_scale = affines[made[layer.args[0]]].scale if computes else None  # type: ignore[index]
        writer.quantize_weight(layer, axis, bits[layer], input_scale)
        if input_scale is not None:
            writer.quantize_bias(layer, input_scale, stored=packet(layer) is aten.linear and not _is_quantized(layer, placement))
    return rebuilt(module)


def _is_quantized(layer: fx.Node, placement: Placement) -> bool:
    """Whether a quantizer stands at a layer's output, or behind the clip that is part of it."""
    if layer in placement.quantized:
        return True
    users = list(layer.users)
    return len(users) == 1 and users[0] in placement.quantized and users[0] in placement.produced and users[0] not in placement.consumers


class _Writer:
    """Adds buffers and nodes to a graph."""

    def __init__(self, module: fx.GraphModule, trained: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.module, self.graph, self.trained = module, module.graph, trained
        self.scales: dict[str, str] = {}  # of the weights that are int8 already
        self.parameters: dict[Point, tuple[fx.Node, fx.Node]] = {}
        self.start = next(iter(module.graph.nodes))

    def buffer(self, path: str, value: Tensor) -> fx.Node:
        """Register a buffer and return a node that reads it."""
        place(self.module, path, value)
        with self.graph.inserting_before(self.start):
            return self.graph.get_attr(path)

    def quantize(self, value: fx.Node, point: Point, affine: Affine) -> fx.Node:
        """A node that reads `value` quantized with the parameters of a point."""
        if point not in self.parameters:
            path = _free(self.module, f"quantizers.{point[0].name}")
            self.parameters[point] = (
                self.buffer(f"{path}.scale", torch.tensor(affine.scale, dtype=torch.float32)),
                self.buffer(f"{path}.zero_point", torch.tensor(affine.zero_point, dtype=torch.uint8)),
            )
        arguments = (
            (value, *self.parameters[point])
            if affine.levels == ACTIVATION_LEVELS
            else (value, *self.parameters[point], 0, affine.levels - 1)
        )
        return self.graph.call_function(torch.ops.pared.quantize_dequantize.default, arguments)

    def quantize_weight(self, layer: fx.Node, axis: int, bits: int, input_scale: float | None) -> None:
        """Store the weight of `layer` as int8 and dequantize it in the graph."""
        source: Any = layer.args[1]
        path = str(source.target)
        weight = read(self.module, path)
        if weight.dtype != torch.int8:
            least = None if input_scale is None else self._least_scale(layer, input_scale)
            if path in self.trained:
                integers, scale = _at_least(*self.trained[path], least)
            else:
                integers, scale = quantize_weight(weight, axis, bits, least)
            scale_path = _free(self.module, f"{path}_scale")
            for name in _names(self.module, weight):
                place(self.module, name, integers)
                self.scales[name] = scale_path
            self.buffer(scale_path, scale)
        with self.graph.inserting_before(layer):
            scale_node = self.graph.get_attr(self.scales[path])
            node = self.graph.call_function(torch.ops.pared.dequantize.default, (source, scale_node, None, axis))
        layer.args = (layer.args[0], node, *layer.args[2:])

    def quantize_bias(self, layer: fx.Node, input_scale: float, *, stored: bool) -> None:
        """Round the bias of `layer` to whole multiples of input_scale * weight_scale (1712.05877, section 2.4).

        The engine does it in any case, with weights of few bits by a lot, so the module has to. `stored`: as int32; else it stays float.
        """
        source: Any = argument(layer, 2)
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return
        bias, weight_node = read(self.module, str(source.target)), layer.args[1]
        assert isinstance(weight_node, fx.Node)
        scale = read(self.module, str(weight_node.args[1].target)) * torch.tensor(input_scale, dtype=torch.float32)  # type: ignore[union-attr]
        integers = torch.round(bias.detach().double() / scale.double())
        if not stored:
            rounded = nn.Parameter((integers * scale.double()).to(bias.dtype), bias.requires_grad)
            several = len(readers(self.module, bias)) > 1  # each reader has steps of its own
            path = _free(self.module, str(source.target)) if several else str(source.target)
            if several:
                layer.args = (*layer.args[:2], self.buffer(path, rounded), *layer.args[3:])
            else:
                place(self.module, path, rounded)
            return
        integers = integers.to(torch.int32)
        shared = len(source.users) > 1
        path = _free(self.module, str(source.target)) if shared else str(source.target)
        integer_node = self.buffer(path, integers)
        scale_node = self.buffer(_free(self.module, f"{path}_scale"), scale)
        with self.graph.inserting_before(layer):
            node = self.graph.call_function(torch.ops.pared.dequantize.default, (integer_node, scale_node, None, 0))
        layer.args = (*layer.args[:2], node, *layer.args[3:])

    def _least_scale(self, layer: fx.Node, input_scale: float) -> Tensor | None:
        """Weight scales below this would make the integer bias overflow 32 bits."""
        source = argument(layer, 2)
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return None
        return read(self.module, str(source.target)).detach().abs() / (input_scale * _LARGEST_BIAS)


def _at_least(integers: Tensor, scales: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same weights with scales that aren't smaller than `least`."""
    if least is None or not bool((scales < least).any()):
        return integers, scales
    larger = torch.maximum(scales, least)
    ratio = (scales / larger).reshape(-1, *[1] * (integers.dim() - 1))
    return torch.round(integers * ratio).to(torch.int8), larger


def _names(module: nn.Module, tensor: Tensor) -> list[str]:
    return [name for name, other in module.named_parameters(remove_duplicate=False) if other is tensor] or [
        name for name, other in module.named_buffers(remove_duplicate=False) if other is tensor
    ]


def _free(module: nn.Module, path: str) -> str:
    """`path`, with a number behind it if something is there already."""
    number, name = 2, path
    while _exists(module, name):
        name, number = f"{path}_{number}", number + 1
    return name


def _exists(module: nn.Module, path: str) -> bool:
    holder: Any = module
    for part in path.split("."):
        if not hasattr(holder, part):
            return False
        holder = getattr(holder, part)
    return True
