"""Where to write the name of each point of a chart so that names cover neither points nor each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# directions to try, best first: right, left, above, below, then the corners
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (8.0, 18.0, 30.0, 44.0)


@dataclass(frozen=True)
class Box:
    """A rectangle; x grows to the right, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0

    def outside(self, frame: Box) -> float:
        """The area of this rectangle that sticks out of `frame`."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(frame)


@dataclass(frozen=True)
class Place:
    """A label's rectangle, and whether it stands so far off that a line must lead to its point."""

    box: Box
    far: bool


def place(points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box) -> list[Place]:
    """Choose a place for each label, in order; the first free one wins, else the one that covers least.

    Args:
        points: where the marks are, in any unit (say points of 1/72 inch).
        sizes: width and height of each label, in the same unit.
        frame: the rectangle that labels should stay in.

    >>> [chosen.box.left > 50 for chosen in place([(50, 50)], [(20, 10)], Box(0, 0, 100, 100))]
    [True]
    """
    marks = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    chosen: list[Place] = []
    for index, ((x, y), (width, height)) in enumerate(zip(points, sizes, strict=True)):
        taken = [mark for other, mark in enumerate(marks) if other != index] + [earlier.box for earlier in chosen]
        best, least = None, float("inf")
        for distance, (right, up) in itertools.product(_DISTANCES, _DIRECTIONS):
            box = _beside(x, y, width, height, right * distance, up * distance)
            covered = sum(box.overlap(other) for other in taken) + 4 * box.outside(frame)
            if covered < least - 1e-9:
                best, least = Place(box, distance > _DISTANCES[0]), covered
        assert best is not None  # every candidate covers less than infinity
        chosen.append(best)
    return chosen


def _beside(x: float, y: float, width: float, height: float, right: float, up: float) -> Box:
    """The rectangle that starts `right` and `up` from a point, on the side that the signs tell, else centred."""
    left = x + right if right > 0 else x + right - width if right < 0 else x - width / 2
    bottom = y + up if up > 0 else y + up - height if up < 0 else y - height / 2
    return Box(left, bottom, left + width, bottom + height)
