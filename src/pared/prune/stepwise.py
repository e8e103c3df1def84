"""Run a captured graph level by level while what it holds changes, each level from where the last one began."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pared.core.errors import ModelError

HELD = 2**30
"""Bytes that may be held between levels, of all batches together. Beyond that a batch goes on from an earlier level."""

View = Callable[[Tensor, Tensor], Any]


class Stepwise:
    """A captured graph, run up to one level of operators after the other; between two levels the caller sets what the first one reads.

    Running the graph from its inputs for every level costs as many runs as there are levels. So the values that are still needed where a
    level begins are held, and the next one goes on from there: every operator runs about twice in all.

    Args:
        module: from `capture`, or a copy of it.
        batches: of inputs; the graph has to take their size.
        levels: the operators to look at, level by level; only what these read (weights, statistics) may be changed, and only
            once they were looked at.
        held: the most bytes that are kept from level to level, those of the inputs apart.
    """

    def __init__(
        self, module: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]], levels: Sequence[Sequence[fx.Node]], held: int = HELD
    ) -> None:
        self._interpreter = fx.Interpreter(module, garbage_collect_values=False)
        self._nodes = list(module.graph.nodes)
        place = {node: number for number, node in enumerate(self._nodes)}
        self._ends = [max(place[node] for node in level) for level in levels]
        first = [min(place[node] for node in level) for level in levels]
        self._begins = [min(first[number:]) for number in range(len(levels))]
        end = max(self._ends, default=-1)
        self._last_use = {node: max((place[user] for user in node.users if place[user] <= end), default=-1) for node in self._nodes}
        self._writes = any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in self._nodes)
        self._allowed = held // max(1, len(batches))
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._states: list[tuple[int, dict[fx.Node, Any]]] = [(0, dict(zip(inputs, batch, strict=False))) for batch in batches]

    def look(self, level: int, views: Mapping[fx.Node, View]) -> Iterator[dict[fx.Node, Any]]:
        """Run all batches to the end of a level; of each, what the views keep of the (first) tensor that a node reads and the one it gives.

        Levels are looked at in order. A view is called at once: what its node read or gave may be overwritten later.

        Raises:
            ModelError: if the graph can't take a batch.
        """
        for number in range(len(self._states)):
            try:
                with torch.no_grad():
                    seen = self._run(number, level, views)
            except RuntimeError as error:
                shapes = ", ".join(str(tuple(x.shape)) for x in self._states[number][1].values() if isinstance(x, Tensor))
                raise ModelError(f"the model fails on values of shape {shapes}: {str(error).strip().splitlines()[0]}") from error
            yield seen

    def _run(self, number: int, level: int, views: Mapping[fx.Node, View]) -> dict[fx.Node, Any]:
        start, state = self._states[number]
        env = self._interpreter.env = self._own(state)
        seen: dict[fx.Node, Any] = {}
        for place, node in enumerate(self._nodes[: self._ends[level] + 1]):
            if node.op == "placeholder" or (place < start and node.op != "get_attr"):
                continue
            if place == self._begins[level] > start:
                self._hold(number, place, env)
            env[node] = self._interpreter.run_node(node)
            if node in views:
                seen[node] = views[node](env[node.all_input_nodes[0]], env[node])
            for source in (*node.all_input_nodes, node):
                if self._last_use[source] <= place:
                    env.pop(source, None)
        return seen

    def _hold(self, number: int, place: int, env: Mapping[fx.Node, Any]) -> None:
        live = {node: value for node, value in env.items() if node.op != "get_attr"}  # parameters are read anew
        tensors = {id(x): x for x in pytree.tree_leaves(list(live.values())) if isinstance(x, Tensor)}
        if sum(x.nbytes for x in tensors.values()) <= self._allowed:
            self._states[number] = place, self._own(live)

    def _own(self, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """The values, copied if the graph may write to them; all at once, so that views of the same memory stay that."""
        found = list(values.values())
        return dict(zip(values, copy.deepcopy(found) if self._writes else found, strict=True))
