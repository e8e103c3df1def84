"""Bring an ONNX model into one canonical form, so that the same network is always the same bytes and none of them are names."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes

from pared.runtime.pads import fold_pad

_ONES, _ZEROS = "ones", "zeros"
# what a missing attribute means where the operator's schema says so only in words
_WORDED_DEFAULTS = {"dilations": _ONES, "strides": _ONES, "pads": _ZEROS}
_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")


def canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` without metadata, dead and repeated parts, with short names and attributes in one order.

    Inputs are named input, input_1, …, outputs output, output_1, …, all else a, b, …, in the order of first appearance; a symbolic
    first axis is named batch. Means over all positions become GlobalAveragePool, which engines compute faster and also in int8, and
    zero padding becomes part of the convolution behind it.
    """
    graph = ir.from_proto(model)
    for node in list(graph.graph.all_nodes()):
        _global_average_pool(node)
        fold_pad(node)
    tidy = Sequential(
        passes.ClearMetadataAndDocStringPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(size_limit=2**31),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
    )
    tidy(graph)
    result = ir.to_proto(graph)
    result.producer_name, result.producer_version = "pared", ""
    result.graph.name = "pared"
    for part in (result.graph, *_subgraphs(result.graph)):
        del part.value_info[:]
        _drop_defaults(part, {entry.domain: entry.version for entry in result.opset_import})
    _rename(result.graph, {}, _short_names())
    _name_axes(result.graph)
    return result


def _global_average_pool(node: ir.Node) -> None:
    """Turn a ReduceMean with kept axes over all positions of an image (batch, channels, …) into GlobalAveragePool."""
    if node.op_type != "ReduceMean" or len(node.inputs) != 2 or node.inputs[0] is None or node.inputs[0].shape is None:
        return
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    keep = node.attributes.get("keepdims")
    rank = len(node.inputs[0].shape)
    if axes is None or rank < 3 or (keep is not None and keep.as_int() == 0):
        return
    if sorted(int(axis) % rank for axis in axes.numpy().reshape(-1)) != list(range(2, rank)):
        return
    pool = ir.node("GlobalAveragePool", [node.inputs[0]])
    pool.outputs[0].shape, pool.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    assert node.graph is not None
    node.graph.insert_before(node, pool)
    ir.convenience.replace_all_uses_with(node.outputs[0], pool.outputs[0], replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def _parts(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs among a node's attributes, such as the branches of an If."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for part in _parts(node):
            yield part
            yield from _subgraphs(part)


def _short_names() -> Iterator[str]:
    """Yield a … z, aa, ab, …, without the two words that name inputs and outputs."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            name = "".join(letters)
            if name not in ("input", "output"):
                yield name


def _rename(graph: onnx.GraphProto, outer: dict[str, str], names: Iterator[str]) -> None:
    """Rename the values and nodes of `graph` and its subgraphs in order of appearance; `outer` holds the names seen from outside."""
    known = dict(outer)
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for index, value in enumerate(values):
            if value.name not in known:
                known[value.name] = next(names) if outer else kind if index == 0 else f"{kind}_{index}"
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    used: dict[str, None] = {}
    for node in graph.node:
        parts = list(_parts(node))
        for name in (*node.input, *(name for part in parts for name in _names_read(part))):
            if name in initializers:
                used[name] = None
                known[name] = known.get(name) or next(names)
        for name in node.output:
            if name and name not in known:
                known[name] = next(names)
        node.input[:] = [known[name] if name else "" for name in node.input]
        node.output[:] = [known[name] if name else "" for name in node.output]
        node.name = node.output[0]
        for part in parts:
            part.name = node.name
            _rename(part, known, names)
    del graph.initializer[:]
    for name in (*used, *(name for name in initializers if name not in used)):
        known[name] = known.get(name) or next(names)
        graph.initializer.append(initializers[name])
        graph.initializer[-1].name = known[name]
    for value in (*graph.input, *graph.output):
        value.name = known[value.name]


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that the nodes of a graph and its subgraphs read, and that the graph gives out."""
    for part in (graph, *_subgraphs(graph)):
        for node in part.node:
            yield from node.input
        yield from (value.name for value in part.output)


def _drop_defaults(graph: onnx.GraphProto, versions: dict[str, int]) -> None:
    """Leave out attributes that say what the operator's schema says anyway, and sort the others by name."""
    for node in graph.node:
        try:
            schema = onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:  # an operator of another domain
            continue
        kept = [attribute for attribute in node.attribute if not _is_default(node, attribute, schema)]
        kept.sort(key=lambda attribute: attribute.name)
        del node.attribute[:]
        node.attribute.extend(kept)


def _is_default(node: onnx.NodeProto, attribute: onnx.AttributeProto, schema: onnx.defs.OpSchema) -> bool:
    if node.op_type in _WINDOWED and attribute.name in _WORDED_DEFAULTS:
        return all(entry == (1 if _WORDED_DEFAULTS[attribute.name] == _ONES else 0) for entry in attribute.ints)
    declared = schema.attributes.get(attribute.name)
    if declared is None or declared.required or not declared.default_value.name:
        return False
    return onnx.helper.get_attribute_value(declared.default_value) == onnx.helper.get_attribute_value(attribute)


def _name_axes(graph: onnx.GraphProto) -> None:
    """Name symbolic axes: that of the first input's first axis batch, others n, n_1, … in order of appearance."""
    known: dict[str, str] = {}
    for value in (*graph.input, *graph.output):
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.HasField("dim_param"):
                if size.dim_param not in known:
                    fresh = "batch" if axis == 0 and "batch" not in known.values() else f"n_{len(known)}"
                    known[size.dim_param] = fresh
                size.dim_param = known[size.dim_param]
