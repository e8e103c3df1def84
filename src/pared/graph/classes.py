"""Classes: the sets of neurons that are cut together by a fraction, and the choice of which of them go.

A neuron is a root: channels, hidden units or head dimensions that are tied over the whole network. Most neurons of a class can be
removed one by one. Those that lie in a grid (the channels of a grouped convolution, the head dimensions of attention, anything that a
reshape splits) can only go so that every row that stays keeps equally many: either whole rows (groups, heads) or equal numbers of
each row (the width of a group, of a head).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import DisjointSet

from pared.graph.analysis_pass import AnalysisPass, Producer

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Rows of neurons that keep equally many each, or go as a whole.

    Attributes:
        rows: the neurons of each row; rows may share neurons (then they are equal).
        units: rows, by number, that can only go together, with whatever else goes with them.
        removable: for each unit, whether it may go.
        extra: for each unit, the neurons outside the grid that go with it.
    """

    rows: tuple[tuple[int, ...], ...]
    units: tuple[tuple[int, ...], ...]
    removable: tuple[bool, ...]
    extra: tuple[tuple[int, ...], ...]


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
    """Whole rows or equal numbers of every row, whichever comes closer to the share and then loses less."""
    rows, row_share = _choose_rows(grid, scores, keep)
    columns, column_share = _choose_columns(grid, scores, keep, multiple_of)
    if not rows or not columns:
        return rows or columns
    if abs(row_share - column_share) > 0.02:
        return rows if abs(row_share - keep) < abs(column_share - keep) else columns
    lost = [float(scores[list(dict.fromkeys(choice))].sum()) for choice in (rows, columns)]
    return rows if lost[0] <= lost[1] else columns


def _choose_rows(grid: Grid, scores: Scores, keep: float) -> tuple[list[int], float]:
    members = [sorted({neuron for row in unit for neuron in grid.rows[row]} | set(extra)) for unit, extra in zip(grid.units, grid.extra, strict=True)]
    candidates = [number for number, allowed in enumerate(grid.removable) if allowed]
    stay = kept_count(len(members), keep)
    number = min(len(members) - stay, len(candidates), len(members) - 1)
    totals = {unit: float(scores[members[unit]].sum()) for unit in candidates}
    gone = sorted(candidates, key=lambda unit: (totals[unit], -unit))[:number]
    return [neuron for unit in gone for neuron in members[unit]], 1 - number / max(len(members), 1)


def _choose_columns(grid: Grid, scores: Scores, keep: float, multiple_of: int) -> tuple[list[int], float]:
    distinct = list(dict.fromkeys(tuple(sorted(set(row))) for row in grid.rows))
    if sum(map(len, distinct)) != len({neuron for row in distinct for neuron in row}):
        return [], 1.0  # rows overlap in part: no number can be right for all of them
    removed: list[int] = []
    shares = []
    for row in distinct:
        step = multiple_of // math.gcd(multiple_of, len(distinct))
        stay = kept_count(len(row), keep, step)
        removed += lowest(row, scores, len(row) - stay)
        shares.append(stay / len(row))
    if any(np.isinf(scores[neuron]) for neuron in removed):
        return [], 1.0  # more of a row has to stay than the share allows
    return removed, float(np.mean(shares))


def build_classes(first: AnalysisPass, root: NDArray[np.int64], frozen: NDArray[np.bool_]) -> tuple[CutClass, ...]:
    """Group neurons by the producers and grids they share."""
    produced = [(producer, root[producer.atoms]) for producer in first.producers]
    neurons = {int(neuron) for _, roots in produced for neuron in roots if not frozen[neuron]}
    together: DisjointSet = DisjointSet(neurons)
    for _, roots in produced:
        _merge(together, [int(neuron) for neuron in roots if not frozen[neuron]])
    systems = _systems(first, root, frozen)
    for system in systems:
        _merge(together, [neuron for row in system.rows for neuron in row if neuron in neurons])
        _merge(together, [neuron for extra in system.extra for neuron in extra if neuron in neurons])
        for extra, unit in zip(system.extra, system.units, strict=True):
            _merge(together, [neuron for neuron in (*extra, *system.rows[unit[0]]) if neuron in neurons])
    classes = []
    for subset in together.subsets():
        makers = tuple(producer for producer, roots in produced if not subset.isdisjoint(roots.tolist()))
        grids = tuple(system for system in systems if any(neuron in subset for row in system.rows for neuron in row))
        in_grid = {neuron for grid in grids for group in (*grid.rows, *grid.extra) for neuron in group}
        order = dict.fromkeys(int(neuron) for maker in makers for neuron in root[maker.atoms] if int(neuron) in subset)
        stuck = len({int(neuron) for maker in makers for neuron in root[maker.atoms] if frozen[neuron]})
        free = tuple(neuron for neuron in order if neuron not in in_grid)
        if len(order) > 1:
            classes.append(CutClass(makers, tuple(order), free, grids, stuck))
    return tuple(sorted(classes, key=lambda found: min(found.neurons)))


