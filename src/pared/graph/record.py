"""Run a captured graph once and note the shape or value at every node."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from pared.graph.capture import Captured, Inputs


class Shape(tuple[int, ...]):
    """The shape of a tensor; a type of its own, so that it can't be mistaken for a tuple of outputs or of integers."""

    __slots__ = ()


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = abstract(value)
        return value


def abstract(value: Any) -> Any:
    """Replace every tensor of a nested value by its `Shape`."""
    if isinstance(value, Tensor):
        return Shape(value.shape)
    if isinstance(value, list | tuple):
        return [abstract(entry) for entry in value]
    return value


def record(captured: Captured, inputs: Inputs | None = None) -> dict[fx.Node, Any]:
    """The `Shape`, number or list seen at each node when the graph runs on `inputs` (default: its example).

    What `torch.export` noted for its example is taken where it is whole. Else the graph runs, on a copy of the inputs and of the module:
    nothing of the user's changes.
    """
    if inputs is None and (noted := _noted(captured.module.graph)) is not None:
        return noted
    inputs = captured.example_inputs if inputs is None else inputs
    module = copy.deepcopy(captured.module)
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    twins = dict(zip(module.graph.nodes, captured.module.graph.nodes, strict=True))
    return {twins[node]: value for node, value in recorder.seen.items()}


def _noted(graph: fx.Graph) -> dict[fx.Node, Any] | None:
    """What the capture noted of its example at each node; None if a number is known only when the graph runs."""
    seen: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            seen[node] = _returned(node.args[0], seen)
        elif "val" not in node.meta:
            return None
        else:
            try:
                seen[node] = _concrete(node.meta["val"])
            except ValueError:
                return None
    return seen


def _returned(value: Any, seen: dict[fx.Node, Any]) -> Any:
    """The arguments of an output node, nested as they are."""
    if isinstance(value, list | tuple):
        return [_returned(entry, seen) for entry in value]
    return seen[value] if isinstance(value, fx.Node) else value


def _concrete(value: Any) -> Any:
    """As `abstract`, with the example's number in place of every symbol."""
    if isinstance(value, Shape):
        return value
    if isinstance(value, Tensor):
        return Shape(_concrete(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return [_concrete(entry) for entry in value]
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        if not value.node.has_hint():
            raise ValueError("a symbol without an example")
        return value.node.hint
    return value


def module_path(node: fx.Node) -> str:
    """The path of the innermost user module whose forward made this node ("" is the model itself).

    A rewritten graph calls no modules; there, an operator belongs to the module whose weight it reads.
    """
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path).split("@")[0] for path, _ in stack.values() if not str(path).startswith("_empty_nn_module_stack")]
    if paths and paths[-1]:
        return paths[-1]
    weights = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    return weights[0].rpartition(".")[0] if weights else ""
