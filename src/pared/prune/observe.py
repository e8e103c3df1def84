"""Run a captured graph up to some operators, and look at what these read and give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from pared.core.errors import DataError, ModelError
from pared.graph.capture import Captured
from pared.training.samples import Inputs

See = Callable[[fx.Node, tuple[Any, ...], Any], None]
Key = TypeVar("Key", bound=Hashable)


def fitting(captured: Captured, batches: Inputs) -> Inputs:
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


def operator_name(node: fx.Node) -> str:
    """The name of the ATen operator that a node calls, such as "conv2d"; "" for other nodes."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


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


class Watch(fx.Interpreter):
    """The part of a captured graph that ends with the last of some nodes, and a look at each of them.

    Buffers are copied when they are first read, since a forward may write to its own.

    Args:
        module: from `capture`, or a copy of it.
        nodes: of its graph.
        see: called with a node, its arguments and its value as soon as that is computed: what it read or gave may be overwritten later.

    >>> module = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Tanh()))
    >>> node = list(module.graph.nodes)[1]
    >>> Watch(module, [node], lambda node, arguments, value: print(node, arguments, value)).look((torch.tensor([-1.0, 2.0]),))
    _0 (tensor([-1.,  2.]),) tensor([0., 2.])
    """

    def __init__(self, module: fx.GraphModule, nodes: Iterable[fx.Node], see: See) -> None:
        graph = fx.Graph()
        twins: dict[fx.Node, fx.Node] = {}
        left, watched = set(nodes), set[fx.Node]()
        for node in module.graph.nodes:
            if not left:
                break
            twins[node] = graph.node_copy(node, twins.__getitem__)
            if node in left:
                left.discard(node)
                watched.add(node)
        graph.output(None)
        super().__init__(module, graph=graph)
        self._watched = {twins[node]: node for node in watched}
        self._see = see
        self._buffers: dict[int, Tensor] = {}

    def look(self, inputs: tuple[Tensor, ...]) -> None:
        """Run on one batch.

        Raises:
            ModelError: if the graph can't take this batch.
        """
        try:
            with torch.no_grad():
                self.run(*(part.clone() for part in inputs))  # operators in place may write to an input
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(part.shape)) for part in inputs)
            raise ModelError(f"the model fails on inputs of shape {shapes}: {str(error).strip().splitlines()[0]}") from error

    def fetch_attr(self, target: str) -> Any:
        """A parameter or module as it is, any other tensor as a copy that stays."""
        value = super().fetch_attr(target)
        if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
            return value
        return self._buffers.setdefault(id(value), value.clone())

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, and show it."""
        if n not in self._watched:
            return super().run_node(n)
        arguments = self.fetch_args_kwargs_from_env(n)[0]
        value = super().run_node(n)
        self._see(self._watched[n], arguments, value)
        return value