def _merge(together: DisjointSet, neurons: list[int]) -> None:
    for neuron in neurons[1:]:
        together.merge(neurons[0], neuron)


def _systems(first: AnalysisPass, root: NDArray[np.int64], frozen: NDArray[np.bool_]) -> list[Grid]:
    """Grids that share neurons or whose rows are linked, as one; only their finest rows count."""
    rows: dict[frozenset[int], None] = {}
    for cells in (*first.grid_cells, *(link.cells for link in first.links)):
        for row in root[cells]:
            members = frozenset(row.tolist())
            if len(members) > 1:
                rows[members] = None
    by_member: dict[int, list[frozenset[int]]] = {}
    for row in rows:
        for neuron in row:
            by_member.setdefault(neuron, []).append(row)
    finest = [row for row in rows if not any(other < row for neuron in row for other in by_member[neuron])]
    stuck_rows, partners = _linked(first, root, finest)
    together: DisjointSet = DisjointSet(range(len(finest)))
    _connect(together, finest, partners)
    connected: DisjointSet = DisjointSet(range(len(finest)))
    for subset in together.subsets():
        _merge(connected, sorted(subset))
    number = {row: place for place, row in enumerate(finest)}
    for cells in (*first.grid_cells, *(link.cells for link in first.links)):
        inside = [number[other] for line in root[cells] for other in {row for n in line.tolist() for row in by_member.get(n, [])} if other in number]
        _merge(connected, inside)
    return [_grid(sorted(subset), finest, together, (stuck_rows, partners, frozen)) for subset in connected.subsets()]


def _linked(first: AnalysisPass, root: NDArray[np.int64], finest: list[frozenset[int]]) -> tuple[set[int], dict[int, set[int]]]:
    """Which finest rows may not vanish, and the row neurons that each is linked with."""
    number = {row: place for place, row in enumerate(finest)}
    stuck: set[int] = set()
    partners: dict[int, set[int]] = {}
    for link in first.links:
        for place, line in enumerate(root[link.cells]):
            row = number.get(frozenset(line.tolist()))
            if row is None:
                continue
            if link.rows is None or link.rows[place] == 0:
                stuck.add(row)
            else:
                partners.setdefault(row, set()).add(int(root[link.rows[place]]))
    return stuck, partners


def _connect(together: DisjointSet, finest: list[frozenset[int]], partners: dict[int, set[int]]) -> None:
    """Rows that share a neuron, or are linked with the same row neuron, go together."""
    owners: dict[int, int] = {}
    for place, row in enumerate(finest):
        for neuron in (*row, *partners.get(place, ())):
            together.merge(place, owners.setdefault(neuron, place))


def _grid(
    places: list[int], finest: list[frozenset[int]], together: DisjointSet, facts: tuple[set[int], dict[int, set[int]], NDArray[np.bool_]]
) -> Grid:
    stuck, partners, frozen = facts
    local = {place: number for number, place in enumerate(places)}
    units = list({together[place]: None for place in places})
    members = [[place for place in places if together[place] == unit] for unit in units]
    extra = [sorted({neuron for place in unit for neuron in partners.get(place, ())}) for unit in members]
    inner = [{neuron for place in unit for neuron in finest[place]} for unit in members]
    removable = [
        not any(place in stuck for place in unit) and not any(frozen[neuron] for neuron in (*inside, *more))
        for unit, inside, more in zip(members, inner, extra, strict=True)
    ]
    return Grid(
        tuple(tuple(sorted(finest[place])) for place in places),
        tuple(tuple(local[place] for place in unit) for unit in members),
        tuple(removable),
        tuple(map(tuple, extra)),
    )


