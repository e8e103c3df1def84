"""Dense numbers byte by byte: all first bytes, all second bytes, … each entropy-coded or left as it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pared.codec import mixing, static
from pared.codec.cursor import Cursor, number
from pared.codec.elements import Layout


def encode(bits: NDArray[np.unsignedinteger], layout: Layout) -> bytes:
    """Code a tensor by planes of bytes; the sign of a float is moved to its end, so that the exponent fills one byte.

    >>> from pared.codec.elements import ELEMENTS
    >>> values = np.linspace(1, 2, 10_000, dtype=np.float32)
    >>> layout = Layout(ELEMENTS["float32"], (10_000,))
    >>> data = encode(values.view(np.uint32), layout)
    >>> len(data) < 30_000, bool((decode(Cursor(data, "x"), layout) == values.view(np.uint32)).all())
    (True, True)
    """
    if layout.element.family in ("float", "sign-magnitude"):
        bits = (bits << 1 | bits >> (8 * layout.element.size - 1)).astype(layout.element.bits)
    planes = bits.reshape(-1, 1).view(np.uint8)
    out = b""
    for index in range(layout.element.size):
        plane = np.ascontiguousarray(planes[:, index])
        counts = np.bincount(plane, minlength=1).astype(np.int64)
        table = static.frequencies(counts)
        part = number(0) + plane.tobytes()
        if static.cost(counts, table) < 8 * len(plane):
            shape, coded = mixing.encode(table[None]), static.encode(plane.astype(np.uint16), table)
            coded = number(len(table)) + number(len(shape)) + shape + number(len(coded)) + coded
            part = coded if len(coded) < len(part) else part
        out += part
    return out


def decode(cursor: Cursor, layout: Layout) -> NDArray[np.unsignedinteger]:
    """The entries that `encode` was given, as unsigned integers, shape (count,).

    Raises:
        FileError: if the bytes aren't those of such a tensor.
    """
    planes = np.zeros((layout.count, layout.element.size), np.uint8)
    for index in range(layout.element.size):
        size = cursor.number("the size of a table", 256)
        if size == 0:
            planes[:, index] = np.frombuffer(cursor.take(layout.count, "a plane of bytes"), np.uint8)
            continue
        shape = cursor.take(cursor.number("the length of a table"), "a table")
        coded = cursor.take(cursor.number("the length of a plane"), "a plane of bytes")
        planes[:, index] = static.decode(coded, layout.count, mixing.decode(shape, (1, size))[0])
    bits = planes.view(layout.element.bits).reshape(-1)
    if layout.element.family in ("float", "sign-magnitude"):
        bits = (bits >> 1 | bits << (8 * layout.element.size - 1)).astype(layout.element.bits)
    return bits
