"""The types of a tensor's entries, as far as coding them goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Family = Literal["float", "sign-magnitude", "integer", "bytes"]


@dataclass(frozen=True)
class Element:
    """One type: floats that numpy computes with, others with a sign and a magnitude, integers, and bytes of unknown meaning.

    Args:
        name: as numpy or PyTorch spell it.
        dtype: in memory, always the lowest byte first.
        family: what its bits mean.
    """

    name: str
    dtype: str
    family: Family

    @property
    def size(self) -> int:
        """Bytes of one entry."""
        return np.dtype(self.dtype).itemsize

    @property
    def bits(self) -> np.dtype:
        """Unsigned integers of the same size."""
        return np.dtype(f"<u{self.size}")


MOST_AXES = 64
"""Axes that a tensor may have, as many as numpy's."""

ELEMENTS = {
    element.name: element
    for element in (
        *(Element(f"float{8 * size}", f"<f{size}", "float") for size in (2, 4, 8)),
        Element("bfloat16", "<u2", "sign-magnitude"),
        *(Element(f"float8_{kind}", "<u1", "sign-magnitude") for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")),
        *(Element(f"int{8 * size}", f"<i{size}", "integer") for size in (1, 2, 4, 8)),
        *(Element(f"uint{8 * size}", f"<u{size}", "integer") for size in (1, 2, 4, 8)),
        Element("bool", "<u1", "integer"),
        Element("complex64", "<u4", "sign-magnitude"),
        Element("complex128", "<u8", "sign-magnitude"),
        Element("bytes", "<u1", "bytes"),
    )
}
"""All types by name. Complex numbers are pairs of floats, types below a byte are bytes."""


@dataclass(frozen=True)
class Layout:
    """Type and shape of a tensor.

    Args:
        element: of its entries.
        shape: the sizes of its axes.
    """

    element: Element
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many entries there are."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """How many bytes they take."""
        return self.count * self.element.size

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix that is coded: the first axis against all others; a vector is one row."""
        if len(self.shape) < 2:
            return 1, self.count
        return self.shape[0], math.prod(self.shape[1:])


def ordered(bits: NDArray[np.unsignedinteger], family: Family) -> NDArray[np.unsignedinteger]:
    """Unsigned integers whose order is that of the numbers which `bits` stand for; integers and bytes keep their own.

    >>> ordered(np.array([-1.5, 0.0, 2.0], np.float32).view(np.uint32), "float").argsort().tolist()
    [0, 1, 2]
    """
    if family in ("integer", "bytes"):
        return bits
    top = bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    return np.where(bits & top, ~bits, bits | top).astype(bits.dtype)
