"""The adaptive coding: a binary arithmetic coder whose probabilities are mixed from many contexts, in integers only.

A matrix of integers is coded row by row: which columns and rows hold anything at all, then for each place between them whether it is
zero, its sign, the length of its magnitude in bits, and the bits below the first. The probability of every such bit is a logistic
mix of what the counters of several contexts say; counters and mix learn as they go. `FORMAT.md` has all of it in words.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pared.codec import contexts
from pared.codec.contexts import MOST_INPUTS, NEAR, SETS, counter_count
from pared.codec.logistic import LIMIT, squash_table, stretch_table
from pared.core.errors import FileError

LARGEST = (1 << 31) - 1
"""The largest magnitude that can be coded."""

LONGEST = 1 << 20
"""The most rows and columns of a matrix, which have counters of their own."""

_LONGEST = 31  # bits of the largest magnitude
_ROOM = 1 << 12  # bytes of a stream besides two an entry
_COUNT = 255  # counters learn ever more slowly up to here
_RECIPROCALS = np.array([(1 << 17) // (2 * n + 3) for n in range(_COUNT + 1)], np.int64)
_RATES = np.array([6 + 2816 // (32 + n) for n in range(1024)], np.int64)
_LOW, _HIGH, _CODE, _PLACE, _ENCODING, _MOST, _WRONG = range(7)


class Coder(NamedTuple):
    """All that coding one matrix needs, as arrays that compiled code can change.

    `registers` are those of the arithmetic coder, `stream` the bytes, `slots` the counters of the bit at hand, `logits` what they say.
    `learned` counts how often a set of mixing weights was used, `near` is what is around the place at hand.
    """

    registers: NDArray[np.int64]
    stream: NDArray[np.uint8]
    counters: NDArray[np.uint32]
    weights: NDArray[np.int32]
    learned: NDArray[np.int64]
    slots: NDArray[np.uint64]
    logits: NDArray[np.int64]
    near: NDArray[np.int64]
    squash: NDArray[np.int32]
    stretch: NDArray[np.int16]
    reciprocals: NDArray[np.int64]
    rates: NDArray[np.int64]


def encode(values: NDArray[np.integer], width: int = 0, period: int = 0) -> bytes:
    """Code a matrix of integers of at most `LARGEST` in magnitude.

    Args:
        values: shape (rows, columns).
        width: how many columns before a place its neighbour above lies, where rows are flattened images; 0 for none.
        period: how many columns make one channel, such as the area of a kernel; 0 for none.

    >>> values = np.array([[0, 0, 3], [0, 0, -1]])
    >>> data = encode(values)
    >>> len(data), bool((decode(data, (2, 3)) == values).all())
    (3, True)
    """
    if values.size == 0:
        return b""
    values = np.ascontiguousarray(values, np.int32)
    room = 2 * values.size + _ROOM
    while True:
        coder = _coder(values.shape, period, np.zeros(room, np.uint8), encoding=True)
        _matrix(coder, values, width, period)
        if coder.registers[_PLACE] <= room:
            return _with_tail(coder.stream[: coder.registers[_PLACE]].tobytes(), coder.registers)
        room = int(coder.registers[_PLACE])  # what it took; nothing was written beyond the end


def decode(data: bytes | memoryview, shape: tuple[int, int], width: int = 0, period: int = 0, most: int = _LONGEST) -> NDArray[np.int32]:
    """The matrix that `encode` was given.

    Args:
        data: what `encode` returned.
        shape: (rows, columns).
        width: as for `encode`.
        period: as for `encode`.
        most: bits that a magnitude can have; nothing is decoded after a longer one, so that forged code can't go on for long.

    Raises:
        FileError: if more bytes are needed than there are, some are left over, or a magnitude is too long.
    """
    values = np.zeros(shape, np.int32)
    if values.size == 0:
        if len(data):
            raise FileError("bytes are left over after an empty matrix.")
        return values
    coder = _coder(values.shape, period, np.array(np.frombuffer(data, np.uint8)), encoding=False)
    coder.registers[_CODE] = int.from_bytes(bytes(data[:4]).ljust(4, b"\0"), "big")
    coder.registers[_PLACE], coder.registers[_MOST] = 4, most
    _matrix(coder, values, width, period)
    if coder.registers[_WRONG]:
        raise FileError(f"an integer has more than {most} bits.")
    done = int(coder.registers[_PLACE]) - 4  # the encoder was here when it had written as many bytes
    if _with_tail(bytes(data[:done]).ljust(done, b"\0"), coder.registers) != data:
        raise FileError("a matrix of integers ends elsewhere than its bytes.")
    return values


def _with_tail(written: bytes, registers: NDArray[np.int64]) -> bytes:
    """The shortest bytes that, with zeros after them, lie in the last interval."""
    low, high = int(registers[_LOW]), int(registers[_HIGH])
    for count in range(5):
        shift = 32 - 8 * count
        tail = high >> shift << shift
        if tail >= low:
            return (written + (tail >> shift).to_bytes(count, "big")).rstrip(b"\0")
    raise AssertionError("an interval is never empty")


def _coder(shape: tuple[int, ...], period: int, stream: NDArray[np.uint8], *, encoding: bool) -> Coder:
    registers = np.array([0, 0xFFFFFFFF, 0, 0, encoding, _LONGEST, 0], np.int64)
    counters = np.full(counter_count(shape[0], shape[1], period), 1 << 31, np.uint32)  # a half, seen never
    weights = np.full((SETS, MOST_INPUTS), contexts.WEIGHTS, np.int32)
    learned, near = np.zeros(SETS, np.int64), np.zeros(NEAR, np.int64)
    slots, logits = np.zeros(MOST_INPUTS, np.uint64), np.zeros(MOST_INPUTS, np.int64)
    tables = squash_table(), stretch_table(), _RECIPROCALS, _RATES
    return Coder(registers, stream, counters, weights, learned, slots, logits, near, *tables)


@numba.njit(cache=True, forceinline=True)
def _shift_out(registers: NDArray[np.int64], stream: NDArray[np.uint8]) -> None:
    """Write or read the bytes on which both ends of the interval agree."""
    while ((registers[_LOW] ^ registers[_HIGH]) & 0xFF000000) == 0:
        if registers[_ENCODING]:
            if registers[_PLACE] < len(stream):
                stream[registers[_PLACE]] = registers[_HIGH] >> 24
        else:
            byte = stream[registers[_PLACE]] if registers[_PLACE] < len(stream) else 0
            registers[_CODE] = ((registers[_CODE] << 8) & 0xFFFFFFFF) | byte
        registers[_PLACE] += 1
        registers[_LOW] = (registers[_LOW] << 8) & 0xFFFFFFFF
        registers[_HIGH] = ((registers[_HIGH] << 8) & 0xFFFFFFFF) | 0xFF


@numba.njit(cache=True, forceinline=True)
def _bit(coder: Coder, bit: int, used: int, first: int, second: int) -> int:
    """Code one bit by the counters in the first `used` slots and two sets of mixing weights; returns the bit."""
    registers, counters, weights, slots, logits = coder.registers, coder.counters, coder.weights, coder.slots, coder.logits
    a, b = 0, 0
    for n in range(used):
        logit = coder.stretch[counters[slots[n]] >> np.uint32(16)]
        logits[n] = logit
        a += logit * weights[first, n]
        b += logit * weights[second, n]
    one = coder.squash[min(max((a + b) >> 17, -LIMIT), LIMIT) + LIMIT]
    span = registers[_HIGH] - registers[_LOW]
    middle = registers[_LOW] + (span >> 16) * one + (((span & 0xFFFF) * one) >> 16)
    if registers[_ENCODING] == 0:
        bit = 1 if registers[_CODE] <= middle else 0
    if bit:
        registers[_HIGH] = middle
    else:
        registers[_LOW] = middle + 1
    _shift_out(registers, coder.stream)
    error_a = (bit << 16) - coder.squash[min(max(a >> 16, -LIMIT), LIMIT) + LIMIT]
    error_b = (bit << 16) - coder.squash[min(max(b >> 16, -LIMIT), LIMIT) + LIMIT]
    error_a *= coder.rates[coder.learned[first]]
    error_b *= coder.rates[coder.learned[second]]
    coder.learned[first] = min(coder.learned[first] + 1, len(coder.rates) - 1)
    coder.learned[second] = min(coder.learned[second] + 1, len(coder.rates) - 1)
    for n in range(used):
        weights[first, n] += (logits[n] * error_a + (1 << 19)) >> 20
        weights[second, n] += (logits[n] * error_b + (1 << 19)) >> 20
        counter = np.int64(counters[slots[n]])
        seen, probability = counter & 0xFF, counter >> 8
        probability += (((bit << 24) - probability) * coder.reciprocals[seen]) >> 16
        probability = min(max(probability, 1 << 8), (1 << 24) - (1 << 8))
        counters[slots[n]] = probability << 8 | min(seen + 1, _COUNT)
    return bit


@numba.njit(cache=True, forceinline=True)
def _flags(coder: Coder, flags: NDArray[np.int64], kind: int, lag: int) -> None:
    """Code which columns or rows hold anything; `lag` is the distance to the line of pixels above."""
    for n in range(len(flags)):
        before = flags[n - 1] if n else 0
        before_2 = flags[n - 2] if n > 1 else 0
        lagged = flags[n - lag] if lag and n >= lag else 0
        lagged_next = flags[n - lag + 1] if lag > 1 and n >= lag else 0
        contexts.flag_slots(coder.slots, kind, before, before_2, lagged, lagged_next)
        flags[n] = _bit(coder, flags[n], 4, contexts.FLAGS + kind, contexts.FLAGS + 2 + kind)


@numba.njit(cache=True, forceinline=True)
def _look(near: NDArray[np.int64], v: NDArray[np.int32], i: int, j: int, width: int, period: int) -> None:
    """Write the values around a place to `near`; what lies outside is zero."""
    columns = v.shape[1]
    near[contexts.LEFT] = v[i, j - 1] if j else 0
    near[contexts.LEFT_2] = v[i, j - 2] if j > 1 else 0
    near[contexts.UP] = v[i - 1, j] if i else 0
    near[contexts.UP_2] = v[i - 2, j] if i > 1 else 0
    near[contexts.UP_LEFT] = v[i - 1, j - 1] if i and j else 0
    near[contexts.UP_RIGHT] = v[i - 1, j + 1] if i and j + 1 < columns else 0
    near[contexts.PIXEL] = v[i, j - width] if width and j >= width else 0
    near[contexts.PIXEL_LEFT] = v[i, j - width - 1] if width and j > width else 0
    near[contexts.PIXEL_RIGHT] = v[i, j - width + 1] if width > 1 and j >= width else 0
    near[contexts.CHANNEL] = v[i, j - period] if period and j >= period else 0


@numba.njit(cache=True, forceinline=True)
def _value(coder: Coder, value: int, i: int, j: int, rows: int, period: int) -> int:
    """Code one value, given what is near; returns it."""
    slots, near = coder.slots, coder.near
    first, second = contexts.zero_slots(slots, near, i, j, rows, period)
    if not _bit(coder, int(value != 0), 9, first, second):
        return 0
    first, second = contexts.sign_slots(slots, near, j, rows, period)
    negative = _bit(coder, int(value < 0), 5, first, second)
    magnitude, bits, known = abs(value), contexts.length(value), 1
    while known < _LONGEST:
        first, second = contexts.length_slots(slots, near, known, j, rows, period)
        if not _bit(coder, int(bits > known), 6, first, second):
            break
        known += 1
        if known > coder.registers[_MOST]:
            coder.registers[_WRONG] = 1
            return 0
    found = 1
    for depth in range(known - 1):
        first, second = contexts.low_slots(slots, near, known, depth, found)
        found = found << 1 | _bit(coder, (magnitude >> (known - 2 - depth)) & 1, 3, first, second)
    return -found if negative else found


@numba.njit(cache=True, nogil=True)
def _matrix(coder: Coder, v: NDArray[np.int32], width: int, period: int) -> None:
    """Code a whole matrix: written from `v`, or read into it."""
    rows, columns = v.shape
    full_columns, full_rows = np.zeros(columns, np.int64), np.zeros(rows, np.int64)
    for i in range(rows):
        for j in range(columns):
            if v[i, j]:
                full_columns[j] = full_rows[i] = 1
    _flags(coder, full_columns, 0, width)
    _flags(coder, full_rows, 1, 0)
    chosen = np.nonzero(full_columns)[0].astype(np.int64)
    counts, signs, lengths = np.zeros(columns, np.int64), np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    near = coder.near
    for i in range(rows):
        if not full_rows[i] or coder.registers[_WRONG]:
            continue
        near[contexts.ROW_COUNT] = near[contexts.LAST_LENGTH] = near[contexts.LAST_SIGN] = 0
        for place in range(len(chosen)):
            j = chosen[place]
            _look(near, v, i, j, width, period)
            near[contexts.COLUMN_COUNT], near[contexts.COLUMN_SIGNS], near[contexts.COLUMN_LENGTH] = counts[j], signs[j], lengths[j]
            value = _value(coder, np.int64(v[i, j]), i, j, rows, period)  # type: ignore[arg-type]  # numba's integers
            if not coder.registers[_ENCODING]:
                v[i, j] = value
            if value:
                near[contexts.ROW_COUNT] += 1
                near[contexts.LAST_LENGTH], near[contexts.LAST_SIGN] = contexts.length(value), contexts.sign(value)
                counts[j] += 1
                signs[j] += near[contexts.LAST_SIGN]
                lengths[j] = near[contexts.LAST_LENGTH]
