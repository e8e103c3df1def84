"""Regions that `torch.export` keeps as graphs of their own (autocast, no_grad) become part of the graph around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

AUTOCAST, GRADIENTS = "wrap_with_autocast", "wrap_with_set_grad_enabled"
MARKS = (_enter_autocast, _exit_autocast)


def inline_regions(module: fx.GraphModule) -> None:
    """Put the nodes of every region in place of its call, in place.

    An autocast region stays one between two marks. What a region without gradients returns is detached, which is the same to
    whoever reads it.
    """
    while calls := [node for node in module.graph.nodes if getattr(node.target, "__name__", "") in (AUTOCAST, GRADIENTS)]:
        for call in calls:
            _inline(module, call)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users and isinstance(getattr(module, str(node.target), None), fx.GraphModule):
            module.graph.erase_node(node)
            delattr(module, str(node.target))


def _inline(module: fx.GraphModule, call: fx.Node) -> None:
    autocast = getattr(call.target, "__name__", "") == AUTOCAST
    source: Any = call.args[4 if autocast else 1]
    region, inputs = getattr(module, str(source.target)), call.args[5 if autocast else 2 :]
    with module.graph.inserting_before(call):
        mark = _marked(module.graph, _enter_autocast, call.args[:4]) if autocast else None
        twins: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for node in region.graph.nodes:
            if node.op == "get_attr":
                setattr(module, name := _free(module, str(node.target)), getattr(region, str(node.target)))
                twins[node] = module.graph.get_attr(name)
                twins[node].meta = dict(node.meta)
            elif node.op == "call_function":
                twins[node] = module.graph.node_copy(node, lambda old: twins[old])
        results: Any = fx.map_arg(next(node for node in region.graph.nodes if node.op == "output").args[0], lambda old: twins[old])
        if mark is not None:
            _marked(module.graph, _exit_autocast, (mark,))
        elif call.args[0] is False:
            results = fx.map_arg(results, lambda node: _detached(module.graph, node))
    for user in list(call.users):  # each takes one of the results
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(call)


def _marked(graph: fx.Graph, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
    node = graph.call_function(target, arguments)
    node.meta["val"] = None  # the same as every node that was captured: what it returns
    return node


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return node
    twin = graph.call_function(torch.ops.aten.detach.default, (node,))
    twin.meta = dict(node.meta)
    return twin


def _free(module: fx.GraphModule, name: str) -> str:
    """A name that the module doesn't use yet."""
    free, number = name, 0
    while hasattr(module, free):
        number += 1
        free = f"{name}_{number}"
    return free
