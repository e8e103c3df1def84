"""Static entropy coding: range asymmetric numeral systems (Duda 2013, 1311.2540) with one table of frequencies, four states in turn."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from pared.core.errors import FileError

PRECISION = 14
"""Bits of a frequency: those of a table add up to 2^14."""

MOST_SYMBOLS = 1 << 12
"""The largest table."""

_WHOLE = 1 << PRECISION
_LOWEST = 1 << 16  # of a state; it is renewed by 16 bits
_MANY = 4096  # symbols from which on four states share the work


def frequencies(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts scaled to add up to 2^14: at least 1 for what occurs, the rest by largest remainder (of equal ones the first).

    >>> frequencies(np.array([3, 0, 1])).tolist()
    [12288, 0, 4096]
    """
    total = int(counts.sum())
    if total == 0:
        return np.zeros_like(counts)
    scaled = [int(count) * _WHOLE for count in counts]  # python's integers: counts of large tensors would overflow
    found = np.array([max(value // total, int(value > 0)) for value in scaled], np.int64)
    rest = _WHOLE - int(found.sum())
    if rest > 0:
        order = sorted(range(len(counts)), key=lambda index: (-(scaled[index] % total), index))
        for index in [index for index in order if counts[index]][:rest]:
            found[index] += 1
        found[int(np.argmax(found))] += _WHOLE - int(found.sum())
    while rest < 0:  # the ones that were raised to 1 are paid for by the most frequent
        largest = int(np.argmax(found))
        taken = min(-rest, max(int(found[largest]) // 2, 1))
        found[largest] -= taken
        rest += taken
    return found


def cost(counts: NDArray[np.int64], table: NDArray[np.int64]) -> float:
    """Bits that symbols take, but for the table.

    >>> cost(np.array([8, 8]), np.array([8192, 8192]))
    16.0
    """
    there = counts > 0
    return float((counts[there] * (PRECISION - np.log2(table[there]))).sum())


def encode(symbols: NDArray[np.uint16], table: NDArray[np.int64]) -> bytes:
    """Code symbols by a table of frequencies, in which each of them has at least 1.

    >>> symbols = np.array([0, 0, 1, 0] * 100, np.uint16)
    >>> table = frequencies(np.bincount(symbols))
    >>> data = encode(symbols, table)
    >>> len(data), bool((decode(data, len(symbols), table) == symbols).all())
    (44, True)
    """
    if len(symbols) == 0 or table.max() == _WHOLE:
        return b""
    states = np.full(_lanes(len(symbols)), _LOWEST, np.int64)
    words = np.zeros(len(symbols), np.uint16)
    first = _encode(symbols, table, np.cumsum(table) - table, states, words)
    return states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()


def decode(data: bytes | memoryview, count: int, table: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The `count` symbols that `encode` was given.

    Raises:
        FileError: if the frequencies don't add up, or the bytes don't end where the symbols do.
    """
    if count == 0 or (len(table) and table.max() == _WHOLE):
        if len(data):
            raise FileError("bytes are left over after symbols that need none.")
        return np.full(count, int(np.argmax(table)) if count else 0, np.uint16)
    lanes = _lanes(count)
    if not 0 < len(table) <= MOST_SYMBOLS or table.min() < 0 or int(table.sum()) != _WHOLE:
        raise FileError("a table of frequencies doesn't add up.")
    if len(data) < 4 * lanes or len(data) % 2:
        raise FileError("entropy-coded symbols are cut off.")
    states = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.int64)
    words = np.frombuffer(data[4 * lanes :], "<u2").astype(np.uint16)
    symbols = np.zeros(count, np.uint16)
    owner = np.repeat(np.arange(len(table), dtype=np.uint16), table)
    read = _decode(states, words, table, np.cumsum(table) - table, owner, symbols)
    if read != len(words) or (states != _LOWEST).any():
        raise FileError("entropy-coded symbols end elsewhere than their bytes.")
    return symbols


def _lanes(count: int) -> int:
    return 4 if count >= _MANY else 1


@numba.njit(cache=True, nogil=True)
def _encode(
    symbols: NDArray[np.uint16], table: NDArray[np.int64], starts: NDArray[np.int64], states: NDArray[np.int64], words: NDArray[np.uint16]
) -> int:
    place, lanes = len(words), len(states)
    for index in range(len(symbols) - 1, -1, -1):
        symbol, lane = symbols[index], index % lanes
        frequency, state = table[symbol], states[lane]
        if state >= frequency << (32 - PRECISION):
            place -= 1
            words[place] = state & 0xFFFF
            state >>= 16
        states[lane] = ((state // frequency) << PRECISION) + state % frequency + starts[symbol]
    return place


@numba.njit(cache=True, nogil=True)
def _decode(
    states: NDArray[np.int64],
    words: NDArray[np.uint16],
    table: NDArray[np.int64],
    starts: NDArray[np.int64],
    owner: NDArray[np.uint16],
    symbols: NDArray[np.uint16],
) -> int:
    place, lanes = 0, len(states)
    for index in range(len(symbols)):
        lane = index % lanes
        state = states[lane]
        slot = state & (_WHOLE - 1)
        symbol = owner[slot]
        state = table[symbol] * (state >> PRECISION) + slot - starts[symbol]
        if state < _LOWEST:
            state = state << 16 | (words[place] if place < len(words) else 0)
            place += 1
        symbols[index] = symbol
        states[lane] = state
    return place
