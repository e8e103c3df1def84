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
    """Run the graph on `inputs` (default: its example) and return the `Shape`, number or list seen at each node.

    The run happens on a copy of the inputs and, where the graph writes to buffers, of the module: nothing of the user's changes.
    """
    inputs = captured.example_inputs if inputs is None else inputs
    module = copy.deepcopy(captured.module)
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    twins = dict(zip(module.graph.nodes, captured.module.graph.nodes, strict=True))
    return {twins[node]: value for node, value in recorder.seen.items()}


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
