"""The first pass over a graph: give out atoms, and note what the rules say of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pared.graph.labels import FROZEN, Atoms, Group, Labels, groups_in
from pared.graph.passes import Pass
from pared.graph.record import module_path
from pared.graph.rules import rule_for, unknown, unlabelled


@dataclass(frozen=True)
class Note:
    """Something a rule said of some atoms, and where."""

    atoms: Atoms
    why: str
    node: fx.Node


@dataclass(frozen=True)
class Link:
    """Row i of `cells` vanishes exactly when `rows[i]` does; `rows` is None where rows must stay."""

    cells: Atoms
    rows: Atoms | None


@dataclass(frozen=True)
class Producer:
    """The slice of a parameter that computes each index of an axis: row i of `view(parameter)` belongs to `atoms[i]`."""

    parameter: str
    atoms: Atoms
    view: Callable[[Any], Any]


class AnalysisPass(Pass):
    """Gives out atoms and collects ties, links, grids and notes."""

    cutting = False

    def __init__(self, seen: dict[fx.Node, Any]) -> None:
        super().__init__()
        self.seen = seen
        self.count = 1  # atom 0 is FROZEN
        self.ties: list[tuple[Atoms, Atoms]] = []
        self.links: list[Link] = []
        self.grid_cells: list[Atoms] = []
        self.frozen: list[Note] = []
        self.inexact_notes: list[Note] = []
        self.producers: list[Producer] = []
        self.fresh_atoms: dict[fx.Node, list[Atoms]] = {}
        self.labels: dict[fx.Node, Any] = {}
        self.unknown: list[fx.Node] = []

    def run(self, graph: fx.Graph, leave: tuple[str, ...]) -> None:
        """Label every node of the graph; modules under the paths in `leave` keep the width of their outputs."""
        kernels = _kernels(graph, self.seen)
        sources: dict[int, Labels] = {}
        for node in graph.nodes:
            self.node = node
            if node.op == "get_attr":
                value = attribute(node)
                if isinstance(value, Tensor) and id(value) not in sources:
                    sources[id(value)] = self._seed(value, node in kernels)
                self.labels[node] = sources.get(id(value))
            elif node.op == "call_function":
                self.labels[node] = self._apply(node)
            elif node.op == "output":
                self._freeze_all(list(node.all_input_nodes), "is an output of the model")
            else:
                self.labels[node] = unlabelled(self.seen[node])
            if leave and node.op == "call_function" and _under(module_path(node), leave):
                self._freeze_all([node], "is left as it is, as asked")

    def _apply(self, node: fx.Node) -> Any:
        rule = rule_for(node.target)
        arguments: Any = fx.map_arg(node.args, self._known)
        named: Any = fx.map_arg(node.kwargs, self._known)
        if rule is not None:
            try:
                result = rule(self, *arguments, **named)
                if _shapes(result) in (None, _shapes(unlabelled(self.seen[node]))):
                    return result if result is not None else unlabelled(self.seen[node])
            except Exception:  # a form of the operator that its rule doesn't cover: treated like an unknown operator
                rule = None
        self.unknown.append(node)
        return unknown(self, *arguments, **named)

    def _known(self, node: fx.Node) -> Any:
        labels = self.labels[node]
        return self.seen[node] if labels is None else labels

    def _freeze_all(self, nodes: list[fx.Node], why: str) -> None:
        for group in groups_in([self.labels[node] for node in nodes]):
            self.freeze(group.atoms, why)

    def _seed(self, value: Tensor, kernel: bool) -> Labels:
        """Fresh atoms for every axis of a parameter or buffer; the spatial axes of a kernel have none."""
        axes = range(min(value.dim(), 2) if kernel else value.dim())
        groups = tuple(Group((axis,), self.fresh((value.shape[axis],))) for axis in axes if value.shape[axis] > 1)
        return Labels(tuple(value.shape), groups)

    def shape(self) -> Any:
        return self.seen[self.node]

    def fresh(self, shape: Sequence[int]) -> Atoms:
        size = math.prod(shape)
        atoms = np.arange(self.count, self.count + size, dtype=np.int64).reshape(tuple(shape))
        self.count += size
        self.fresh_atoms.setdefault(self.node, []).append(atoms)
        return atoms

    def tie(self, left: Atoms, right: Atoms) -> None:
        if left.shape != right.shape:
            self.violate(f"axes of {left.shape} and {right.shape} meet")
        if left is right:
            return
        left, right = left.reshape(-1), right.reshape(-1)
        fixed = (left == FROZEN) | (right == FROZEN)
        if fixed.any():
            self.freeze(np.concatenate([left[fixed], right[fixed]]), "meets a fixed length")
        self.ties.append((left[~fixed], right[~fixed]))

    def link(self, cells: Atoms, rows: Atoms | None) -> None:
        if cells.shape[1] == 1 and rows is not None:
            self.tie(cells[:, 0], rows)
        else:
            self.links.append(Link(cells, rows))

    def grid(self, cells: Atoms) -> None:
        self.grid_cells.append(cells)

    def freeze(self, atoms: Atoms, why: str) -> None:
        self.frozen.append(Note(atoms.reshape(-1), why, self.node))

    def inexact(self, atoms: Atoms, why: str) -> None:
        self.inexact_notes.append(Note(atoms.reshape(-1), why, self.node))

    def position(self, argument: int, axis: int, position: int) -> int:
        return position

    def rewrite(self, name: int | str, value: Any) -> None:
        return

    def rewrite_sizes(self, argument: int, sizes: Sequence[int], first: int = 0) -> None:
        return

    def retarget(self, name: str, *arguments: Any) -> None:
        return

    def is_parameter(self, argument: int) -> bool:
        source = self.node.args[argument]
        return isinstance(source, fx.Node) and source.op == "get_attr"

    def producer(self, argument: int | tuple[int, int], atoms: Atoms, view: Callable[[Any], Any]) -> None:
        place, *inner = argument if isinstance(argument, tuple) else (argument,)
        source: Any = self.node.args[place] if place < len(self.node.args) else None
        for entry in inner:
            source = source[entry]
        if isinstance(source, fx.Node) and (name := self._parameter_behind(source)) is not None:
            self.producers.append(Producer(name, atoms, view))

    def _parameter_behind(self, source: fx.Node) -> str | None:
        """The parameter that a weight is, or is computed from shape for shape (a mask, weight norm)."""
        wanted, pending, done = self.seen[source], [source], set()
        while pending:
            node = pending.pop(0)
            if node.op == "get_attr" and self.seen[node] == wanted and isinstance(attribute(node), nn.Parameter):
                return str(node.target)
            done.add(node)
            pending += [parent for parent in node.all_input_nodes if parent not in done]
        return None

    def places(self, atoms: Atoms, original: Atoms) -> Atoms:
        return np.arange(len(atoms))

    def gather_blocks(self, argument: int, rows: Atoms, columns: Atoms) -> None:
        return


def attribute(node: fx.Node) -> Any:
    """The tensor that a get_attr node reads."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _under(path: str, leave: tuple[str, ...]) -> bool:
    return any(path == wanted or path.startswith(f"{wanted}.") for wanted in leave)


def _shapes(labels: Any) -> Any:
    if isinstance(labels, list | tuple) and not isinstance(labels, torch.Size):
        return [_shapes(entry) for entry in labels]
    return tuple(labels.shape) if isinstance(labels, Labels) else None


def _kernels(graph: fx.Graph, seen: dict[fx.Node, Any]) -> set[fx.Node]:
    """The get_attr nodes that are, or from which are computed shape for shape, the weights of convolutions."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if node.op != "call_function" or not name.startswith("conv") or len(node.args) < 2:
            continue
        pending, done = [node.args[1]], set()
        while pending:
            source = pending.pop()
            if source in done or not isinstance(source, fx.Node) or source.op == "placeholder":
                continue
            done.add(source)
            if source.op == "get_attr" and isinstance(seen[source], tuple) and len(seen[source]) == len(seen[node.args[1]]):
                found.add(source)
            pending += source.all_input_nodes
    return found
