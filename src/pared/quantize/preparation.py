"""Exact rewritings that bring a captured graph into the form that integer kernels exist for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from pared.graph.fold import argument, fold_batch_norm, packet, rebuilt

aten = torch.ops.aten

MAX_POOLS = frozenset({aten.max_pool1d, aten.max_pool2d, aten.max_pool3d})
ALIASES = frozenset(
    {aten.view, aten.view_as, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.expand, aten.expand_as}
    | {aten.transpose, aten.permute, aten.movedim, aten.t, aten.numpy_T, aten.slice, aten.select, aten.narrow, aten.unfold}
    | {aten.chunk, aten.split, aten.split_with_sizes, aten.unbind, aten.detach, aten.alias, aten.contiguous}
    | {aten.dropout, aten.feature_dropout, aten.alpha_dropout}  # these return their input in eval mode
)
"""Operators whose result may share the memory of their input."""


def prepare(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy that computes the same in eval mode, with operators that don't write in place, and batch norm folded.

    Further, means over all positions keep their axes (a global average pool), a relu after a max-pool moves before it (both are
    monotone, so they commute) where it becomes part of the layer, and linear layers on more than two axes become matrix products.
    """
    module = fold_batch_norm(module)
    _write_out_of_place(module)
    for node in list(module.graph.nodes):
        if packet(node) is aten.mean:
            _keep_axes(module.graph, node)
        elif packet(node) is aten.relu:
            _swap_with_pool(module.graph, node)
        elif packet(node) is aten.linear:
            _as_matrix_product(module.graph, node)
    return rebuilt(module)


def rank(node: Any) -> int | None:
    """The number of axes of a node's value, as far as the capture told."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None


def writes_in_place(node: fx.Node) -> bool:
    """Whether an operator changes its first argument."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def alias_family(node: fx.Node) -> set[fx.Node]:
    """All nodes whose value may share memory with that of `node`, itself among them."""
    root = node
    while _is_alias(root) and isinstance(root.args[0], fx.Node):
        root = root.args[0]
    family, open_ends = {root}, [root]
    while open_ends:
        for user in open_ends.pop().users:
            if (_is_alias(user) or writes_in_place(user)) and user not in family:
                family.add(user)
                open_ends.append(user)
    return family


def _is_alias(node: fx.Node) -> bool:
    return packet(node) in ALIASES or getattr(node.target, "__name__", "") == "getitem" or writes_in_place(node)


def _write_out_of_place(module: fx.GraphModule) -> None:
    """Replace in-place operators (relu_, add_) by their twins where no other view of the same memory is read afterwards."""
    graph = module.graph
    for node in list(graph.nodes):
        twin = _twin(node)
        if twin is None:
            continue
        target = node.args[0]
        position = {other: index for index, other in enumerate(graph.nodes)}
        others = alias_family(target) - {target, node}
        if any(position[user] > position[node] for other in others if position[other] < position[node] for user in other.users):
            continue
        if any(other.op in ("placeholder", "get_attr") for other in alias_family(target)):
            continue  # writes into the caller's tensor or a buffer
        node.target = twin
        for user in [user for user in target.users if position[user] > position[node]]:
            user.replace_input_with(target, node)


def _twin(node: fx.Node) -> Any:
    """The operator without the write, such as aten.relu.default for aten.relu_.default."""
    operator = packet(node)
    if operator is None or not writes_in_place(node) or not operator.__name__.endswith("_") or not isinstance(node.args[0], fx.Node):
        return None
    return getattr(getattr(aten, operator.__name__.removesuffix("_"), None), getattr(node.target, "_overloadname", ""), None)


def _keep_axes(graph: fx.Graph, node: fx.Node) -> None:
    axes, dims = argument(node, 1), rank(node.args[0])
    if axes is None or dims is None or dims < 3 or argument(node, 2, False) or node.kwargs:
        return
    if sorted(axis % dims for axis in axes) != list(range(2, dims)):
        return
    with graph.inserting_after(node):
        flat = graph.call_function(aten.flatten.using_ints, (node, 1))
    node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)
    flat.meta = dict(node.meta)
    node.args = (node.args[0], axes, True)
    node.meta.pop("val", None)


def _swap_with_pool(graph: fx.Graph, relu: fx.Node) -> None:
    pool: Any = relu.args[0]
    if packet(pool) not in MAX_POOLS or len(pool.users) != 1:
        return
    before = pool.args[0]
    if len(before.users) != 1:
        return
    with graph.inserting_before(pool):
        moved = graph.call_function(aten.relu.default, (before,))
    moved.meta = dict(before.meta)
    pool.replace_input_with(before, moved)
    relu.replace_all_uses_with(pool)
    graph.erase_node(relu)


def _as_matrix_product(graph: fx.Graph, node: fx.Node) -> None:
    """linear(x) = view(linear(flatten(x))): an integer kernel with a bias exists for matrices only."""
    x: Any = node.args[0]
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() < 3:
        return
    with graph.inserting_before(node):
        flat = graph.call_function(aten.flatten.using_ints, (x, 0, value.dim() - 2))
        # at most one size may be left to infer, so further symbolic ones are read at run time
        sizes = [-1, *(_size(graph, x, axis, size) for axis, size in enumerate(value.shape[:-1]) if axis > 0)]
    out = node.meta["val"].shape[-1]
    with graph.inserting_after(node):
        shaped = graph.call_function(aten.reshape.default, (node, [*sizes, int(out)]))
    node.replace_all_uses_with(shaped, delete_user_cb=lambda user: user is not shaped)
    shaped.meta = dict(node.meta)
    node.replace_input_with(x, flat)
    node.meta.pop("val", None)


def _size(graph: fx.Graph, x: fx.Node, axis: int, size: Any) -> Any:
    return size if isinstance(size, int) else graph.call_function(aten.sym_size.int, (x, axis))


def tensor_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes in the first two arguments of a call, those inside a list among them."""
    for entry in node.args[:2]:
        for part in entry if isinstance(entry, list | tuple) else [entry]:
            if isinstance(part, fx.Node):
                yield part
