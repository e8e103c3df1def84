"""Classes: the sets of neurons that are cut together by a fraction, and the choice of which of them go.

A neuron is a root: channels, hidden units or head dimensions that are tied over the whole network. Most neurons of a class can be
removed one by one. Those that lie in a grid (the channels of a grouped convolution, the head dimensions of attention, anything that a
reshape splits) can only go so that every row that stays keeps equally many: either whole rows (groups, heads) or equal numbers of
each row (the width of a group, of a head).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pared.graph.analysis_pass import AnalysisPass, Producer

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Neurons that lie in rows, some rows perhaps linked with rows elsewhere.

    Attributes:
        matrices: every grid that a reshape or a grouped convolution made, as neurons (rows, columns).
        blocks: neurons that lie in the same rows; equal shares of every block leave equal rows. One tuple of blocks for each set of
            rows that share neurons or a grid.
        families: alternatives to equal shares: units of which some can go as a whole (a group, a head), each with all that goes along.
        extra: neurons outside the rows that go with a row (the input channel of several depthwise outputs).
        links: a row and the neuron with which it vanishes.
    """

    matrices: tuple[NDArray[np.int64], ...]
    blocks: tuple[tuple[tuple[int, ...], ...], ...]
    families: tuple[tuple[tuple[int, ...], ...], ...]
    extra: tuple[int, ...]
    links: tuple[tuple[tuple[int, ...], int], ...]

    def closed(self, removed: list[int]) -> list[int]:
        """With all that goes along: the row of a neuron that is gone, and the neuron whose whole row is gone."""
        gone = set(removed)
        before = -1
        while len(gone) != before:
            before = len(gone)
            for row, partner in self.links:
                if partner in gone:
                    gone.update(row)
                elif gone.issuperset(row):
                    gone.add(partner)
        return sorted(gone)

    @property
    def members(self) -> set[int]:
        """All neurons that the grid concerns."""
        return {neuron for component in self.blocks for block in component for neuron in block} | set(self.extra)

    @property
    def name(self) -> str:
        """The largest matrix, as "rows x columns"."""
        rows, columns = max((matrix.shape for matrix in self.matrices), key=lambda shape: shape[0])
        return f"{rows} x {columns}"


@dataclass(frozen=True)
class CutClass:
    """Neurons that are cut together by a fraction.

    Attributes:
        producers: the parameter slices that compute them.
        neurons: all of them, in the order of the first producer.
        free: those that can go one by one.
        grids: the others.
        frozen: how many more indices of the producers have to stay.
    """

    producers: tuple[Producer, ...]
    neurons: tuple[int, ...]
    free: tuple[int, ...]
    grids: tuple[Grid, ...]
    frozen: int

    @property
    def name(self) -> str:
        """The module paths of the producers."""
        return ", ".join(dict.fromkeys(producer.parameter.rpartition(".")[0] or producer.parameter for producer in self.producers))

    def choose(self, scores: Scores, keep: float, multiple_of: int = 1) -> list[int]:
        """The neurons to remove so that the share `keep` stays, those of lowest score first (ties: the later one goes).

        Args:
            scores: importance by root; infinite where a neuron has to stay.
            keep: between 0 and 1; at least one neuron (and one row of every grid) stays.
            multiple_of: round what stays to the nearest multiple, where the class is larger than that.
        """
        removed: list[int] = []
        if self.free:
            stay = kept_count(len(self.free), keep, multiple_of)
            removed += lowest(self.free, scores, len(self.free) - stay)
        for grid in self.grids:
            removed += _choose_in_grid(grid, scores, keep, multiple_of)
        return removed


def kept_count(count: int, keep: float, multiple_of: int = 1) -> int:
    """How many of `count` stay: the share rounded up, or to the nearest multiple if that leaves something to remove.

    >>> kept_count(5, 0.5), kept_count(20, 0.3), kept_count(20, 0.3, 8)
    (3, 6, 8)
    """
    exact = max(1, min(count, math.ceil(keep * count - 1e-9)))
    if multiple_of <= 1 or count <= multiple_of:
        return exact
    rounded = max(1, math.floor(keep * count / multiple_of + 0.5)) * multiple_of
    return min(count, rounded)


def lowest(neurons: tuple[int, ...], scores: Scores, number: int) -> list[int]:
    """The `number` neurons of lowest score; among equals the later ones."""
    order = sorted(range(len(neurons)), key=lambda place: (scores[neurons[place]], -place))
    return [neurons[place] for place in order[:number]]


