"""Canonical Huffman coding (Huffman 1952): what the lecture and Deep Compression use, here to be compared with and to read."""

from __future__ import annotations

import heapq
import itertools

import numba
import numpy as np
from numpy.typing import NDArray

from pared.core.errors import FileError

LONGEST = 57
"""The longest code in bits; a tensor would need more than 10^11 entries for a longer one."""


def code_lengths(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The length of each symbol's code; 0 for what doesn't occur. Where only one symbol does, its code has one bit.

    Of equal counts the tree that was made first is merged first, so that the lengths are the same everywhere.

    >>> code_lengths(np.array([5, 1, 1, 0, 3])).tolist()
    [1, 3, 3, 0, 2]
    """
    lengths = np.zeros(len(counts), np.int64)
    order = itertools.count()
    heap = [(int(count), next(order), [symbol]) for symbol, count in enumerate(counts) if count]
    heapq.heapify(heap)
    if len(heap) == 1:
        lengths[heap[0][2]] = 1
    while len(heap) > 1:
        one, other = heapq.heappop(heap), heapq.heappop(heap)
        merged = one[2] + other[2]
        lengths[merged] += 1
        heapq.heappush(heap, (one[0] + other[0], next(order), merged))
    return lengths


def encode(symbols: NDArray[np.uint16], lengths: NDArray[np.int64]) -> bytes:
    """Code symbols, the first bit of a code first; the last byte is filled up with zeros.

    >>> lengths = np.array([1, 2, 2])
    >>> encode(np.array([0, 1, 2, 0], np.uint16), lengths).hex()
    '58'
    >>> decode(b"X", 4, lengths).tolist()
    [0, 1, 2, 0]
    """
    codes, _, _ = _canonical(lengths)
    size = (int(lengths[symbols].sum()) + 7) // 8
    out = np.zeros(size + 1, np.uint8)
    _encode(symbols, codes, lengths, out)
    return out[:size].tobytes()


def decode(data: bytes | memoryview, count: int, lengths: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The `count` symbols that `encode` was given.

    Raises:
        FileError: if the lengths aren't those of a complete code, or the bytes don't end where the symbols do.
    """
    present = [int(length) for length in lengths if length]
    whole = sum(1 << (LONGEST - min(max(length, 0), LONGEST)) for length in present)
    if not present and count == 0:
        present, whole = [1], 1
    if present != [1] and (whole != 1 << LONGEST or min(present) < 0 or max(present) > LONGEST):
        raise FileError("the lengths of a Huffman code don't fit together.")
    _, order, firsts = _canonical(lengths)
    symbols = np.zeros(count, np.uint16)
    used = _decode(np.frombuffer(data, np.uint8), order, firsts, symbols)
    if used < 0 or (used + 7) // 8 != len(data) or (used % 8 and data[-1] & ((1 << (-used % 8)) - 1)):
        raise FileError("Huffman codes end elsewhere than their bytes.")
    return symbols


def _canonical(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint16], NDArray[np.int64]]:
    """The code of every symbol, the symbols in the order of their codes, and by length the first code and its place in that order."""
    order = np.array(sorted(np.nonzero(lengths)[0], key=lambda symbol: (lengths[symbol], symbol)), np.uint16)
    codes, firsts = np.zeros(len(lengths), np.int64), np.zeros((LONGEST + 1, 3), np.int64)
    code = place = 0
    for length in range(1, LONGEST + 1):
        code <<= 1
        alike = order[lengths[order] == length]
        firsts[length] = code, place, len(alike)
        codes[alike] = code + np.arange(len(alike))
        code, place = code + len(alike), place + len(alike)
    return codes, order, firsts


@numba.njit(cache=True, nogil=True)
def _encode(symbols: NDArray[np.uint16], codes: NDArray[np.int64], lengths: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    place = 0
    for symbol in symbols:
        code = codes[symbol]
        for bit in range(lengths[symbol] - 1, -1, -1):
            out[place >> 3] |= ((code >> bit) & 1) << (7 - (place & 7))
            place += 1


@numba.njit(cache=True, nogil=True)
def _decode(data: NDArray[np.uint8], order: NDArray[np.uint16], firsts: NDArray[np.int64], symbols: NDArray[np.uint16]) -> int:
    """Bits read, or -1 if there are too few or they are no code."""
    place, end = 0, 8 * len(data)
    for index in range(len(symbols)):
        code, length = 0, 0
        while True:
            length += 1
            if place >= end or length >= len(firsts):
                return -1
            code = code << 1 | ((data[place >> 3] >> (7 - (place & 7))) & 1)
            place += 1
            offset = code - firsts[length, 0]
            if 0 <= offset < firsts[length, 2]:
                symbols[index] = order[firsts[length, 1] + offset]
                break
    return place
