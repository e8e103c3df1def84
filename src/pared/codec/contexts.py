"""What the adaptive coding looks at: for every kind of bit, which counters speak, in regions of one array.

`near` holds what is known around a place: the two values to its left, the two above, the diagonal ones, those around the pixel above
(`width` columns before) and the one of the channel before (`period` columns before); then counts of its row and column.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Slots = NDArray[np.uint64]

MOST_INPUTS = 9
"""The most counters that speak about one bit."""

WEIGHTS = (1 << 16) // 3
"""What every mixing weight begins with, in units of 2^-16."""

LENGTHS = 33
"""Lengths of magnitudes in bits, 0 to 32."""

LEFT, LEFT_2, UP, UP_2, UP_LEFT, UP_RIGHT, PIXEL, PIXEL_LEFT, PIXEL_RIGHT, CHANNEL = range(10)
ROW_COUNT, LAST_LENGTH, LAST_SIGN, COLUMN_COUNT, COLUMN_SIGNS, COLUMN_LENGTH = range(10, 16)
NEAR = 16
"""Entries of `near`."""

_DENSITIES = 12
_TREE = 16 << 6
_MANY_ROWS = 8  # from here on columns have counters of their own
_OWN_LENGTHS = 8

# sets of mixing weights
FLAGS = 0
_ZERO_BY_VALUES = 4
_ZERO_BY_DENSITY = _ZERO_BY_VALUES + 27
_SIGN = _ZERO_BY_DENSITY + _DENSITIES
_LENGTH = _SIGN + 2
_LOW = _LENGTH + 2 * LENGTHS
SETS = _LOW + 2

# regions of counters whose sizes are fixed
_FLAG = 0
_Z_VALUES = _FLAG + 2 * (16 + 8 + 8 + 1)
_Z_PIXELS = _Z_VALUES + 81
_Z_COLUMN = _Z_PIXELS + 72
_Z_ROW = _Z_COLUMN + 9 * _DENSITIES
_Z_BOTH = _Z_ROW + 12 * _DENSITIES
_Z_ABOVE = _Z_BOTH + _DENSITIES * _DENSITIES
_S_SIGNS = _Z_ABOVE + 36
_S_BALANCE = _S_SIGNS + 27
_S_LAST = _S_BALANCE + 15
_S_DIAGONAL = _S_LAST + 9
_L_LEFT = _S_DIAGONAL + 9
_L_PIXEL = _L_LEFT + 16 * LENGTHS
_L_LAST = _L_PIXEL + 4 * LENGTHS
_L_COLUMN = _L_LAST + 16 * LENGTHS
_L_ALONE = _L_COLUMN + 4 * LENGTHS
_B_TREE = _L_ALONE + LENGTHS
_B_DEPTH = _B_TREE + _TREE
_B_ABOVE = _B_DEPTH + LENGTHS * LENGTHS
_FIXED = _B_ABOVE + 16 * _TREE


def counter_count(rows: int, columns: int, period: int) -> int:
    """How many counters a matrix needs."""
    own = (columns if rows >= _MANY_ROWS else 1) * (2 + _OWN_LENGTHS)
    return _FIXED + 3 * rows + 3 * max(period, 1) + own


@numba.njit(cache=True, forceinline=True)
def small(value: int) -> int:
    """0, 1 or 2: the magnitude as far as contexts tell it apart."""
    return min(abs(value), 2)


@numba.njit(cache=True, forceinline=True)
def sign(value: int) -> int:
    """-1, 0 or 1."""
    return (value > 0) - (value < 0)


@numba.njit(cache=True, forceinline=True)
def length(value: int) -> int:
    """How many bits the magnitude has."""
    value, bits = abs(value), 0
    while value:
        value >>= 1
        bits += 1
    return bits


@numba.njit(cache=True, forceinline=True)
def _density(count: int, places: int) -> int:
    """How many of the places so far are not zero, as a class: 0 (none of many), 3 (none yet), 4 (few) to 11 (all)."""
    if count == 0:
        return 3 - (places > 2) - (places > 8) - (places > 32)
    level = 4
    for doubled in range(_DENSITIES - 5):  # the bits of 64 count // (places + 1), without dividing
        level += (places + 1) << doubled <= count << 6
    return level


@numba.njit(cache=True, forceinline=True)
def _own(j: int, rows: int) -> int:
    """Where a column's own counters begin; all columns share them where there are few rows."""
    return j * (2 + _OWN_LENGTHS) if rows >= _MANY_ROWS else 0


@numba.njit(cache=True, forceinline=True)
def flag_slots(slots: Slots, kind: int, before: int, before_2: int, lagged: int, lagged_next: int) -> None:
    """Is there anything in a column (`kind` 0) or row (1)? By the two flags before it and those one line of pixels before."""
    base = _FLAG + kind * 33
    slots[0] = base + ((before * 2 + before_2) * 2 + lagged) * 2 + lagged_next
    slots[1] = base + 16 + (before * 2 + before_2) * 2 + lagged
    slots[2] = base + 24 + (lagged * 2 + lagged_next) * 2 + before
    slots[3] = base + 32


