"""The IDX format of the MNIST family: a big-endian header of sizes, then bytes."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pared.core.errors import DataError

_UNSIGNED_BYTES = 0x08


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if it is gzip.

    Raises:
        DataError: if it can't be read or is damaged.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read ({error}). Get the file again.") from error


def parse_idx(content: bytes, axes: int, name: str) -> Tensor:
    """Decode the content of an IDX file of unsigned bytes.

    The format: two zero bytes, the type (8: unsigned byte), the number of axes, a 32-bit big-endian length for each axis, values.

    Args:
        content: the whole file, unpacked.
        axes: how many axes it must have: 3 for images, 1 for labels.
        name: of the file, for messages.

    Returns:
        uint8, shape as in the header.

    Raises:
        DataError: if it isn't such a file, or is longer or shorter than its header says.

    >>> parse_idx(b"\\0\\0\\x08\\x01\\0\\0\\0\\x02\\x07\\x09", 1, "labels")
    tensor([7, 9], dtype=torch.uint8)
    """
    start = 4 + 4 * axes
    if len(content) < start or content[:4] != bytes([0, 0, _UNSIGNED_BYTES, axes]):
        raise DataError(f"{name}: isn't an IDX file of unsigned bytes with {axes} axes. Get the file again.")
    shape = struct.unpack(f">{axes}I", content[4:start])
    expected = int(np.prod(shape, dtype=object))
    if len(content) - start != expected:
        raise DataError(f"{name}: holds {len(content) - start} values, but its header says {expected}. Get the file again.")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy().reshape(shape))
