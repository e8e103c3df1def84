"""Integers as tokens of a small alphabet and the bits that a token leaves open, for the static codings."""

from __future__ import annotations

from typing import Literal

import numba
import numpy as np
from numpy.typing import NDArray

from pared.codec import huffman, mixing, static
from pared.codec.cursor import Cursor, number
from pared.core.errors import FileError

Coding = Literal["static", "huffman"]

DIRECT = 256
"""Folded integers below this are tokens themselves; a longer one's token says how many bits it has, and which three follow the first."""

_SHORTEST = 9  # bits of the first folded integer that isn't a token itself
_SHOWN = 3
_TOKENS = DIRECT + ((64 - _SHORTEST + 1) << _SHOWN)


def fold(values: NDArray[np.int64]) -> NDArray[np.uint64]:
    """0, -1, 1, -2, 2, … as 0, 1, 2, 3, 4, …

    >>> fold(np.array([0, -1, 1, -2])).tolist(), unfold(fold(np.array([5, -7]))).tolist()
    ([0, 1, 2, 3], [5, -7])
    """
    return (values.astype(np.uint64) << np.uint64(1)) ^ (values >> 63).astype(np.uint64)


def unfold(folded: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The inverse of `fold`."""
    return (folded >> np.uint64(1)).astype(np.int64) ^ -(folded & np.uint64(1)).astype(np.int64)


def encode(values: NDArray[np.int64], coding: Coding) -> bytes:
    """Code integers independently of each other: the table, the tokens, and the open bits.

    >>> values = np.array([0, 0, 300, -1])
    >>> data = encode(values, "static")
    >>> decode(Cursor(data, "x"), 4, "static").tolist()
    [0, 0, 300, -1]
    """
    folded = fold(values).reshape(-1)
    tokens, bits = _split(folded)
    counts = np.bincount(tokens, minlength=1).astype(np.int64)
    table = static.frequencies(counts) if coding == "static" else huffman.code_lengths(counts)
    coded = (static if coding == "static" else huffman).encode(tokens, table)
    shape = mixing.encode(table[None])
    return number(len(table)) + number(len(shape)) + shape + number(len(coded)) + coded + bits


def decode(cursor: Cursor, count: int, coding: Coding) -> NDArray[np.int64]:
    """The `count` integers that `encode` was given, shape (count,).

    Raises:
        FileError: if the bytes aren't those of `count` integers.
    """
    size = cursor.number("the size of a table", _TOKENS)
    shape = cursor.take(cursor.number("the length of a table"), "a table")
    table = mixing.decode(shape, 1, size)[0]
    coded = cursor.take(cursor.number("the length of coded symbols"), "coded symbols")
    tokens = (static if coding == "static" else huffman).decode(coded, count, table)
    width = _open_bits(tokens)
    packed = cursor.take((int(width.sum()) + 7) // 8, "open bits")
    folded = np.zeros(count, np.uint64)
    _join(tokens, width, np.frombuffer(packed, np.uint8), folded)
    if len(packed) and int(width.sum()) % 8 and packed[-1] & ((1 << (-int(width.sum()) % 8)) - 1):
        raise FileError("open bits end elsewhere than their bytes.")
    return unfold(folded)


def _open_bits(tokens: NDArray[np.uint16]) -> NDArray[np.int64]:
    """How many bits each token leaves open."""
    lengths = ((tokens.astype(np.int64) - DIRECT) >> _SHOWN) + _SHORTEST
    return np.where(tokens >= DIRECT, lengths - 1 - _SHOWN, 0)


def _split(folded: NDArray[np.uint64]) -> tuple[NDArray[np.uint16], bytes]:
    tokens = np.minimum(folded, DIRECT).astype(np.uint16)
    large = folded[folded >= DIRECT]
    lengths = _lengths(large)
    shown = (large >> (lengths - 1 - _SHOWN).astype(np.uint64)).astype(np.int64) & ((1 << _SHOWN) - 1)
    tokens[folded >= DIRECT] = DIRECT + ((lengths - _SHORTEST) << _SHOWN) + shown
    widths = lengths - 1 - _SHOWN
    out = np.zeros((int(widths.sum()) + 7) // 8, np.uint8)
    _pack(large, widths, out)
    return tokens, out.tobytes()


@numba.njit(cache=True, nogil=True)
def _lengths(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    lengths = np.zeros(len(values), np.int64)
    for index in range(len(values)):
        value = values[index]
        while value:
            value >>= np.uint64(1)
            lengths[index] += 1
    return lengths


@numba.njit(cache=True, nogil=True)
def _pack(values: NDArray[np.uint64], widths: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    place = 0
    for index in range(len(values)):
        for bit in range(widths[index] - 1, -1, -1):
            out[place >> 3] |= ((values[index] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(7 - (place & 7))
            place += 1


@numba.njit(cache=True, nogil=True)
def _join(tokens: NDArray[np.uint16], widths: NDArray[np.int64], packed: NDArray[np.uint8], folded: NDArray[np.uint64]) -> None:
    place = 0
    for index in range(len(tokens)):
        if tokens[index] < DIRECT:
            folded[index] = tokens[index]
            continue
        known = tokens[index] - DIRECT
        value = np.uint64(1 << _SHOWN | (known & ((1 << _SHOWN) - 1)))
        for _ in range(widths[index]):
            value = value << np.uint64(1) | np.uint64((packed[place >> 3] >> (7 - (place & 7))) & 1)
            place += 1
        folded[index] = value
