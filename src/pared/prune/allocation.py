"""How many neurons of every class stay: by a share of each class, or by one ranking over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pared.graph.classes import CutClass, kept_count

Scores = NDArray[np.float64]


def class_keys(classes: Sequence[CutClass]) -> list[str]:
    """The names of classes, told apart by a number where a layer computes several: the same in every round of pruning."""
    seen: dict[str, int] = {}
    keys = []
    for found in classes:
        seen[found.name] = seen.get(found.name, 0) + 1
        keys.append(found.name if seen[found.name] == 1 else f"{found.name} ({seen[found.name]})")
    return keys


@dataclass(frozen=True)
class Room:
    """What a class may come to.

    Attributes:
        size: how many neurons its shares refer to: those it had before the first round.
        now: how many it has.
        least: how many have to stay.
        most: how many may stay.
    """

    size: int
    now: int
    least: int
    most: int

    @classmethod
    def between(cls, size: int, now: int, floor: float, cap: float) -> Room:
        """The room between two shares of `size`: the floor rounded up and at least one neuron, the cap rounded down.

        >>> Room.between(20, 18, 0.1, 0.5)
        Room(size=20, now=18, least=2, most=10)
        """
        least = min(now, max(1, math.ceil(floor * size - 1e-9)))
        return cls(size, now, least, min(now, max(least, math.floor(cap * size + 1e-9))))

    def rounded(self, share: float, round_to: int) -> int:
        """The count nearest to a share of `size`, rounded as `kept_count` does, within the room."""
        return max(self.least, min(self.most, kept_count(self.size, share, round_to)))


def by_ranking(scores: Sequence[Scores], rooms: Sequence[Room], share: float) -> list[int]:
    """How many of each class are among the best `share` of all classes together.

    Chosen by count: the `least` best of every class stay in any case, and of the others, up to `most` of a class, those of highest
    score until the share of all is reached. Of equal scores that of the earlier class stays.

    Args:
        scores: of each class's neurons, on one scale.
        rooms: of each class.
        share: of the sum of all sizes, rounded up.

    >>> rooms = [Room(4, 4, 1, 4), Room(4, 4, 1, 4)]
    >>> by_ranking([np.array([1.0, 9, 8, 7]), np.array([2.0, 1, 1, 1])], rooms, 0.5)
    [3, 1]
    """
    total = math.ceil(share * sum(room.size for room in rooms) - 1e-9)
    counts = [room.least for room in rooms]
    open_places = [
        (-float(score), index, place)
        for index, (values, room) in enumerate(zip(scores, rooms, strict=True))
        for place, score in enumerate(np.sort(values)[::-1][: room.most])
        if place >= room.least
    ]
    for _, index, _ in sorted(open_places)[: max(0, total - sum(counts))]:
        counts[index] += 1
    return counts
