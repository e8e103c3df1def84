"""Decide what runs in int8, and at which values of a graph the quantizers stand."""

from __future__ import annotations

import enum
import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pared.graph.fold import CONVOLUTIONS, TRANSPOSED, argument, packet, read, readers
from pared.quantize.preparation import MAX_POOLS, alias_family, rank, tensor_arguments, writes_in_place

aten = torch.ops.aten


class Kind(enum.Enum):
    """How an operator gets along with int8."""

    LAYER = "an int8 weight and int8 inputs"
    PRODUCT = "a product of two int8 activations"
    WEIGHT_ONLY = "an int8 weight, computed in float: no engine has the integer kernel"
    ARITHMETIC = "has an integer kernel with a range of its own"
    PASSING = "passes integers on as they are"
    SPLIT = "passes integers on as a list"
    CLIP = "part of the operator before it: the range of the integers does it"
    OTHER = "float"


_PRODUCTS = frozenset({aten.matmul, aten.bmm, aten.mm})
_BINARY = frozenset({aten.add, aten.mul})
_UNARY = frozenset(
    {aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d}
    | {aten.mean, aten.sigmoid, aten.leaky_relu}
)
_CLIPS = frozenset({aten.relu, aten.relu6, aten.hardtanh})
_PASSING = MAX_POOLS | frozenset(
    {aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.transpose, aten.permute, aten.squeeze, aten.unsqueeze, aten.slice}
    | {aten.contiguous, aten.dropout, aten.detach, aten.alias, aten.clone, aten.pixel_shuffle, aten.channel_shuffle, aten.select}
)
_PADS = frozenset({aten.pad, aten.constant_pad_nd})
_SPLITS = frozenset({aten.chunk, aten.split, aten.split_with_sizes})
_INSIDE = (Kind.ARITHMETIC, Kind.PASSING, Kind.SPLIT, Kind.CLIP)


@dataclass(frozen=True)
class Placement:
    """What runs in int8.

    Attributes:
        layers: nodes with a weight to store as int8, and the axis of its output channels.
        quantized: values that get a quantizer, each with the value whose range it uses.
        produced: those of them that int8 operators produce; every reader takes their quantized form.
        consumers: int8 operators; of a value from a float operator only these take the quantized form.
    """

    layers: dict[fx.Node, int]
    quantized: dict[fx.Node, fx.Node]
    produced: frozenset[fx.Node]
    consumers: frozenset[fx.Node]


def place_quantizers(module: fx.GraphModule, skip: Collection[str] = ()) -> Placement:
    """Place quantizers on a prepared graph.

    Layers (convolutions, linear layers, matrix products) always run in int8. An operator of another kind joins them if it stands
    between them, so that no float operator is left in between: some input comes from a layer, and its output goes to one.
    A convolution's output is always quantized, since integer kernels need it; that of a linear layer only if an int8 operator reads it.

    Args:
        module: from `prepare`.
        skip: module paths whose layers stay float.
    """
    nodes = list(module.graph.nodes)
    kinds = _kinds(module, skip)
    inside = _between_layers(nodes, kinds)
    core = {node for node in nodes if kinds[node] in (Kind.LAYER, Kind.PRODUCT)}
    hosts = core | {node for node in inside if kinds[node] is Kind.ARITHMETIC}
    clips = [node for node in nodes if kinds[node] is Kind.CLIP and node.args[0] in hosts and len(node.args[0].users) == 1]
    clipped = {node.args[0]: node for node in clips}
    absorbed = set(clipped.values())
    wanted: set[fx.Node] = set()
    for node in nodes:
        if node in core or (node in inside and node not in absorbed):
            wanted.update(part for part in _inputs(node, kinds[node]) if kinds.get(part) is not Kind.SPLIT)
        if (node in core and packet(node) in CONVOLUTIONS) or (node in inside and node not in absorbed and kinds[node] is not Kind.SPLIT):
            wanted.add(clipped.get(node, node))
    root: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in wanted:
            passes = node in inside and kinds[node] is Kind.PASSING
            root[node] = root[_passed_on(node, kinds)] if passes else node
    makers = core | inside | absorbed
    layers = {node: 1 if packet(node) in TRANSPOSED else 0 for node in nodes if kinds[node] in (Kind.LAYER, Kind.WEIGHT_ONLY)}
    return Placement(layers, root, frozenset(set(root) & makers), frozenset(core | (inside - absorbed)))


def _between_layers(nodes: list[fx.Node], kinds: dict[fx.Node, Kind]) -> set[fx.Node]:
    core = (Kind.LAYER, Kind.PRODUCT)
    supplied: set[fx.Node] = set()
    for node in nodes:
        if kinds[node] in core or (kinds[node] in _INSIDE and any(part in supplied for part in _inputs(node, kinds[node]))):
            supplied.add(node)
    demanded: set[fx.Node] = set()
    for node in reversed(nodes):
        for user in node.users:
            if node in _inputs(user, kinds[user]) and (kinds[user] in core or (kinds[user] in _INSIDE and user in demanded)):
                demanded.add(node)
    return {node for node in nodes if kinds[node] in _INSIDE and node in supplied and node in demanded}