@numba.njit(cache=True, forceinline=True)
def zero_slots(slots: Slots, near: Integers, i: int, j: int, rows: int, period: int) -> tuple[int, int]:
    """Is the place zero? Returns the two sets of mixing weights."""
    left, up, pixel, channel = small(near[LEFT]), small(near[UP]), small(near[PIXEL]), small(near[CHANNEL])
    by_pixels = (near[PIXEL_LEFT] != 0) + (near[PIXEL] != 0) + (near[PIXEL_RIGHT] != 0)
    above = min((near[UP_LEFT] != 0) + (near[UP] != 0) + (near[UP_RIGHT] != 0), 2)
    column, row = _density(near[COLUMN_COUNT], i), _density(near[ROW_COUNT], j)
    slots[0] = _Z_VALUES + ((left * 3 + small(near[LEFT_2])) * 3 + up) * 3 + pixel
    slots[1] = _Z_PIXELS + ((left * 4 + by_pixels) * 3 + above) * 2 + (channel != 0)
    slots[2] = _Z_COLUMN + (column * 3 + left) * 3 + pixel
    slots[3] = _Z_ROW + ((row * 3 + up) * 2 + (pixel != 0)) * 2 + (channel != 0)
    slots[4] = _Z_BOTH + column * _DENSITIES + row
    history = 0 if near[COLUMN_COUNT] == 0 else 1 + (near[UP_2] != 0)
    slots[5] = _Z_ABOVE + (history * 4 + by_pixels) * 3 + up
    slots[6] = _FIXED + 3 * i + left
    slots[7] = _FIXED + 3 * rows + 3 * (j % period if period else 0) + channel
    slots[8] = _FIXED + 3 * rows + 3 * max(period, 1) + _own(j, rows)
    return _ZERO_BY_VALUES + (left * 3 + up) * 3 + pixel, _ZERO_BY_DENSITY + column


@numba.njit(cache=True, forceinline=True)
def sign_slots(slots: Slots, near: Integers, j: int, rows: int, period: int) -> tuple[int, int]:
    """Is the value negative?"""
    balance = min(max(near[COLUMN_SIGNS], -2), 2) + 2
    slots[0] = _S_SIGNS + ((sign(near[LEFT]) + 1) * 3 + sign(near[UP]) + 1) * 3 + sign(near[PIXEL]) + 1
    slots[1] = _S_BALANCE + balance * 3 + sign(near[PIXEL]) + 1
    slots[2] = _S_LAST + (near[LAST_SIGN] + 1) * 3 + sign(near[CHANNEL]) + 1
    slots[3] = _S_DIAGONAL + (sign(near[UP_LEFT]) + 1) * 3 + sign(near[UP_RIGHT]) + 1
    slots[4] = _FIXED + 3 * rows + 3 * max(period, 1) + _own(j, rows) + 1
    return _SIGN, _SIGN + 1


@numba.njit(cache=True, forceinline=True)
def length_slots(slots: Slots, near: Integers, known: int, j: int, rows: int, period: int) -> tuple[int, int]:
    """Is the magnitude longer than `known` bits?"""
    slots[0] = _L_LEFT + (known * 4 + min(length(near[LEFT]), 3)) * 4 + min(length(near[UP]), 3)
    slots[1] = _L_PIXEL + known * 4 + min(length(near[PIXEL]), 3)
    slots[2] = _L_LAST + (known * 4 + min(near[LAST_LENGTH], 3)) * 4 + min(length(near[CHANNEL]), 3)
    slots[3] = _L_COLUMN + known * 4 + min(near[COLUMN_LENGTH], 3)
    slots[4] = _L_ALONE + known
    slots[5] = _FIXED + 3 * rows + 3 * max(period, 1) + _own(j, rows) + 2 + min(known - 1, _OWN_LENGTHS - 1)
    return _LENGTH + known, _LENGTH + LENGTHS + known


@numba.njit(cache=True, forceinline=True)
def low_slots(slots: Slots, near: Integers, known: int, depth: int, prefix: int) -> tuple[int, int]:
    """The bit `depth` below the first of a magnitude of `known` bits whose bits so far are `prefix`."""
    tree = 0
    if depth < 6:
        tree = min(known, 15) << 6 | (1 << depth | (prefix & ((1 << depth) - 1)))
    slots[0] = _B_TREE + tree
    slots[1] = _B_DEPTH + known * LENGTHS + depth
    slots[2] = _B_ABOVE + min(length(near[UP]), 15) * _TREE + tree
    return _LOW, _LOW + 1
