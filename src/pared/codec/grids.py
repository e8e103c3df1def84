"""Finding the grid that numbers lie on: the step s of which every one of them is a whole multiple, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MOST_STEPS = 64
"""The smallest magnitude is looked for among the first so many multiples of the step."""

_TILE = 1 << 19
_PROBE = 1 << 12  # values that are looked at before all
_MOST_MULTIPLE = (1 << 31) - 2
_FIRST_LINES = 8  # that are looked at before all others
_REACH = 4  # floats around the middle of the possible steps that are tried


def find_step(values: NDArray[np.floating]) -> float | None:
    """The largest step with `dtype(k) * step == value` exactly for whole k and all of `values`, or None.

    A product is rounded once, in the type of the values, as every processor does it. What isn't finite lies on no grid.

    Args:
        values: any shape, float16, float32 or float64.

    >>> step = np.float32(0.1)
    >>> found = find_step(np.array([3, -5, 0, 8], np.float32) * step)
    >>> bool(found == step), find_step(np.array([1.0, np.pi]))
    (True, None)
    """
    few = values.reshape(-1)[:: max(values.size // _PROBE, 1)]
    if len(few) < values.size and find_step(few) is None:  # what a part has no step for has none
        return None
    if not np.isfinite(values).all():
        return None
    magnitudes = np.unique(np.abs(values[values != 0]))
    if len(magnitudes) == 0:
        return 1.0
    digits = np.finfo(values.dtype).nmant
    exact = magnitudes.astype(np.float64)
    for divisor in range(1, MOST_STEPS + 1):
        step = float(exact[0]) / divisor
        multiples = np.rint(exact / step)
        if multiples[-1] > 2.0 ** (digits - 1):
            return None
        if (np.abs(exact - multiples * step) <= exact * 2.0 ** (1 - digits)).all():
            found = _refine(magnitudes, multiples)
            if found is not None:
                return found
    return None


def find_steps(lines: NDArray[np.floating]) -> NDArray[np.floating] | None:
    """`find_step` of every row of a matrix, or None if one has none; many rows at a time.

    Args:
        lines: shape (rows, columns), float16, float32 or float64.

    >>> find_steps(np.array([[0.5, 1.5, 0], [0, 0, 0], [0.2, 0.1, 0.5]]))
    array([0.5, 1. , 0.1])
    """
    found = np.ones(len(lines), lines.dtype)
    high, row = _FIRST_LINES, 0
    while row < len(lines):
        part = np.ascontiguousarray(lines[row : row + high])
        if not np.isfinite(part).all() or not _steps_of(np.abs(part), found[row : row + high]):
            return None
        row, high = row + len(part), max(_TILE // max(lines.shape[1], 1), 1)
    return found


def _steps_of(magnitudes: NDArray[np.floating], found: NDArray[np.floating]) -> bool:
    """Write the step of every row of magnitudes into `found`, which is 1 for rows of zeros; False if a row has none."""
    kind = magnitudes.dtype
    digits = np.finfo(kind).nmant
    rows = np.flatnonzero(magnitudes.any(1))
    exact = magnitudes[rows].astype(np.float64)
    smallest = np.where(exact > 0, exact, np.inf).min(1, initial=np.inf)
    for divisor in range(1, MOST_STEPS + 1):
        if len(rows) == 0:
            return True
        step = (smallest / divisor)[:, None]
        multiples = np.rint(exact / step)
        if (multiples.max(1) > 2.0 ** (digits - 1)).any():
            return False
        close = (np.abs(exact - multiples * step) <= exact * 2.0 ** (1 - digits)).all(1)
        fit = np.flatnonzero(close)
        steps = _refine_rows(magnitudes[rows[fit]], multiples[fit])
        done = fit[steps > 0]
        found[rows[done]] = steps[steps > 0]
        left = np.delete(np.arange(len(rows)), done)
        rows, exact, smallest = rows[left], exact[left], smallest[left]
    return len(rows) == 0


def multiples(values: NDArray[np.floating], step: NDArray[np.floating]) -> tuple[NDArray[np.int32], bool] | None:
    """The whole k with `k * step == value`, bit for bit, or None if there are none of less than 31 bits.

    Args:
        values: shape (rows, columns).
        step: broadcasts against `values`, of the same type.

    Returns:
        The multiples, and whether there are minus zeros: then they are -1, and what is below zero is one less than its multiple.

    >>> multiples(np.array([[0.5, -1.5]]), np.array(0.5))
    (array([[ 1, -3]], dtype=int32), False)
    >>> multiples(np.array([[0.5, -0.0, -1.5]]), np.array(0.5))
    (array([[ 1, -1, -4]], dtype=int32), True)
    """
    steps = np.broadcast_to(step, values.shape)
    signed = any((np.signbit(values[tile]) & (values[tile] == 0)).any() for tile in tiles(values.shape))
    found = np.zeros(values.shape, np.int32)
    for tile in tiles(values.shape):
        exact = np.rint(values[tile].astype(np.float64) / steps[tile].astype(np.float64))
        if np.abs(exact).max(initial=0) > _MOST_MULTIPLE:
            return None
        if signed:
            exact -= np.signbit(values[tile])
        found[tile] = exact
        again = at(found[tile], steps[tile], values.dtype, signed=signed)
        if not np.array_equal(again.view(np.uint8), np.ascontiguousarray(values[tile]).view(np.uint8)):
            return None
    return found, signed


def tiles(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix, so many that what is computed of one of them takes little memory.

    >>> list(tiles((2, 3)))
    [(slice(0, 174762, None), slice(0, 524288, None))]
    """
    wide = max(min(shape[1], _TILE), 1)
    high = max(_TILE // wide, 1)
    for row in range(0, shape[0], high):
        for column in range(0, shape[1], _TILE):
            yield slice(row, row + high), slice(column, column + _TILE)


def at(found: NDArray[np.integer], step: NDArray[np.floating], dtype: np.dtype, *, signed: bool = False) -> NDArray[np.floating]:
    """The values at multiples of a step, rounded once; `signed` as `multiples` returns it.

    >>> at(np.array([2, 0, -1]), np.array(0.5, np.float32), np.dtype("f4")).tolist()
    [1.0, 0.0, -0.5]
    >>> at(np.array([2, 0, -1]), np.array(0.5), np.dtype("f8"), signed=True).tolist()
    [1.0, 0.0, -0.0]
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if not signed:
            return found.astype(dtype) * step.astype(dtype)
        return np.copysign((found + (found < 0)).astype(dtype) * step.astype(dtype), np.where(found < 0, -1, 1).astype(dtype))


def _refine(magnitudes: NDArray[np.floating], multiples: NDArray[np.float64]) -> float | None:
    """The float of the type of `magnitudes` that gives all of them, from the interval that every one of them leaves."""
    step = float(_refine_rows(magnitudes[None], multiples[None])[0])
    return step if step > 0 else None


def _refine_rows(magnitudes: NDArray[np.floating], multiples: NDArray[np.float64]) -> NDArray[np.floating]:
    """For every row the float that gives all magnitudes of it but zeros, 0 where there is none."""
    kind = magnitudes.dtype.type
    half = np.spacing(magnitudes).astype(np.float64) / 2
    exact = magnitudes.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(multiples > 0, (exact - half) / multiples, 0).max(1, initial=0)
        high = np.where(multiples > 0, (exact + half) / multiples, np.inf).min(1, initial=np.inf)
    candidate = ((low + high) / 2).astype(magnitudes.dtype)
    for _ in range(_REACH):
        candidate = np.nextafter(candidate, kind(0))
    found = np.zeros_like(candidate)
    whole = multiples.astype(magnitudes.dtype)
    for _ in range(2 * _REACH + 1):
        with np.errstate(over="ignore", invalid="ignore"):
            fits = (whole * candidate[:, None] == magnitudes).all(1)
        found = np.where(fits & (candidate > 0) & (found == 0), candidate, found)
        candidate = np.nextafter(candidate, kind(np.inf))
    return found