def _kinds(module: fx.GraphModule, skip: Collection[str]) -> dict[fx.Node, Kind]:
    kinds: dict[fx.Node, Kind] = {}
    written = {member for node in module.graph.nodes if writes_in_place(node) for member in alias_family(node)}
    for node in module.graph.nodes:
        kind = _kind(node)
        if kind in (Kind.LAYER, Kind.WEIGHT_ONLY) and not _has_own_weight(module, node, skip):
            kind = Kind.OTHER
        if node in written or any(part in written for part in _inputs(node, kind)):
            # a value that is overwritten later can't be replaced by its quantized form
            kind = Kind.WEIGHT_ONLY if kind is Kind.LAYER else Kind.OTHER
        kinds[node] = kind
    return kinds


def _kind(node: fx.Node) -> Kind:
    target = packet(node)
    if target in CONVOLUTIONS or target is aten.linear:
        return Kind.LAYER
    if target in TRANSPOSED:
        return Kind.WEIGHT_ONLY
    if target in _PRODUCTS:
        return Kind.PRODUCT if _are_activations(node.args[:2]) and all((rank(part) or 2) >= 2 for part in node.args[:2]) else Kind.OTHER
    if target in _BINARY:
        return Kind.ARITHMETIC if not node.kwargs and _are_activations(node.args[:2]) else Kind.OTHER
    if target is aten.cat:
        parts = node.args[0]
        return Kind.ARITHMETIC if isinstance(parts, list | tuple) and _are_activations(parts) else Kind.OTHER
    if (target is aten.mean and not argument(node, 2, False)) or (target is aten.hardtanh and argument(node, 1, -1.0) != 0):
        return Kind.OTHER  # engines have an integer kernel for global average pools only, and fuse no clip that starts below 0
    if target in _PADS and (argument(node, 2, "constant") not in ("constant", 0) or argument(node, 3, 0) not in (0, None)):
        return Kind.OTHER  # only what is padded with zeros stays on its grid
    for kind, targets in ((Kind.ARITHMETIC, _UNARY), (Kind.CLIP, _CLIPS), (Kind.PASSING, _PASSING | _PADS), (Kind.SPLIT, _SPLITS)):
        if target in targets:
            return kind if _are_activations(node.args[:1]) else Kind.OTHER
    if node.op == "call_function" and node.target is operator.getitem:
        return Kind.PASSING if packet(node.args[0]) in _SPLITS else Kind.OTHER  # type: ignore[arg-type]
    return Kind.OTHER


def _are_activations(parts: Any) -> bool:
    """Whether all parts are float32 values that are computed, not parameters."""
    for part in parts:
        if not isinstance(part, fx.Node) or part.op == "get_attr":
            return False
        value = part.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
            return False
    return True


def _has_own_weight(module: fx.GraphModule, node: fx.Node, skip: Collection[str]) -> bool:
    """Whether the weight is a float32 parameter that only layers with the same output axis read, and isn't skipped."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or node.kwargs or not _are_activations(node.args[:1]):
        return False
    path = str(weight.target)
    tensor = read(module, path)
    if tensor.dtype != torch.float32 or any(path.startswith(f"{name}.") for name in skip):
        return False
    alike = TRANSPOSED if packet(node) in TRANSPOSED else CONVOLUTIONS | {aten.linear}
    return all(packet(reader) in alike and _reads_as_weight(module, reader, tensor) for reader in readers(module, tensor))


def _reads_as_weight(module: fx.GraphModule, reader: fx.Node, tensor: torch.Tensor) -> bool:
    sources = [part for part in reader.all_input_nodes if part.op == "get_attr" and read(module, str(part.target)) is tensor]
    return sources == [reader.args[1]] and reader.args[1] not in (reader.args[0], argument(reader, 2))


def _inputs(node: fx.Node, kind: Kind) -> list[fx.Node]:
    """The values that an int8 operator takes as integers."""
    if kind is Kind.OTHER or kind is Kind.WEIGHT_ONLY:
        return []
    if kind is Kind.PRODUCT or packet(node) in _BINARY or packet(node) is aten.cat:
        return list(tensor_arguments(node))
    return [part for part in node.args[:1] if isinstance(part, fx.Node)]


def _passed_on(node: fx.Node, kinds: dict[fx.Node, Kind]) -> fx.Node:
    source: Any = node.args[0]
    return source.args[0] if kinds[source] is Kind.SPLIT else source
