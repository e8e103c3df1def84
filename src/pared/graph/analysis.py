"""The analysis of a captured graph: which indices of which axes live and die together, and what can be cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

from pared.core.errors import SettingsError
from pared.graph.analysis_pass import AnalysisPass, Link, Note, Producer
from pared.graph.capture import Captured
from pared.graph.classes import CutClass, build_classes
from pared.graph.labels import Atoms
from pared.graph.record import module_path, record

Roots = NDArray[np.int64]
Tie = tuple[Atoms, Atoms]


@dataclass(frozen=True)
class Analysis:
    """What the rules found in a graph. Atoms that are tied share a root; a root is a unit that is kept or removed as a whole.

    Attributes:
        captured: the graph.
        first: the pass that labelled it.
        root: the root of every atom.
        frozen: for every root, whether it has to stay.
        classes: what can be cut.
    """

    captured: Captured
    first: AnalysisPass
    root: Roots
    frozen: NDArray[np.bool_]
    classes: tuple[CutClass, ...]
    extra_ties: tuple[Tie, ...] = ()
    extra_frozen: tuple[Note, ...] = ()
    links: tuple[Link, ...] = field(default=(), repr=False)

    @property
    def labels(self) -> dict[fx.Node, Any]:
        """The labels of every node."""
        return self.first.labels

    @property
    def producers(self) -> list[Producer]:
        """Which slices of which parameters compute each index."""
        return self.first.producers

    def reasons(self, atoms: Atoms) -> list[str]:
        """Why atoms can't be removed, in the order in which it was noticed."""
        wanted = set(np.unique(self.root[atoms.reshape(-1)]).tolist())
        found: dict[str, None] = {}
        for note in (*self.first.frozen, *self.extra_frozen):
            if note.why and wanted & set(self.root[note.atoms].tolist()):
                found[f"{note.why} ({describe(note.node)})"] = None
        return list(found)

    def inexact(self, roots: Roots) -> list[str]:
        """Why removing some of these roots changes what the others compute (empty: it doesn't)."""
        wanted = set(roots.tolist())
        found: dict[str, None] = {}
        for note in self.first.inexact_notes:
            if wanted & set(self.root[note.atoms].tolist()):
                found[f"{note.why} ({describe(note.node)})"] = None
        return list(found)

    def refined(self, ties: tuple[Tie, ...] = (), frozen: tuple[Note, ...] = ()) -> Analysis:
        """The same graph with more ties and more that has to stay."""
        return _solve(self.captured, self.first, (*self.extra_ties, *ties), (*self.extra_frozen, *frozen))


def analyse(captured: Captured, leave: tuple[str, ...] = ()) -> Analysis:
    """Find out what can be cut in a captured graph, and what can't and why.

    Args:
        captured: from `capture`.
        leave: module paths whose outputs keep their width; a path covers everything below it.

    Raises:
        SettingsError: if a path in `leave` names no module of the model.
    """
    first = AnalysisPass(record(captured))
    _check_paths(captured, leave)
    first.run(captured.module.graph, leave)
    return _solve(captured, first, (), ())


def describe(node: fx.Node) -> str:
    """An operator and where it stands: "aten.mean.dim in encoder.norm, model.py:12"."""
    where = module_path(node)
    place = ""
    for line in reversed((node.meta.get("stack_trace") or "").split("\n")):
        if line.strip().startswith('File "'):
            parts = line.strip().split('"')
            number = parts[2].split("line ")[-1].split(",")[0]
            place = f", {parts[1].rpartition('/')[2]}:{number}"
            break
    return f"{node.target if node.op == 'call_function' else node.op}{f' in {where}' if where else ''}{place}"


def _check_paths(captured: Captured, leave: tuple[str, ...]) -> None:
    paths = {module_path(node) for node in captured.module.graph.nodes if node.op == "call_function"}
    paths |= {str(node.target).rpartition(".")[0] for node in captured.module.graph.nodes if node.op == "get_attr"}
    known = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}
    wrong = [path for path in leave if path not in known]
    if wrong:
        listed = ", ".join(sorted(known)[:20])
        raise SettingsError([f"leave: the model has no module {path!r} that computes. Its modules are {listed}." for path in wrong])


def _solve(captured: Captured, first: AnalysisPass, ties: tuple[Tie, ...], frozen: tuple[Note, ...]) -> Analysis:
    """Close the ties: roots, then rows whose cells are one root, until nothing changes; then what is frozen; then the classes."""
    all_ties = [*first.ties, *ties]
    while True:
        root = _roots(first.count, all_ties)
        more = _collapsed_rows(first.links, root)
        if not more:
            break
        all_ties += more
    is_frozen = np.zeros(first.count, bool)
    is_frozen[0] = True
    for note in (*first.frozen, *frozen):
        is_frozen[root[note.atoms]] = True
    _freeze_rows(first.links, root, is_frozen)
    classes = build_classes(first, root, is_frozen)
    return Analysis(captured, first, root, is_frozen, classes, ties, frozen, tuple(first.links))


def _roots(count: int, ties: list[Tie]) -> Roots:
    """The smallest atom of every connected component of the ties."""
    left = np.concatenate([np.zeros(0, np.int64), *(tie[0] for tie in ties)])
    right = np.concatenate([np.zeros(0, np.int64), *(tie[1] for tie in ties)])
    graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    smallest = np.full(component.max() + 1, count, np.int64)
    np.minimum.at(smallest, component, np.arange(count))
    return smallest[component]


def _collapsed_rows(links: list[Link], root: Roots) -> list[Tie]:
    """A linked row whose cells share one root is that root: tie it to its row atom. Rows of the same cells are one row."""
    found: list[Tie] = []
    owner: dict[frozenset[int], int] = {}
    for link in links:
        if link.rows is None:
            continue
        for cells, atom in zip(link.cells, link.rows, strict=True):
            members = frozenset(root[cells].tolist())
            twin = int(cells[0]) if len(members) == 1 else owner.setdefault(members, int(atom))
            if root[twin] != root[atom] and twin != 0 and atom != 0:
                found.append((np.array([twin]), np.array([atom])))
    return found


def _freeze_rows(links: list[Link], root: Roots, frozen: NDArray[np.bool_]) -> None:
    """A row with a cell that stays, stays."""
    changed = True
    while changed:
        changed = False
        for link in links:
            if link.rows is None:
                continue
            rows = root[link.rows]
            stay = frozen[root[link.cells]].any(axis=1) & ~frozen[rows]
            if stay.any():
                frozen[rows[stay]] = True
                changed = True


__all__ = ["Analysis", "analyse", "describe"]
