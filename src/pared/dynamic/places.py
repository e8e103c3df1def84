"""Where a network can be cut in two: places where one activation is all that the rest needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pared.core.errors import ModelError
from pared.graph import Captured
from pared.graph.counts import node_macs
from pared.graph.record import Shape, module_path, record

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """A place to cut: after the node number `index` only the value of `node` is still wanted.

    Attributes:
        index: position in the graph's list of nodes.
        node: whose value goes on.
        shape: of that value, with the batch first.
        share: of the network's MACs, done when the place is reached.
        path: the user's module that made the value.
    """

    index: int
    node: fx.Node
    shape: Shape
    share: float
    path: str


def find_places(captured: Captured) -> list[Place]:
    """All places, in order, before which and after which something is computed.

    A place is refused where the value isn't a batch of activations, where the rest overwrites it in place (the exit would lose it),
    or where both sides use the same parameter (the deployed file would hold it twice).

    Raises:
        ModelError: if the network's batch is fixed, or its inputs or outputs aren't single tensors.
    """
    nodes = list(captured.module.graph.nodes)
    batch = _check(captured, nodes)
    seen = record(captured)
    data = depends_on_data(nodes, batch)
    total = sum(node_macs(node, seen) for node in nodes)
    position = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users if user in data or user.op == "output"), default=-1) for node in data}
    parameters = _parameters(captured.module, nodes, data)
    places, done, before = [], 0, set[int]()
    for index, node in enumerate(nodes[:-1]):
        done += node_macs(node, seen)
        before |= parameters[index]
        waiting = [other for other in data if position[other] <= index < last_use[other]]
        if node not in data or node.op == "placeholder" or len(waiting) != 1 or not 0 < done < total:
            continue
        value, after = waiting[0], set[int]().union(*parameters[index + 1 :])
        if _is_batch(value, batch) and not before & after and not _is_overwritten(value, position, index):
            places.append(Place(index, value, Shape(seen[value]), done / total, path_of(value)))
    return places


def depends_on_data(nodes: list[fx.Node], batch: str) -> set[fx.Node]:
    """The nodes whose value depends on what the inputs hold, not just on how many samples there are.

    All others (parameters, masked weights, a batch size, a table of positions) can be computed anew in each part. A constant that the
    network writes into isn't one any more.
    """
    written = {_base(node.args[0]) for node in nodes if writes(node)}
    data: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or is_batch_size(node, batch):
            continue
        if node.op in ("placeholder", "output") or node in written or any(argument in data for argument in node.all_input_nodes):
            data.add(node)
    return {node for node in data if node.op != "output"}


def is_batch_size(node: fx.Node, batch: str) -> bool:
    """Whether the node asks an activation for the number of samples."""
    return node.target is aten.sym_size.int and bool(node.args[1] == 0) and str(node.meta.get("val")) == batch


def path_of(node: fx.Node) -> str:
    """The path of the user's module that made a node; where a rewritten graph has lost it, that of the module its weight belongs to."""
    if path := module_path(node):
        return path
    owners = [str(argument.target).rpartition(".")[0] for argument in node.all_input_nodes if argument.op == "get_attr"]
    return owners[0].partition(".parametrizations.")[0] if owners else ""


def batch_size(captured: Captured) -> str:
    """The symbol of the batch in a captured graph, or its number where it is fixed."""
    return _size(next(node for node in captured.module.graph.nodes if node.op == "placeholder"))


def _check(captured: Captured, nodes: list[fx.Node]) -> str:
    inputs = [node for node in nodes if node.op == "placeholder"]
    result = nodes[-1].args[0]
    if len(inputs) != len(captured.example_inputs) or not all(isinstance(node.meta.get("val"), Tensor) for node in inputs):
        raise ModelError("dynamic.exits: the network must take plain tensors, one after another, as its inputs.")
    if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), Tensor) or result.meta["val"].dim() != 2:
        raise ModelError("dynamic.exits: the network must return one tensor of shape (batch, classes).")
    batch = batch_size(captured)
    if not captured.dynamic or batch.isdigit():
        raise ModelError(
            "dynamic.exits: the network computes with a fixed batch size, so no sample could leave it. Take it from the input."
        )
    return batch


def _is_batch(node: fx.Node, batch: str) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point() and _size(node) == batch


def _size(node: fx.Node) -> str:
    return str(node.meta["val"].shape[0])


def _parameters(module: fx.GraphModule, nodes: list[fx.Node], data: set[fx.Node]) -> list[set[int]]:
    """The parameters each node of `data` reads, directly or through weights computed from them, by identity."""
    own = {id(parameter) for parameter in module.parameters()}
    reads: dict[fx.Node, set[int]] = {}
    for node in nodes:
        reads[node] = {id(fetch(module, str(node.target)))} & own if node.op == "get_attr" else set()
        reads[node] = reads[node].union(*(reads[argument] for argument in node.all_input_nodes if argument not in data))
    return [reads[node] if node in data else set() for node in nodes]


def fetch(module: torch.nn.Module, target: str) -> Any:
    """The parameter, buffer or module at a path."""
    *path, name = target.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, name)


def writes(node: fx.Node) -> bool:
    """Whether the node's operator changes a value in place."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(argument.alias_info is not None and not argument.alias_info.is_write for argument in node.target._schema.arguments)


def _base(value: Any) -> Any:
    """What a value is a view of."""
    while isinstance(value, fx.Node) and (_is_view(value) or writes(value)):
        value = value.args[0]
    return value


def _aliases(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    for user in node.users:
        if _is_view(user) and user.args[0] is node:
            yield from _aliases(user)


def _is_overwritten(value: fx.Node, position: dict[fx.Node, int], index: int) -> bool:
    users = [user for alias in _aliases(value) for user in alias.users if user.args and user.args[0] is alias]
    return any(writes(user) and position[user] > index for user in users)
