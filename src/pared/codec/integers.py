"""Ways to code a matrix of integers, and the choice among them."""

from __future__ import annotations

from enum import IntEnum

import numba
import numpy as np
from numpy.typing import NDArray

from pared.codec import mixing, scales, tokens
from pared.codec.cursor import Cursor, number
from pared.core.errors import FileError

MOST_LAG = 512
"""The longest line of pixels that is looked for."""

_TRIAL = 1 << 16  # entries that a choice for a large matrix is made on


class Coding(IntEnum):
    """How integers are coded; the numbers are those in the file."""

    ZERO = 0
    STATIC = 1
    HUFFMAN = 2
    RUNS_STATIC = 3
    RUNS_HUFFMAN = 4
    ADAPTIVE = 5
    SCALED = 6


def encode(matrix: NDArray[np.integer], coding: Coding, neighbours: tuple[bool, int, int] = (False, 0, 0)) -> bytes:
    """Code a matrix in one way.

    Args:
        matrix: shape (rows, columns).
        coding: how; ZERO is for a matrix without anything in it.
        neighbours: of ADAPTIVE: whether columns are coded as rows, and the `width` and `period` of `mixing.encode`.

    >>> matrix = np.array([[0, 0, 3], [0, -1, 0]])
    >>> data = encode(matrix, Coding.RUNS_STATIC)
    >>> decode(Cursor(data, "x"), (2, 3), Coding.RUNS_STATIC).tolist()
    [[0, 0, 3], [0, -1, 0]]
    """
    matrix = matrix.astype(np.int32, copy=False)
    if coding is Coding.ZERO:
        return b""
    if coding is Coding.ADAPTIVE:
        transposed, width, period = neighbours
        data = mixing.encode(matrix.T if transposed else matrix, width, period)
        return bytes([transposed]) + number(width) + number(period) + number(len(data)) + data
    if coding is Coding.SCALED:
        return scales.encode(matrix)
    kind: tokens.Coding = "static" if coding in (Coding.STATIC, Coding.RUNS_STATIC) else "huffman"
    flat = matrix.reshape(-1)
    if coding in (Coding.STATIC, Coding.HUFFMAN):
        return tokens.encode(flat, kind)
    places = np.flatnonzero(flat)
    gaps = np.diff(places, prepend=-1) - 1
    return number(len(places)) + tokens.encode(tokens.unfold(gaps.astype(np.uint32)), kind) + tokens.encode(flat[places], kind)


def decode(cursor: Cursor, shape: tuple[int, int], coding: Coding, most: int = 31) -> NDArray[np.int32]:
    """The matrix that `encode` was given; `most` is how many bits a magnitude can have.

    Raises:
        FileError: if the bytes aren't those of such a matrix.
    """
    rows, columns = shape
    if coding is Coding.ZERO:
        return np.zeros(shape, np.int32)
    if coding is Coding.ADAPTIVE:
        if max(shape) > mixing.LONGEST:
            raise cursor.error(f"a matrix of {rows:,} x {columns:,} is too long for the adaptive coding")
        transposed = cursor.number("the order of axes", 1)
        width, period = (cursor.number(what, max(rows, columns)) for what in ("a width", "a period"))
        data = cursor.take(cursor.number("the length of a matrix"), "a matrix")
        found = mixing.decode(data, (columns, rows) if transposed else shape, width, period, most)
        return found.T if transposed else found
    if coding is Coding.SCALED:
        return scales.decode(cursor, shape)
    kind: tokens.Coding = "static" if coding in (Coding.STATIC, Coding.RUNS_STATIC) else "huffman"
    if coding in (Coding.STATIC, Coding.HUFFMAN):
        return tokens.decode(cursor, rows * columns, kind).reshape(shape)
    count = cursor.number("a count of entries", rows * columns)
    gaps, values = tokens.decode(cursor, count, kind), tokens.decode(cursor, count, kind)
    flat = np.zeros(rows * columns, np.int32)
    if not _place(tokens.fold(gaps), values, flat):
        raise FileError("a run of zeros is impossible.")
    return flat.reshape(shape)


@numba.njit(cache=True, nogil=True)
def _place(gaps: NDArray[np.uint32], values: NDArray[np.int32], flat: NDArray[np.int32]) -> bool:
    """Put values into a vector, each so many zeros after the one before; False if that is impossible."""
    place = -1
    for index in range(len(gaps)):
        place += np.int64(gaps[index]) + 1
        if place >= len(flat) or values[index] == 0:
            return False
        flat[place] = values[index]
    return True


def smallest_adaptive(matrix: NDArray[np.int32], kernel: tuple[int, int]) -> tuple[int, tuple[bool, int, int]]:
    """The best neighbours for the adaptive coding, found on up to 2^16 entries, and the bytes of those entries.

    Args:
        matrix: shape (rows, columns).
        kernel: width and area of a convolution's kernel, (0, 0) where there is none.
    """
    part = sample(matrix)
    tries = [(False, *kernel)]
    if not any(kernel) and min(part.shape) > 1:
        tries.append((True, 0, 0))
        tries += [(turned, lag, 0) for turned in (False, True) if (lag := line(part.T if turned else part))]
    sizes = [len(encode(part, Coding.ADAPTIVE, each)) for each in tries]
    best = int(np.argmin(sizes))
    return sizes[best], tries[best]


def sample(matrix: NDArray[np.int32]) -> NDArray[np.int32]:
    """As many of the first rows as give about 2^16 entries, or the whole matrix where it is smaller."""
    if matrix.size <= _TRIAL:
        return matrix
    part = matrix[: max(_TRIAL // matrix.shape[1], 1)]
    return part[:, :_TRIAL]


def line(matrix: NDArray[np.int32]) -> int:
    """The lag at which columns resemble each other most, as pixels of neighbouring lines do; 0 if none stands out.

    >>> image = (np.arange(64) % 8 == 3).astype(np.int64)
    >>> line(np.stack([image] * 9))
    8
    """
    full = (matrix[:1024] != 0).astype(np.int64)
    columns = full.shape[1]
    filled = full.sum()
    if filled == 0 or filled == full.size or columns < 8:
        return 0
    profile = np.zeros(min(MOST_LAG, columns // 2) + 1)
    for lag in range(2, len(profile)):
        both = int((full[:, lag:] & full[:, :-lag]).sum())
        profile[lag] = both * full.size / (filled * filled) * columns / (columns - lag)  # 1 if they have nothing to do with each other
    best = int(np.argmax(profile))
    return best if profile[best] > 1.05 and profile[best] > 1.02 * float(np.median(profile[2:])) else 0
