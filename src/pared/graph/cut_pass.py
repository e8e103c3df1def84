"""The second pass over a graph: run the same rules on the atoms that are left, and check that all they say still holds.

What comes out is exact: for every parameter the indices to keep, in the order in which the graph now meets them, and for every operator
the literals that have to change. If the graph can't be followed, a `Violation` says where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pared.graph.analysis import Analysis
from pared.graph.analysis_pass import attribute
from pared.graph.labels import FROZEN, Atoms, Group, Labels, groups_in
from pared.graph.passes import Emptied, Pass, Violation
from pared.graph.rules import rule_for, unknown
from pared.graph.rules.shapes import unflatten, view

Gather = Callable[[Tensor], Tensor]


class CutPass(Pass):
    """Follow a graph from which some neurons are removed.

    Attributes:
        gathers: for every parameter or buffer that changes (by the id of the tensor), the function that cuts it.
        kept: for every such tensor and axis, the indices that stay, in order.
        edits: for every node that changes, what: {place or keyword: value}, or {"target": operator, "args": …}.
    """

    cutting = True

    def __init__(self, analysis: Analysis, removed: Iterable[int]) -> None:
        super().__init__()
        self._memory = analysis.first._memory
        self.analysis = analysis
        self.root = analysis.root
        self.keep = np.ones(analysis.first.count, bool)
        self.keep[list(removed)] = False
        self.labels: dict[fx.Node, Any] = {}
        self.gathers: dict[int, Gather] = {}
        self.kept: dict[int, dict[int, NDArray[np.int64]]] = {}
        self.edits: dict[fx.Node, dict[int | str, Any]] = {}
        self._sources: dict[int, tuple[Labels, Labels]] = {}
        self._blocks: dict[int, tuple[Atoms, Atoms]] = {}
        self._loose: dict[int, Atoms] = {}
        self._drawn = 0
        self._rows = _row_map(analysis)

    def run(self) -> CutPass:
        """Follow the whole graph.

        Raises:
            Violation: where what is removed leaves something that no operator can express.
        """
        self._close_rows()
        for node in self.analysis.captured.module.graph.nodes:
            self.node, self._drawn = node, 0
            self._check_not_empty(self._original(node))
            if node.op == "get_attr":
                self.labels[node] = self._source(attribute(node))
            elif node.op == "call_function":
                rule = rule_for(node.target)
                arguments: Any = fx.map_arg(node.args, self._known)
                named: Any = fx.map_arg(node.kwargs, self._known)
                use = unknown if rule is None or node in self.analysis.first.unknown else rule
                try:
                    result = use(self, *arguments, **named)
                except (ValueError, IndexError, TypeError, ZeroDivisionError, AssertionError) as error:
                    raise Violation(node, str(error)) from error
                self.labels[node] = self._original(node) if result is None else result
                self._compare(self._original(node), self.labels[node])
            elif node.op != "output":
                self.labels[node] = self._original(node)
        self._gather_all()
        return self

    def _original(self, node: fx.Node) -> Any:
        return self.analysis.labels.get(node)

    def _known(self, node: fx.Node) -> Any:
        labels = self.labels[node]
        return self.analysis.first.seen[node] if labels is None else labels

    def _close_rows(self) -> None:
        """Row atoms whose cells are all gone are gone; a row that is gone in one place must be gone in all."""
        for link in self.analysis.links:
            gone = ~self.keep[self.root[link.cells]].any(axis=1)
            if link.rows is None:
                if gone.any():
                    raise Violation(next(iter(self.analysis.labels)), "a row that has to stay would vanish")
                continue
            self.keep[self.root[link.rows[gone]]] = False
        for link in self.analysis.links:
            if link.rows is None:
                continue
            gone = ~self.keep[self.root[link.cells]].any(axis=1)
            if (gone != ~self.keep[self.root[link.rows]]).any():
                raise Violation(next(iter(self.analysis.labels)), "linked rows would not vanish together")

    def _source(self, value: Any) -> Labels | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._sources:
            original: Labels = self._original(self.node)
            groups, shape = [], list(original.shape)
            for group in original.groups:
                atoms = group.atoms[self.keep[self.root[group.atoms]]].copy()
                shape[group.axes[0]] = len(atoms)
                self._loose[id(atoms)] = atoms
                groups.append(Group(group.axes, atoms))
            self._sources[id(value)] = (original, Labels(tuple(shape), tuple(groups)))
        return self._sources[id(value)][1]

    def _check_not_empty(self, labels: Any) -> None:
        for group in groups_in(labels):
            if group.atoms.size and not self.keep[self.root[group.atoms]].any():  # an axis may have had no index before
                raise Emptied(self.node, group.atoms)

    def _compare(self, original: Any, now: Any) -> None:
        """The atoms on every axis must be those of the original that are kept, each as often."""
        if isinstance(original, list | tuple):
            for left, right in zip(original, now, strict=True):
                self._compare(left, right)
        if not isinstance(original, Labels):
            return
        if tuple(now.shape) != self._cut_shape(original):
            self.violate(f"shape {tuple(now.shape)} comes out where {self._cut_shape(original)} is expected")
        for group in original.groups:
            twin = next((other for other in now.groups if set(other.axes) == set(group.axes)), None)
            wanted = np.sort(self.root[group.atoms[self.keep[self.root[group.atoms]]]], axis=None)
            if twin is None or not np.array_equal(np.sort(self.root[twin.atoms], axis=None), wanted):
                self.violate("the indices that are left don't line up")

    def _cut_shape(self, labels: Labels) -> tuple[int, ...]:
        shape = list(labels.shape)
        for group in labels.groups:
            kept, outer = self.keep[self.root[group.atoms]], 1
            for place, axis in enumerate(group.axes):
                rows = kept.reshape(*group.atoms.shape[: place + 1], math.prod(group.atoms.shape[place + 1 :])).any(axis=-1).sum()
                if outer == 0 or rows % outer:
                    self.violate("rows are left with unequal lengths")
                shape[axis], outer = int(rows) // outer, int(rows)
        return tuple(shape)

    def shape(self) -> Any:
        return self._shape_of(self._original(self.node), self.analysis.first.seen[self.node])

    def _shape_of(self, labels: Any, seen: Any) -> Any:
        if isinstance(labels, list):
            return [self._shape_of(entry, shape) for entry, shape in zip(labels, seen, strict=True)]
        return self._cut_shape(labels) if isinstance(labels, Labels) else seen

    def fresh(self, shape: Sequence[int]) -> Atoms:
        stored = self.analysis.first.fresh_atoms[self.node][self._drawn]
        self._drawn += 1
        kept = stored[self.keep[self.root[stored]]].reshape(-1)
        if len(shape) == 1:
            return kept
        if kept.size != int(np.prod(shape)):
            self.violate("rows are left with unequal lengths")
        return kept.reshape(tuple(shape))

    def tie(self, left: Atoms, right: Atoms) -> None:
        if left.shape != right.shape:
            self.violate(f"lengths {left.shape} and {right.shape} meet")
        free = (left != FROZEN) & (right != FROZEN)  # what meets a fixed length stays, which the analysis saw to
        for loose, other in ((left, right), (right, left)):
            if not np.array_equal(self.root[left[free]], self.root[right[free]]) and id(loose) in self._loose:
                loose[free] = loose[free][self._matching(self.root[other[free]], self.root[loose[free]])]
        if not np.array_equal(self.root[left[free]], self.root[right[free]]):
            self.violate("indices meet in different orders")
        for settled in (left, right):
            self._loose.pop(id(settled), None)

    def _matching(self, wanted: Atoms, have: Atoms) -> Atoms:
        """Places in `have` that give `wanted`, equal entries in their order."""
        order, target = np.argsort(have, kind="stable"), np.argsort(wanted, kind="stable")
        if not np.array_equal(have[order], wanted[target]):
            self.violate("different indices meet")
        places = np.empty_like(order)
        places[target] = order
        return places

    def link(self, cells: Atoms, rows: Atoms | None) -> None:
        if rows is None:
            return
        if len(cells) != len(rows):
            self.violate("linked rows have different numbers")
        for line, row in zip(cells, rows, strict=True):
            if self.root[row] not in self._rows.get(int(self.root[line[0]]), ()) and self.root[row] != self.root[line[0]]:
                self.violate("linked rows meet in different orders")

    def grid(self, cells: Atoms) -> None:
        return

    def freeze(self, atoms: Atoms, why: str) -> None:
        return

    def inexact(self, atoms: Atoms, why: str) -> None:
        return

    def position(self, argument: int, axis: int, position: int) -> int:
        source = self.node.args[argument]
        assert isinstance(source, fx.Node)
        group = self._original(source).on(axis)
        if group is None:
            return position
        place = group.axes.index(axis)
        length, inner = group.atoms.shape[place], math.prod(group.atoms.shape[place + 1 :])
        kept: NDArray[np.bool_] = np.any(self.keep[self.root[group.atoms]].reshape(-1, length, inner), axis=2)
        before = np.unique(kept[np.any(kept, axis=1)][:, :position].sum(axis=1))
        if len(before) != 1:
            self.violate("rows are left with different indices before a bound")
        return int(before[0])

    def rewrite(self, name: int | str, value: Any) -> None:
        present = self.node.args[name] if isinstance(name, int) and name < len(self.node.args) else self.node.kwargs.get(str(name))
        if isinstance(present, fx.Node):  # computed, mostly from the batch: a number in its place would fit this batch only
            if self.analysis.labels.get(present) != value:
                self.violate("a computed argument would have to change")
            return
        if isinstance(present, list | tuple):
            present = list(present)
        if present != value and not (present is None and isinstance(name, int)):
            self.edits.setdefault(self.node, {})[name] = value

    def rewrite_sizes(self, argument: int, sizes: Sequence[int], first: int = 0) -> None:
        given = self.node.args[argument] if argument < len(self.node.args) else ()
        if not isinstance(given, list | tuple):
            return
        seen = self.analysis.first.seen[self.node]
        before = [seen[first + place] for place in range(len(given))]
        new: list[Any] = []
        for entry, old, size in zip(given, before, sizes, strict=True):
            if isinstance(entry, fx.Node):
                new.append(entry if old == size else -1)
            else:
                new.append(entry if entry == -1 or old == size else size)
        if sum(isinstance(entry, int) and entry == -1 for entry in new) > 1 and rule_for(self.node.target) in (view, unflatten):
            # a reshape can infer one size only: the one that the user left open is known here
            known = [isinstance(old, int) and old == -1 for old in given]
            new = [size if open_ else entry for entry, size, open_ in zip(new, sizes, known, strict=True)]
        self.rewrite(argument, new)

    def retarget(self, name: str, *arguments: Any) -> None:
        overload = {"split_with_sizes": torch.ops.aten.split_with_sizes.default, "squeeze": torch.ops.aten.squeeze.dims}[name]
        self.edits.setdefault(self.node, {}).update({"target": overload, "args": (self.node.args[0], *arguments)})

    def is_parameter(self, argument: int) -> bool:
        source = self.node.args[argument]
        return isinstance(source, fx.Node) and source.op == "get_attr"

    def producer(self, argument: int | tuple[int, int], atoms: Atoms, view: Callable[[Any], Any]) -> None:
        return

    def places(self, atoms: Atoms, original: Atoms) -> Atoms:
        kept = np.flatnonzero(self.keep[self.root[original]])
        return kept[self._matching(self.root[atoms], self.root[original[kept]])]

    def gather_blocks(self, argument: int, rows: Atoms, columns: Atoms) -> None:
        source = self.node.args[argument]
        assert isinstance(source, fx.Node)
        value = id(attribute(source))
        before = self._blocks.setdefault(value, (rows, columns))
        if not (np.array_equal(before[0], rows) and np.array_equal(before[1], columns)):
            self.violate("a shared grouped weight would have to be cut in two ways")

    def _gather_all(self) -> None:
        for value, (original, now) in self._sources.items():
            indices = {}
            for group, left in zip(original.groups, now.groups, strict=True):
                index = left.atoms - group.atoms[0]
                if not np.array_equal(index, np.arange(len(group.atoms))):
                    indices[group.axes[0]] = index
            if value in self._blocks:
                rows, columns = self._blocks[value]
                if len(rows) != original.shape[0] or columns.shape[1] != original.shape[1]:
                    self.gathers[value], self.kept[value] = _gather_in_blocks(rows, columns), {0: rows}
            elif indices:
                self.gathers[value], self.kept[value] = _gather_axes(indices), indices


def _gather_axes(indices: dict[int, NDArray[np.int64]]) -> Gather:
    def gather(tensor: Tensor) -> Tensor:
        for axis, index in indices.items():
            tensor = tensor.index_select(axis, torch.from_numpy(index).to(tensor.device))
        return tensor.contiguous()

    return gather


def _gather_in_blocks(rows: Atoms, columns: Atoms) -> Gather:
    def gather(tensor: Tensor) -> Tensor:
        parts = [tensor[torch.from_numpy(r)][:, torch.from_numpy(c)] for r, c in zip(rows.reshape(len(columns), -1), columns, strict=True)]
        return torch.cat(parts).contiguous()

    return gather


def _row_map(analysis: Analysis) -> dict[int, set[int]]:
    """For every cell, the row atoms it is linked with."""
    found: dict[int, set[int]] = {}
    for link in analysis.links:
        if link.rows is not None:
            for cells, row in zip(analysis.root[link.cells], analysis.root[link.rows], strict=True):
                for cell in cells.tolist():
                    found.setdefault(cell, set()).add(int(row))
    return found


__all__ = ["CutPass", "Gather"]
