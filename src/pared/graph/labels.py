"""Labels: for every index of every axis of a tensor, the atom whose removal would remove that index.

An atom is a number. A parameter's axis of n channels starts with n atoms of its own; operators carry atoms along, and tie atoms that
must be kept or removed together. Atoms of several axes can be joined in a `Group`: after a reshape of C channels into (g, d), cell
(i, j) of the two axes carries the atom of channel i*d + j, so that nothing about the channels is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Atoms = NDArray[np.int64]
FROZEN = 0  # the atom that can't be removed; whatever is tied to it stays


@dataclass(frozen=True)
class Group:
    """Axes that share one array of atoms; `atoms.shape[k]` is the length of axis `axes[k]`, outermost first as they were once laid out."""

    axes: tuple[int, ...]
    atoms: Atoms

    def at(self, axis: int, index: int = 0) -> Atoms:
        """The atoms at one index of an axis, without that axis."""
        return np.asarray(self.atoms.take(index, axis=self.axes.index(axis)))

    def along(self, axes: Sequence[int]) -> Atoms:
        """The atoms with their dimensions in the order of `axes` (a permutation of the group's own)."""
        return self.atoms if tuple(axes) == self.axes else self.atoms.transpose([self.axes.index(axis) for axis in axes])


@dataclass(frozen=True)
class Labels:
    """The labels of one tensor. An axis in no group has a fixed length.

    >>> Labels((2, 3), (Group((1,), np.array([4, 5, 6])),)).on(1).atoms.tolist()
    [4, 5, 6]
    """

    shape: tuple[int, ...]
    groups: tuple[Group, ...] = ()

    def on(self, axis: int) -> Group | None:
        """The group that holds `axis`, if any."""
        return next((group for group in self.groups if axis in group.axes), None)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def axis(self, axis: int) -> int:
        """A non-negative axis."""
        return axis % max(self.rank, 1)

    def renamed(self, shape: Sequence[int], places: dict[int, int]) -> Labels:
        """The same groups on other axes: axis a moves to `places[a]`; all labelled axes must have a place."""
        groups = tuple(Group(tuple(places[axis] for axis in group.axes), group.atoms) for group in self.groups)
        return Labels(tuple(shape), groups)

    def permuted(self, order: Sequence[int]) -> Labels:
        """Axes in another order, as `Tensor.permute`."""
        order = [self.axis(axis) for axis in order]
        return self.renamed([self.shape[axis] for axis in order], {axis: place for place, axis in enumerate(order)})

    def with_axis(self, axis: int, size: int = 1) -> Labels:
        """A new unlabelled axis inserted before `axis`."""
        places = {old: old + (old >= axis) for old in range(self.rank)}
        return self.renamed((*self.shape[:axis], size, *self.shape[axis:]), places)

    def without_axis(self, axis: int) -> Labels:
        """An unlabelled axis taken out."""
        places = {old: old - (old > axis) for old in range(self.rank) if old != axis}
        return self.renamed((*self.shape[:axis], *self.shape[axis + 1 :]), places)

    def without_axis_group(self, axis: int) -> Labels:
        """An axis of length one taken out, labelled or not."""
        groups = []
        for group in self.groups:
            if axis in group.axes:
                rest = tuple(other for other in group.axes if other != axis)
                if rest:
                    groups.append(Group(rest, group.at(axis)))
            else:
                groups.append(group)
        return Labels(self.shape, tuple(groups)).without_axis(axis)

    def indexed(self, axis: int, index: Any) -> Labels:
        """Keep the indices `index` (anything numpy accepts that keeps the axis) of one axis."""
        shape = list(self.shape)
        shape[axis] = len(np.arange(self.shape[axis])[index])
        groups = []
        for group in self.groups:
            if axis in group.axes:
                where: list[Any] = [slice(None)] * len(group.axes)
                where[group.axes.index(axis)] = index
                group = Group(group.axes, group.atoms[tuple(where)])
            groups.append(group)
        return Labels(tuple(shape), tuple(groups))


def groups_in(value: Any) -> Iterator[Group]:
    """All groups of the labels in a nested list; anything else has none."""
    if isinstance(value, Labels):
        yield from value.groups
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from groups_in(entry)


def drop_constant_axes(group: Group, keep: Iterable[int] | None = None) -> tuple[Group | None, tuple[int, ...]]:
    """Take axes out of a group along which the atoms don't change; returns the rest and the axes that stayed.

    `keep` repeats an earlier decision instead of looking at the atoms (after a cut an axis may have length one by chance).
    """
    stayed = tuple(keep) if keep is not None else tuple(axis for place, axis in enumerate(group.axes) if _varies(group.atoms, place))
    atoms = group.atoms
    for place in reversed(range(len(group.axes))):
        if group.axes[place] not in stayed:
            atoms = np.asarray(atoms.take(0, axis=place))
    return (Group(stayed, atoms), stayed) if stayed else (None, stayed)


def _varies(atoms: Atoms, place: int) -> bool:
    return bool((atoms != atoms.take([0], axis=place)).any())


def factor(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Match the axes of two shapes of equal size: blocks of old axes that become blocks of new axes.

    >>> factor((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news, left, right = [], [], 1, 1
        if i < len(old):
            olds, left, i = [i], old[i], i + 1
        if j < len(new) and not (olds and left == 1 and new[j] != 1):
            news, right, j = [j], new[j], j + 1
        while left != right:
            if left < right:
                olds.append(i)
                left, i = left * old[i], i + 1
            else:
                news.append(j)
                right, j = right * new[j], j + 1
        blocks.append((olds, news))
    return blocks