def _choose_in_grid(grid: Grid, scores: Scores, keep: float, multiple_of: int) -> list[int]:
    """Equal shares of every row or whole rows, whichever comes closer to the share and then loses less."""
    choice = {number: _choose_shares(grid, component, scores, keep, multiple_of) for number, component in enumerate(grid.blocks)}
    for family in grid.families:
        rows = _choose_rows(family, scores, keep)
        touched = [number for number, component in enumerate(grid.blocks) if any(neuron in rows for block in component for neuron in block)]
        if not rows or not _regular(grid, set(rows)):
            continue
        columns = [neuron for number in touched for neuron in choice[number]]
        size = sum(len(block) for number in touched for block in grid.blocks[number])
        inside = len([neuron for neuron in rows if neuron not in grid.extra])
        gaps = [abs(1 - gone / size - keep) for gone in (inside, len(columns))]
        lost = [float(scores[choice_].sum()) for choice_ in (rows, columns)]
        if gaps[0] < gaps[1] - 0.02 or (abs(gaps[0] - gaps[1]) <= 0.02 and lost[0] <= lost[1]):
            for number in touched:
                choice[number] = []
            choice[touched[0]] = rows
    for number, component in enumerate(grid.blocks):
        inside = {neuron for block in component for neuron in block}
        others = grid.closed([neuron for other, part in choice.items() if other != number for neuron in part])
        if choice[number] and len(inside.intersection(others)) >= (1 - keep - 0.02) * len(inside):
            choice[number] = []  # enough of it goes along with others
    return grid.closed([neuron for part in choice.values() for neuron in part])


def _choose_rows(units: tuple[tuple[int, ...], ...], scores: Scores, keep: float) -> list[int]:
    candidates = [number for number, unit in enumerate(units) if not np.isinf(scores[list(unit)]).any()]
    number = min(len(units) - kept_count(len(units), keep), len(candidates))
    totals = {unit: float(scores[list(units[unit])].sum()) for unit in candidates}
    gone = sorted(candidates, key=lambda unit: (totals[unit], -unit))[:number]
    return list(dict.fromkeys(neuron for unit in gone for neuron in units[unit]))


