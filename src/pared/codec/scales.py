"""The scaled coding: static entropy coding (rANS, as in `static`) of dense integers by one shape and the scale of a place.

Weights of a layer differ in scale by row and by column, and have one shape otherwise. The scale of a place is the mean magnitude so
far of its row times that of its column; it is rounded to an eighth of an octave, its class. The shape is a histogram of integers
divided by their scales, which the file holds; every class has a table of frequencies made from it. `FORMAT.md` has all of it in words.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pared.codec import mixing, tokens
from pared.codec.cursor import Cursor, number
from pared.core.errors import FileError

Integers = NDArray[np.int64]

MOST = 2047
"""The largest magnitude that has a place in the tables; what is larger is listed after them."""

LARGEST = (1 << 20) - 1
"""The largest magnitude of all."""

MOST_CLASSES = 64
"""Tables that there can be."""

BUCKETS = 56
"""Parts of one half of the shape: eighths up to the scale, then eight to an octave, up to 64 scales."""

_HIGHEST = 191  # the last class that can be the first of a file
_PRECISION = 20
_TRIAL = 1 << 16  # entries that the weights are chosen on
_LEAST = 1 << 10  # entries below which the shape costs more than it saves
_WHOLE = 1 << _PRECISION
_CELL = 12  # bits of a slot that the index into a table leaves out
_LOWEST = 1 << 31  # of a state; it is renewed by 32 bits
_MANY = 4096  # symbols from which on two states share the work
_PRIOR = 4
_EVERY = 8  # places after which a scale is looked at again
_SHAPE = 1 << 24
_STEPS = 32  # of logarithms, to an octave
_WEIGHTS = ((0, 0), (0, 4), (4, 0), (3, 3), (4, 4))  # how much of the scales of rows and columns counts, in quarters
_ROOTS = np.array([62757, 57549, 52773, 48393, 44376, 40693, 37316, 34219], np.int64)  # 2^16 times 2^-1/16, 2^-3/16, …
_LOGARITHMS = np.array([max(t for t in range(33) if t == 0 or (256 + m) ** 64 >= 1 << (511 + 2 * t)) for m in range(256)], np.int64)


class Scales(NamedTuple):
    """What a file says of a scaled matrix before its tables.

    `mean` is 16 times the mean magnitude, `by_row` and `by_column` say how much of the scales of rows and columns counts, in quarters,
    `most` is the largest magnitude in the tables, `lowest` the first class, `classes` how many there are, `rare` how often out of 2^20
    a place holds something larger.
    """

    mean: int
    by_row: int
    by_column: int
    most: int
    lowest: int
    classes: int
    rare: int


def fits(matrix: NDArray[np.int32]) -> bool:
    """Whether `encode` takes a matrix, and may gain by it: it has enough integers, most of them other than zero, none too large."""
    enough = matrix.size >= _LEAST and 2 * np.count_nonzero(matrix) >= matrix.size
    return bool(enough and int(matrix.min()) >= -LARGEST and int(matrix.max()) <= LARGEST)


def encode(matrix: NDArray[np.int32]) -> bytes:
    """Code a matrix that isn't empty, of integers of at most `LARGEST` in magnitude.

    >>> rng = np.random.default_rng(0)
    >>> matrix = np.rint(rng.normal(size=(64, 64)) * rng.uniform(1, 30, (64, 1))).astype(np.int32)
    >>> data = encode(matrix)
    >>> bool((decode(Cursor(data, "x"), (64, 64)) == matrix).all())
    True
    """
    part = matrix[: max(_TRIAL // matrix.shape[1], _EVERY)]
    weights = min(_WEIGHTS, key=lambda each: _stretched(part, *each)[0]) if len(part) < len(matrix) else None
    tries = [_stretched(matrix, *each) for each in ((weights,) if weights else _WEIGHTS)]
    _, scales, shape, tables, classes = min(tries, key=lambda each: each[0])
    packed, flat = mixing.encode(shape[None]), matrix.reshape(-1)
    coded = _code(flat, classes.reshape(-1), tables, scales.most)
    head = b"".join(number(value) for value in scales) + number(len(packed)) + packed + number(len(coded)) + coded
    outside = flat[np.abs(flat) > scales.most]
    return head + number(len(outside)) + tokens.encode(outside, "static")


class Stretched(NamedTuple):
    """A matrix seen by scales with given weights: bits that its symbols take, and all that is needed to code them."""

    bits: float
    scales: Scales
    shape: NDArray[np.int32]
    tables: NDArray[np.uint32]
    classes: NDArray[np.int16]


def _stretched(matrix: NDArray[np.int32], by_row: int, by_column: int) -> Stretched:
    magnitudes = np.abs(matrix)
    mean = max(round(16 * float(magnitudes.mean())), 1)
    most = min(int(magnitudes.max()), MOST, max(mean // 2, 8))
    rare = min(-(-int(np.count_nonzero(magnitudes > most)) * _WHOLE // matrix.size), _WHOLE // 2)
    classes = _classes(matrix, mean, by_row, by_column)
    lowest = int(classes.min())
    scales = Scales(mean, by_row, by_column, most, lowest, min(int(classes.max()) - lowest + 1, MOST_CLASSES), rare)
    classes = np.minimum(classes - lowest, scales.classes - 1)
    shape = _shape(matrix, classes, scales)
    tables = _tables(scales, shape)
    return Stretched(_cost(matrix, classes, tables, most), scales, shape, tables, classes)


def decode(cursor: Cursor, shape: tuple[int, int]) -> NDArray[np.int32]:
    """The matrix that `encode` was given.

    Raises:
        FileError: if the bytes aren't those of such a matrix.
    """
    scales = Scales(
        cursor.number("a mean", 16 * LARGEST), cursor.number("a weight", 4), cursor.number("a weight", 4), cursor.number("a range", MOST),
        cursor.number("a class", _HIGHEST), cursor.number("a count of classes", MOST_CLASSES), cursor.number("a frequency", _WHOLE // 2),
    )  # fmt: skip
    form = mixing.decode(cursor.take(cursor.number("the length of a shape"), "a shape"), (1, 2 * BUCKETS))[0]
    if not scales.mean or not scales.classes or form.min() < 0 or not form.any():
        raise FileError("the shape of a matrix is impossible.")
    coded = cursor.take(cursor.number("the length of coded symbols"), "coded symbols")
    count = shape[0] * shape[1]
    outside = tokens.decode(cursor, cursor.number("a count of entries", count), "static")
    lanes = _lanes(count)
    if len(coded) < 8 * lanes or len(coded) % 4 or np.abs(outside.astype(np.int64)).max(initial=0) > LARGEST:
        raise FileError("entropy-coded symbols are cut off.")
    states = np.frombuffer(coded[: 8 * lanes], "<u8").astype(np.uint64)
    words = np.frombuffer(coded[8 * lanes :], "<u4").astype(np.uint32)
    tables = _tables(scales, form)
    matrix = np.zeros(shape, np.int32)
    possible = (states >= _LOWEST).all() and not (states >> np.uint64(63)).any()
    if not possible or not _decode(scales, tables, _starts(tables), states, words, outside, matrix):
        raise FileError("entropy-coded symbols end elsewhere than their bytes.")
    return matrix


def _lanes(count: int) -> int:
    return 2 if count >= _MANY else 1


@numba.njit(cache=True, nogil=True, forceinline=True)
def _logarithm(value: int) -> int:
    """32 times the logarithm of a positive integer to base 2, to the nearest whole number as far as its first nine bits go."""
    bits = 0
    while value >> bits > 511:
        bits += 1
    less = 0
    while value << less < 256:
        less += 1
    return _STEPS * (8 + bits - less) + _LOGARITHMS[((value >> bits) << less) & 255]


@numba.njit(cache=True, nogil=True, forceinline=True)
def _relative(total: int, count: int, mean: int) -> int:
    """The logarithm of the mean of `count` magnitudes, relative to that of all."""
    return _logarithm(16 * total + _PRIOR * mean) - _logarithm((count + _PRIOR) * mean)


@numba.njit(cache=True, nogil=True, forceinline=True)
def _look_at_columns(parts: Integers, totals: Integers, row: int, mean: int, weight: int) -> None:
    if row < _EVERY or row % _EVERY == 0:
        base = _logarithm(mean)
        for column in range(len(parts)):
            parts[column] = base + (weight * _relative(totals[column], row, mean) >> 2)


@numba.njit(cache=True, nogil=True)
def _classes(matrix: NDArray[np.int32], mean: int, by_row: int, by_column: int) -> NDArray[np.int16]:
    """The class of every place."""
    rows, columns = matrix.shape
    classes = np.zeros((rows, columns), np.int16)
    parts, totals = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    for i in range(rows):
        _look_at_columns(parts, totals, i, mean, by_column)
        total, part = 0, 0
        for j in range(columns):
            if j < _EVERY or j % _EVERY == 0:
                part = by_row * _relative(total, j, mean) >> 2  # type: ignore[arg-type]  # numba's integers
            classes[i, j] = min(max(parts[j] + part, 0) >> 2, _HIGHEST)
            magnitude = abs(np.int64(matrix[i, j]))
            total += magnitude
            totals[j] += magnitude
    return classes


@numba.njit(cache=True, nogil=True, forceinline=True)
def _position(twice: int, scale: int) -> int:
    """Where half of an odd number `twice` lies in a half of the shape, in 256ths of a bucket, for a class."""
    x = twice * _ROOTS[scale & 7] >> (5 + (scale >> 3))  # in 256ths of the scale
    if x < 256:
        return x << 3
    octave = 0
    while x >> octave > 511:
        octave += 1
    return min((octave << 11) + (x << 3 >> octave), BUCKETS << 8)


@numba.njit(cache=True, nogil=True)
def _tables(scales: Scales, shape: NDArray[np.int32]) -> NDArray[np.uint32]:
    """By class, the sum of the frequencies before each symbol: of -most, ..., most, and of what is larger."""
    sums = np.zeros(2 * BUCKETS + 1, np.int64)
    for n in range(2 * BUCKETS):
        sums[n + 1] = sums[n] + shape[n]
    for n in range(1, 2 * BUCKETS + 1):
        sums[n] = sums[n] * _SHAPE // sums[-1] if n < 2 * BUCKETS else _SHAPE
    symbols = 2 * scales.most + 1
    left = _WHOLE - symbols - scales.rare
    tables = np.zeros((scales.classes, symbols + 2), np.uint32)
    for c in range(scales.classes):
        for symbol in range(1, symbols):
            twice = 2 * (symbol - scales.most) - 1
            place = _position(abs(twice), scales.lowest + c)
            place = (BUCKETS << 8) + (place if twice > 0 else -place)
            n = min(place >> 8, 2 * BUCKETS - 1)
            below = sums[n] + ((sums[n + 1] - sums[n]) * (place - (n << 8)) >> 8)
            tables[c, symbol] = symbol + (below * left >> 24)
        tables[c, symbols] = _WHOLE - scales.rare
        tables[c, symbols + 1] = _WHOLE
    return tables


@numba.njit(cache=True, nogil=True)
def _shape(matrix: NDArray[np.int32], classes: NDArray[np.int16], scales: Scales) -> NDArray[np.int32]:
    """How often integers divided by their scales fall into each bucket; the counts add up to some 2^14 at most."""
    found = np.zeros(2 * BUCKETS, np.float64)
    rows, columns = matrix.shape
    for i in range(rows):
        for j in range(columns):
            value, scale = np.int64(matrix[i, j]), scales.lowest + classes[i, j]
            if abs(value) > scales.most:
                continue
            low = _position(abs(2 * value - 1), scale) * (1 if value > 0 else -1) + (BUCKETS << 8)  # type: ignore[arg-type]  # numba's integers
            high = _position(abs(2 * value + 1), scale) * (1 if value >= 0 else -1) + (BUCKETS << 8)  # type: ignore[arg-type]  # numba's integers
            low, high = min(low, (BUCKETS << 9) - 1), max(high, low + 1)
            for n in range(low >> 8, min((high + 255) >> 8, 2 * BUCKETS)):
                found[n] += (min(high, (n + 1) << 8) - max(low, n << 8)) / (high - low)
    total = min(matrix.size, 1 << 14)
    counts = np.zeros(2 * BUCKETS, np.int32)
    for n in range(2 * BUCKETS):
        counts[n] = max(np.int64(found[n] * total / matrix.size + 0.5), 1 if found[n] > 0 else 0)
    if counts.sum() == 0:
        counts[BUCKETS] = 1
    return counts


@numba.njit(cache=True, nogil=True)
def _cost(matrix: NDArray[np.int32], classes: NDArray[np.int16], tables: NDArray[np.uint32], most: int) -> float:
    """Bits that the symbols take."""
    lengths = np.zeros(tables.shape)
    for c in range(tables.shape[0]):
        for symbol in range(tables.shape[1] - 1):
            lengths[c, symbol] = _PRECISION - np.log2(max(np.int64(tables[c, symbol + 1]) - np.int64(tables[c, symbol]), 1))
    bits = 0.0
    rows, columns = matrix.shape
    for i in range(rows):
        for j in range(columns):
            value = np.int64(matrix[i, j])
            bits += lengths[classes[i, j], 2 * most + 1 if abs(value) > most else value + most]
    return bits


def _code(flat: NDArray[np.int32], classes: NDArray[np.int16], tables: NDArray[np.uint32], most: int) -> bytes:
    states = np.full(_lanes(len(flat)), _LOWEST, np.uint64)
    words = np.zeros(len(flat), np.uint32)
    first = _encode(flat, classes, tables, most, states, words)
    return states.astype("<u8").tobytes() + words[first:].astype("<u4").tobytes()


@numba.njit(cache=True, nogil=True)
def _encode(
    flat: NDArray[np.int32],
    classes: NDArray[np.int16],
    tables: NDArray[np.uint32],
    most: int,
    states: NDArray[np.uint64],
    words: NDArray[np.uint32],
) -> int:
    place, lanes = len(words), len(states)
    for index in range(len(flat) - 1, -1, -1):
        value, lane, c = np.int64(flat[index]), index % lanes, classes[index]
        symbol = 2 * most + 1 if abs(value) > most else value + most
        start = np.uint64(tables[c, symbol])
        frequency = np.uint64(tables[c, symbol + 1]) - start
        state = states[lane]
        if state >= frequency << np.uint64(63 - _PRECISION):
            place -= 1
            words[place] = state & np.uint64(0xFFFFFFFF)
            state >>= np.uint64(32)
        states[lane] = ((state // frequency) << np.uint64(_PRECISION)) + state % frequency + start
    return place


@numba.njit(cache=True, nogil=True)
def _starts(tables: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """By class and first bits of a slot, the symbol where to begin to look for it."""
    cells = _WHOLE >> _CELL
    found = np.zeros((tables.shape[0], cells), np.uint16)
    for c in range(tables.shape[0]):
        symbol = 0
        for cell in range(cells):
            while tables[c, symbol + 1] <= cell << _CELL:
                symbol += 1
            found[c, cell] = symbol
    return found


@numba.njit(cache=True, nogil=True)
def _decode(
    scales: Scales,
    tables: NDArray[np.uint32],
    starts: NDArray[np.uint16],
    states: NDArray[np.uint64],
    words: NDArray[np.uint32],
    outside: NDArray[np.int32],
    matrix: NDArray[np.int32],
) -> bool:
    """Whether all words and all larger integers were used, and the states are those that the encoder began with."""
    rows, columns = matrix.shape
    parts, totals = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    place, listed, lanes, lane = 0, 0, len(states), 0
    last = scales.classes - 1
    for i in range(rows):
        _look_at_columns(parts, totals, i, scales.mean, scales.by_column)
        total, part = 0, 0
        for j in range(columns):
            if j < _EVERY or j % _EVERY == 0:
                part = scales.by_row * _relative(total, j, scales.mean) >> 2  # type: ignore[arg-type]  # numba's integers
            c = min(max(min(max(parts[j] + part, 0) >> 2, _HIGHEST) - scales.lowest, 0), last)
            state = states[lane]
            slot = state & np.uint64(_WHOLE - 1)
            symbol = np.int64(starts[c, slot >> np.uint64(_CELL)])
            while tables[c, symbol + 1] <= slot:
                symbol += 1
            start = np.uint64(tables[c, symbol])
            state = (np.uint64(tables[c, symbol + 1]) - start) * (state >> np.uint64(_PRECISION)) + slot - start
            if state < _LOWEST:
                state = state << np.uint64(32) | np.uint64(words[place] if place < len(words) else 0)
                place += 1
            states[lane] = state
            lane = lanes - 1 - lane
            value = symbol - scales.most
            if value > scales.most:
                if listed == len(outside):
                    return False
                value = np.int64(outside[listed])
                listed += 1
            matrix[i, j] = value
            total += abs(value)
            totals[j] += abs(value)
    for state in states:
        if state != _LOWEST:
            return False
    return place == len(words) and listed == len(outside)
