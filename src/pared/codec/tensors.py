"""One tensor: look at it, choose how to code it, code it, and read it back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pared.codec import frames, integers, mixing, planes, scales
from pared.codec.cursor import Cursor, number
from pared.codec.elements import Layout
from pared.codec.integers import Coding
from pared.codec.values import Kind, Meaning, entries, matrix_shape, meanings, most_bits, read_head

Prefer = Literal["auto", "smallest", "static", "huffman", "raw"]
"""Which codings may be chosen: the adaptive one only where it is at least 2 % smaller, wherever it is smaller, or never."""

_GAIN = 0.98
_ALWAYS = 1 << 16  # entries up to which the time of the adaptive coding doesn't matter where most are zero
_FEW = 1 << 12  # and where they aren't
_TINY = 8
_PROBE = 1 << 17  # bytes


def encode(data: bytes | memoryview, layout: Layout, prefer: Prefer = "auto") -> bytes:
    """Code the bytes of a tensor in the smallest way of those that `prefer` allows: kind and coding, what they need, and the entries.

    >>> from pared.codec.elements import ELEMENTS
    >>> values = np.array([[0, 0.5, 0, 0], [0, 0, -1.5, 0]] * 50, np.float32)
    >>> layout = Layout(ELEMENTS["float32"], values.shape)
    >>> data = encode(values.tobytes(), layout)
    >>> len(data), decode(Cursor(data, "x"), layout) == values.tobytes()
    (14, True)
    """
    best = bytes([Kind.RAW]) + bytes(data)
    if prefer == "raw" or layout.size <= _TINY:
        return best
    bits = np.frombuffer(data, layout.element.bits)
    for candidate in _candidates(bits, layout, prefer):
        if len(candidate) < len(best):
            best = candidate
    return best


def decode(cursor: Cursor, layout: Layout) -> bytes:
    """The bytes that `encode` was given.

    Raises:
        FileError: if what is stored isn't such a tensor.
    """
    code = cursor.take(1, "the coding of a tensor")[0]
    try:
        kind, coding = Kind(code & 15), Coding(code >> 4)
    except ValueError:
        raise cursor.error(f"there is no coding {code}; a newer pared may know it") from None
    if kind in (Kind.RAW, Kind.PLANES, Kind.ZSTD) and coding is not Coding.ZERO:
        raise cursor.error(f"there is no coding {code}; a newer pared may know it")
    if kind is Kind.RAW:
        return bytes(cursor.take(layout.size, "a tensor"))
    if kind is Kind.PLANES:
        return planes.decode(cursor, layout).tobytes()
    if kind is Kind.ZSTD:
        return frames.unpack(cursor.take(cursor.number("the length of a tensor"), "a tensor"), layout.size, "a tensor")
    head = read_head(cursor, kind, layout)
    return entries(head, integers.decode(cursor, matrix_shape(kind, layout), coding, most_bits(kind, layout)), layout).tobytes()


def coding_name(code: int) -> str:
    """A coding byte in words.

    >>> coding_name(0x56), coding_name(0x01)
    ('grid, adaptive', 'planes')
    """
    kind, coding = Kind(code & 15), Coding(code >> 4)
    words = kind.name.lower().replace("_", " ").replace("signed grid", "grid with -0").replace("column groups", "groups of columns")
    words = re.sub(" (?=rows|columns|groups)", " by ", words, count=1)
    if kind in (Kind.RAW, Kind.PLANES, Kind.ZSTD):
        return words
    return f"{words}, {'constant' if coding is Coding.ZERO else coding.name.lower().replace('_', ' ')}"


def _candidates(bits: NDArray[np.unsignedinteger], layout: Layout, prefer: Prefer) -> Iterator[bytes]:
    least = layout.size
    for meaning in meanings(bits, layout):
        for candidate in _as_integers(meaning, layout, prefer):
            least = min(least, len(candidate))
            yield candidate
    if prefer == "huffman":
        return
    if layout.element.size > 1 and 2 * least > layout.size:
        candidate = bytes([Kind.PLANES]) + planes.encode(bits, layout)
        least = min(least, len(candidate))
        yield candidate
    data = bits.view(np.uint8).data
    if _repeats(data, least / layout.size):
        packed = frames.pack(data)
        yield bytes([Kind.ZSTD]) + number(len(packed)) + packed


def _repeats(data: memoryview, share: float) -> bool:
    """Whether repeated strings may leave less than `share`: by a fast look at all of it, or a thorough one at a part."""
    if len(data) <= _PROBE or len(frames.pack(data, 1)) < 1.02 * share * len(data):
        return True
    middle = (len(data) - _PROBE) // 2
    return len(frames.pack(data[middle : middle + _PROBE])) < 1.02 * share * _PROBE


def _as_integers(meaning: Meaning, layout: Layout, prefer: Prefer) -> Iterator[bytes]:
    matrix = meaning.matrix

    def coded(coding: Coding, data: bytes) -> bytes:
        return bytes([meaning.kind | coding << 4]) + meaning.head + data

    if not matrix.any():
        yield coded(Coding.ZERO, b"")
        return
    huffman = prefer == "huffman"
    ways = [Coding.HUFFMAN if huffman else Coding.STATIC]
    sparse = 2 * np.count_nonzero(matrix) < matrix.size
    if sparse:
        ways.append(Coding.RUNS_HUFFMAN if huffman else Coding.RUNS_STATIC)
    if not huffman and meaning.kind is not Kind.NIBBLES and scales.fits(matrix):
        ways.append(Coding.SCALED)
    found = [(way, integers.encode(matrix, way)) for way in ways]
    way, best = min(found, key=lambda pair: len(pair[1]))
    yield coded(way, best)
    if prefer not in ("auto", "smallest") or max(matrix.shape) > mixing.LONGEST:
        return
    least = 1.0 if prefer == "smallest" or (sparse and matrix.size <= _ALWAYS) or matrix.size <= _FEW else _GAIN
    part = integers.sample(matrix)
    size, neighbours = integers.smallest_adaptive(matrix, _kernel(meaning.kind, layout))
    static = len(best) if part.size == matrix.size else len(integers.encode(part, way))
    if size < least * static:
        yield coded(Coding.ADAPTIVE, integers.encode(matrix, Coding.ADAPTIVE, neighbours))


def _kernel(kind: Kind, layout: Layout) -> tuple[int, int]:
    """Width and area of a convolution's kernel; (0, 0) for everything else."""
    if kind is Kind.NIBBLES or len(layout.shape) < 3:
        return 0, 0
    area = math.prod(layout.shape[2:])
    return (layout.shape[-1] if len(layout.shape) > 3 else 1, area) if area > 1 else (0, 0)
