"""A rewritten network keeps torch's own layers: where its graph does what one call of a layer did, it calls that layer.

So a convolution is still an `nn.Conv2d` at its old path: later methods find it, mask it or replace it, and its statistics are its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from pared.graph.repair import Edits, repair_leaves
from pared.graph.rewritten import Rewritten

_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.PReLU,
)
_FORWARDS = {kind.forward for kind in _LAYERS}


@dataclass(frozen=True)
class _Call:
    """The nodes that one call of a layer left in a graph, the value it was given, and the value it gave."""

    path: str
    nodes: tuple[fx.Node, ...]
    given: fx.Node
    result: fx.Node


def rewritten_with_layers(
    own: nn.Module, parts: dict[str, Tensor | nn.Module], graphs: tuple[fx.Graph, fx.Graph], saved: set[str], edits: Edits
) -> Rewritten:
    """A `Rewritten` network whose graphs call the layers of `own` that they can call.

    Args:
        own: the user's module; its layers are copied, with the tensors of `parts`.
        parts: all tensors under the user's names.
        graphs: of eval and of training mode.
        saved: names that belong to the state_dict.
        edits: the literals that the cut changed; attributes of layers follow them.
    """
    graphs = (_copy(graphs[0]), _copy(graphs[1]))
    calls = [list(_calls(graph, own)) for graph in graphs]
    keeps_own_mode = _keep_own_mode(calls)
    paths = {call.path for call in (*calls[0], *calls[1])} - keeps_own_mode
    for graph, found in zip(graphs, calls, strict=True):
        made: dict[fx.Node, fx.Node] = {}
        for call in found:
            if call.path in paths:
                made[call.result] = _call_layer(graph, call, made.get(call.given, call.given))
        for node in reversed(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
    copies: dict[int, nn.Module] = {}
    layers = {
        path: copies.setdefault(id(module), copy.deepcopy(module))
        for path, module in own.named_modules(remove_duplicate=False)
        if path in paths
    }
    result = Rewritten({**layers, **parts}, *graphs, saved)
    repair_leaves(result, edits)
    return result


def _copy(source: fx.Graph) -> fx.Graph:
    graph = fx.Graph()
    graph.set_codegen(source._codegen)
    graph.output(graph.graph_copy(source, {}))
    return graph


def _calls(graph: fx.Graph, own: nn.Module) -> Iterable[_Call]:
    """Calls of torch's own layers. Every call has an innermost module of its own in the nodes' stacks."""
    scopes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        stack = [path for path in stack if ".parametrizations" not in path]  # masks belong to the layer whose weight they make
        if node.op == "call_function" and stack:
            scopes.setdefault(stack[-1], []).append(node)
    for scope, nodes in scopes.items():
        path = scope.split("@")[0]
        try:
            layer = own.get_submodule(path) if path else None
        except AttributeError:
            continue
        if layer is not None and _plain(layer) and (call := _call(path, nodes)) is not None:
            yield call


def _plain(layer: nn.Module) -> bool:
    """Whether the layer computes what torch's does, masks apart, and nothing more."""
    return type(layer).forward in _FORWARDS and not layer._forward_hooks and not layer._forward_pre_hooks


def _call(path: str, nodes: list[fx.Node]) -> _Call | None:
    inside = set(nodes)
    given = {
        node
        for inner in nodes
        for node in inner.all_input_nodes
        if node not in inside and not (node.op == "get_attr" and str(node.target).startswith(f"{path}."))
    }
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(given) != 1 or len(results) != 1:
        return None
    return _Call(path, tuple(nodes), given.pop(), results[0])


def _keep_own_mode(calls: list[list[_Call]]) -> set[str]:
    """Batch norms that don't change with the network's mode (frozen ones): their graph says so, a module's flag would not."""
    found: set[str] = set()
    for training, some in zip((False, True), calls, strict=True):
        for call in some:
            for node in call.nodes:
                if "batch_norm" in str(node.target) and bool(node.args[5]) != training:
                    found.add(call.path)
    return found


def _call_layer(graph: fx.Graph, call: _Call, given: fx.Node) -> fx.Node:
    """Put a call of the layer in the place of the nodes; a given value that another call made is that call's by now."""
    with graph.inserting_before(call.result):
        node = graph.call_module(call.path, (given,))
    node.meta = dict(call.result.meta)
    call.result.replace_all_uses_with(node)
    for inner in reversed(call.nodes):
        graph.erase_node(inner)
    return node