def _choose_shares(grid: Grid, blocks: tuple[tuple[int, ...], ...], scores: Scores, keep: float, multiple_of: int) -> list[int]:
    removed: list[int] = []
    for block in blocks:
        stay = kept_count(len(block), keep, multiple_of // math.gcd(multiple_of, len(blocks)))
        removed += lowest(block, scores, len(block) - stay)
    if any(np.isinf(scores[neuron]) for neuron in removed):
        return []  # more of a block has to stay than the share allows
    return removed if _regular(grid, set(removed)) else []


def _regular(grid: Grid, removed: set[int]) -> bool:
    """Whether all rows that stay keep equally many."""
    for matrix in grid.matrices:
        kept = (~np.isin(matrix, list(removed))).sum(axis=1)
        if len(set(kept[kept > 0].tolist())) > 1:
            return False
    return True


def build_classes(first: AnalysisPass, root: NDArray[np.int64], frozen: NDArray[np.bool_]) -> tuple[CutClass, ...]:
    """Group neurons by the producers and grids they share."""
    produced = [(producer, root[producer.atoms]) for producer in first.producers]
    free = np.zeros(len(root), dtype=bool)
    for _, roots in produced:
        free[roots] = True
    free &= ~frozen
    systems = _systems(first, root)
    members = [np.array(sorted(system.members), dtype=np.int64) for system in systems]
    label = _components(len(root), [group[free[group]] for group in (*(roots for _, roots in produced), *members)])
    makers: dict[int, list[tuple[Producer, NDArray[np.int64]]]] = {}
    for producer, roots in produced:
        for found in label[roots[free[roots]][:1]].tolist():
            makers.setdefault(found, []).append((producer, roots))
    grids: dict[int, list[tuple[Grid, NDArray[np.int64]]]] = {}
    for system, inside in zip(systems, members, strict=True):
        for found in label[inside[free[inside]][:1]].tolist():
            grids.setdefault(found, []).append((system, inside))
    classes = [_class_of(made, grids.get(found, []), free, frozen) for found, made in makers.items()]
    return tuple(sorted((found for found in classes if len(found.neurons) > 1), key=lambda found: min(found.neurons)))


def _class_of(
    makers: list[tuple[Producer, NDArray[np.int64]]],
    grids: list[tuple[Grid, NDArray[np.int64]]],
    free: NDArray[np.bool_],
    frozen: NDArray[np.bool_],
) -> CutClass:
    roots = np.concatenate([roots for _, roots in makers])
    order = np.fromiter(dict.fromkeys(roots[free[roots]].tolist()), dtype=np.int64)
    in_grid = np.isin(order, np.concatenate([inside for _, inside in grids])) if grids else np.zeros(len(order), dtype=bool)
    stuck = len(np.unique(roots[frozen[roots]]))
    parts = tuple(producer for producer, _ in makers), tuple(order.tolist()), tuple(order[~in_grid].tolist())
    return CutClass(*parts, tuple(grid for grid, _ in grids), stuck)


def _components(count: int, groups: list[NDArray[np.int64]]) -> NDArray[np.int32]:
    """A number for every one of `count` neurons, the same for those that a chain of groups connects."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return np.arange(count, dtype=np.int32)
    ends = np.concatenate([group[1:] for group in groups])
    starts = np.repeat([group[0] for group in groups], [len(group) - 1 for group in groups])
    edges = coo_array((np.ones(len(ends), dtype=np.int8), (starts, ends)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def _merge(together: DisjointSet, members: list[int]) -> None:
    for member in members[1:]:
        together.merge(members[0], member)


@dataclass
class _Rows:
    """The finest rows of all grids and links, by number, and what they are linked with."""

    members: list[frozenset[int]]
    matrices: list[NDArray[np.int64]]
    stuck: set[int]
    partners: dict[int, set[int]]

    def of(self, matrix: NDArray[np.int64]) -> list[int]:
        """Numbers of the finest rows that are rows of `matrix`."""
        number = {row: place for place, row in enumerate(self.members)}
        return [number[row] for line in matrix if (row := frozenset(line.tolist())) in number]


def _finest_rows(first: AnalysisPass, root: NDArray[np.int64]) -> _Rows:
    matrices = [root[cells] for cells in (*first.grid_cells, *(link.cells for link in first.links))]
    unique = {matrix.tobytes() + bytes(str(matrix.shape), "ascii"): matrix for matrix in matrices}
    rows = dict.fromkeys(frozenset(line.tolist()) for matrix in unique.values() for line in matrix)
    rows = {row: None for row in rows if len(row) > 1}
    by_member: dict[int, list[frozenset[int]]] = {}
    for row in rows:
        for neuron in row:
            by_member.setdefault(neuron, []).append(row)
    finest = [row for row in rows if not any(other < row for neuron in row for other in by_member[neuron])]
    number = {row: place for place, row in enumerate(finest)}
    stuck: set[int] = set()
    partners: dict[int, set[int]] = {}
    for link in first.links:
        for place, line in enumerate(root[link.cells]):
            row = number.get(frozenset(line.tolist()))
            if row is not None and (link.rows is None or link.rows[place] == 0):
                stuck.add(row)
            elif row is not None and link.rows is not None:
                partners.setdefault(row, set()).add(int(root[link.rows[place]]))
    return _Rows(finest, [matrix for matrix in unique.values() if (matrix[:, :1] != matrix).any()], stuck, partners)


def _systems(first: AnalysisPass, root: NDArray[np.int64]) -> list[Grid]:
    """Rows that share neurons, lie in one grid, or are linked, as one system."""
    rows = _finest_rows(first, root)
    numbers = range(len(rows.members))
    linked, sharing, families = DisjointSet(numbers), DisjointSet(numbers), DisjointSet(numbers)
    by_partner: dict[int, int] = {}
    by_neuron: dict[int, int] = {}
    for row in numbers:
        for partner in rows.partners.get(row, ()):
            linked.merge(row, by_partner.setdefault(partner, row))
        for neuron in rows.members[row]:
            sharing.merge(row, by_neuron.setdefault(neuron, row))
    for unit in linked.subsets():
        _merge(families, sorted(unit))
    systems: DisjointSet = DisjointSet(numbers)
    for matrix in rows.matrices:
        _merge(families, rows.of(matrix))
        _merge(sharing, [by_neuron[neuron] for neuron in np.unique(matrix).tolist() if neuron in by_neuron])
    for subset in (*families.subsets(), *sharing.subsets()):
        _merge(systems, sorted(subset))
    for row, partners in rows.partners.items():
        _merge(systems, [row, *(by_neuron[partner] for partner in partners if partner in by_neuron)])
    return [_grid(sorted(subset), rows, (linked, sharing, families)) for subset in systems.subsets()]


def _grid(numbers: list[int], rows: _Rows, sets: tuple[DisjointSet, DisjointSet, DisjointSet]) -> Grid:
    linked, sharing, families = sets
    inside = {neuron for row in numbers for neuron in rows.members[row]}
    blocks: dict[int, dict[frozenset[int], list[int]]] = {}
    for neuron in sorted(inside):
        home = frozenset(row for row in numbers if neuron in rows.members[row])
        blocks.setdefault(sharing[min(home)], {}).setdefault(home, []).append(neuron)
    extra = {partner for row in numbers for partner in rows.partners.get(row, ())} - inside
    units: dict[int, dict[int, set[int]]] = {}
    stuck: set[int] = set()
    for row in numbers:
        unit = units.setdefault(families[row], {}).setdefault(linked[row], set())
        unit |= rows.members[row] | rows.partners.get(row, set())
        if row in rows.stuck:
            stuck.add(linked[row])
    alternatives = [tuple(tuple(sorted(unit)) for unit in family.values()) for family in units.values() if stuck.isdisjoint(family)]
    return Grid(
        tuple(matrix for matrix in rows.matrices if not inside.isdisjoint(matrix.reshape(-1).tolist())),
        tuple(tuple(map(tuple, component.values())) for component in blocks.values()),
        tuple(family for family in alternatives if len(family) > 1 and _apart(family)),
        tuple(sorted(extra)),
        tuple((tuple(rows.members[row]), partner) for row in numbers for partner in sorted(rows.partners.get(row, ()))),
    )


def _apart(family: tuple[tuple[int, ...], ...]) -> bool:
    """Whether the units of a family share nothing, so that one can go without another."""
    return sum(map(len, family)) == len({neuron for unit in family for neuron in unit})
