"""Run a captured graph on unlabelled inputs up to some operators, and look at what these read and give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from pared.core.errors import DataError, ModelError
from pared.graph.capture import Captured
from pared.training import Task
from pared.training.check import split_batch

Batches = list[tuple[Tensor, ...]]
View = Callable[[Tensor, Tensor], Any]
Key = TypeVar("Key", bound=Hashable)


def unlabelled(task: Task, samples: int, purpose: str) -> Batches:
    """The inputs of the first `samples` training samples, prepared and not augmented; a shuffled split gives the same ones each time.

    Raises:
        DataError: if the split is empty; `purpose` says what the samples were for.
    """
    batches: Batches = []
    found = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in task.train:
            inputs = split_batch(batch, "train")[0]
            parts = inputs if isinstance(inputs, tuple) else (inputs,)
            parts = tuple(part[: samples - found] for part in parts)
            if len(parts[0]):
                batches.append(task.prepare(parts))
                found += len(parts[0])
            if found >= samples:
                break
    if not batches:
        raise DataError(f"the train split has no samples: {purpose}.")
    return batches


def fitting(captured: Captured, batches: Batches) -> Batches:
    """The batches as the graph takes them: where it takes one size only, batches of that size; samples that fill none are left out.

    Raises:
        DataError: if there are fewer samples than the graph's batch has.
    """
    if captured.dynamic:
        return batches
    size = len(captured.example_inputs[0])
    joined = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    whole = len(joined[0]) // size * size
    if not whole:
        raise DataError(f"the model takes batches of {size} samples only, and there are {len(joined[0])}. Give more samples.")
    return list(zip(*(part[:whole].split(size) for part in joined), strict=True))


def isolated(captured: Captured, *shared: Tensor) -> Captured:
    """The graph over the same parameters and `shared` buffers, with copies of all others: a forward may write to buffers of its own."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*captured.module.parameters(), *shared)}
    return replace(captured, module=copy.deepcopy(captured.module, memo))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen operator by the names of its schema, defaults included; empty for anything else."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return {}
    found = {entry.name: entry.default_value for entry in schema.arguments}
    found.update(zip(found, node.args, strict=False))
    found.update(node.kwargs)
    return found


def levels(graph: fx.Graph, members: Mapping[fx.Node, Key]) -> list[list[Key]]:
    """Sort `members` so that whatever reads the result of another stands in a later level; nodes of one key go together.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.ReLU(), nn.Tanh())
    >>> graph = fx.symbolic_trace(model).graph
    >>> levels(graph, {node: str(node.target) for node in graph.nodes if node.op == "call_module"})
    [['0'], ['1']]
    """
    depth: dict[fx.Node, int] = {}
    level: dict[Key, int] = {}
    for node in graph.nodes:
        depth[node] = max((depth[source] for source in node.all_input_nodes), default=0)
        if node in members:
            level[members[node]] = max(level.get(members[node], 0), depth[node])
            depth[node] += 1
    return [[key for key, place in level.items() if place == number] for number in sorted(set(level.values()))]


class Prefix(fx.Interpreter):
    """The part of a captured graph that ends with the last of some operators.

    Args:
        module: from `capture`, or a copy of it.
        views: for each operator, what to keep of the (first) tensor that it reads and the one that it gives.
    """

    def __init__(self, module: fx.GraphModule, views: Mapping[fx.Node, View]) -> None:
        graph = fx.Graph()
        twins: dict[fx.Node, fx.Node] = {}
        left = set(views)
        for node in module.graph.nodes:
            twins[node] = graph.node_copy(node, twins.__getitem__)
            left.discard(node)
            if not left:
                break
        graph.output(None)
        super().__init__(module, graph=graph)
        self._views = {twins[node]: (node, view) for node, view in views.items()}
        self._seen: dict[fx.Node, Any] = {}

    def look(self, inputs: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
        """Run on one batch; gives what each view kept.

        Raises:
            ModelError: if the graph can't take this batch.
        """
        self._seen = {}
        try:
            with torch.no_grad():
                self.run(*(part.clone() for part in inputs))  # operators in place may write to an input
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(part.shape)) for part in inputs)
            raise ModelError(f"the model fails on inputs of shape {shapes}: {str(error).strip().splitlines()[0]}") from error
        return self._seen

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and show it to its view at once: what it read or gave may be overwritten later."""
        value = super().run_node(n)
        if n in self._views:
            node, view = self._views[n]
            self._seen[node] = view(self.env[n.all_input_nodes[0]], value)
        return value
