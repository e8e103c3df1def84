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
_TOKENS = DIRECT + ((32 - _SHORTEST + 1) << _SHOWN)


def fold(values: NDArray[np.integer]) -> NDArray[np.uint32]:
    """0, -1, 1, -2, 2, … as 0, 1, 2, 3, 4, …

    >>> fold(np.array([0, -1, 1, -2])).tolist(), unfold(fold(np.array([5, -7]))).tolist()
    ([0, 1, 2, 3], [5, -7])
    """
    values = values.astype(np.int32, copy=False)
    return ((values << 1) ^ (values >> 31)).view(np.uint32)


def unfold(folded: NDArray[np.uint32]) -> NDArray[np.int32]:
    """The inverse of `fold`."""
    return (folded >> 1).view(np.int32) ^ -(folded & 1).view(np.int32)


def encode(values: NDArray[np.integer], coding: Coding) -> bytes:
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


def decode(cursor: Cursor, count: int, coding: Coding) -> NDArray[np.int32]:
    """The `count` integers that `encode` was given, shape (count,).

    Raises:
        FileError: if the bytes aren't those of `count` integers.
    """
    size = cursor.number("the size of a table", _TOKENS)
    shape = cursor.take(cursor.number("the length of a table"), "a table")
    table = mixing.decode(shape, (1, size))[0]
    coded = cursor.take(cursor.number("the length of coded symbols"), "coded symbols")
    tokens = (static if coding == "static" else huffman).decode(coded, count, table)
    bits = _open_bits(tokens)
    packed = cursor.take((bits + 7) // 8, "open bits")
    if bits % 8 and packed[-1] & ((1 << (-bits % 8)) - 1):
        raise FileError("open bits end elsewhere than their bytes.")
    folded = tokens.astype(np.uint32)
    _join(folded, np.frombuffer(packed, np.uint8))
    return unfold(folded)


def _split(folded: NDArray[np.uint32]) -> tuple[NDArray[np.uint16], bytes]:
    tokens = np.minimum(folded, DIRECT).astype(np.uint16)
    large = folded[folded >= DIRECT]
    found, widths = _long(large)
    tokens[folded >= DIRECT] = found
    out = np.zeros((int(widths.sum()) + 7) // 8, np.uint8)
    _pack(large, widths, out)
    return tokens, out.tobytes()


@numba.njit(cache=True, nogil=True)
def _open_bits(tokens: NDArray[np.uint16]) -> int:
    """How many bits the tokens leave open."""
    bits = 0
    for token in tokens:
        if token >= DIRECT:
            bits += ((token - DIRECT) >> _SHOWN) + _SHORTEST - 1 - _SHOWN
    return bits


@numba.njit(cache=True, nogil=True)
def _long(values: NDArray[np.uint32]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """The tokens of integers that aren't tokens themselves, and how many bits they leave open."""
    tokens, widths = np.zeros(len(values), np.uint16), np.zeros(len(values), np.int64)
    for index in range(len(values)):
        length, value = 0, np.int64(values[index])
        while value >> length:
            length += 1
        widths[index] = length - 1 - _SHOWN
        tokens[index] = DIRECT + ((length - _SHORTEST) << _SHOWN) + (value >> widths[index] & ((1 << _SHOWN) - 1))
    return tokens, widths


@numba.njit(cache=True, nogil=True)
def _pack(values: NDArray[np.uint32], widths: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    place = 0
    for index in range(len(values)):
        for bit in range(widths[index] - 1, -1, -1):
            out[place >> 3] |= ((np.int64(values[index]) >> bit) & 1) << (7 - (place & 7))
            place += 1


@numba.njit(cache=True, nogil=True)
def _join(folded: NDArray[np.uint32], packed: NDArray[np.uint8]) -> None:
    """Turn tokens into the integers that they and the open bits stand for."""
    place = 0
    for index in range(len(folded)):
        if folded[index] < DIRECT:
            continue
        known = np.int64(folded[index]) - DIRECT
        value = 1 << _SHOWN | (known & ((1 << _SHOWN) - 1))
        for _ in range((known >> _SHOWN) + _SHORTEST - 1 - _SHOWN):
            value = value << 1 | ((packed[place >> 3] >> (7 - (place & 7))) & 1)
            place += 1
        folded[index] = value
