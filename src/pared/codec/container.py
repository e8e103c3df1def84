"""The file `.pared`: a program and its tensors in blocks, written whole, read tensor by tensor. FORMAT.md has the bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from importlib import resources
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import zstandard

from pared.codec import frames, onnx_program, safetensors_program, tensors
from pared.codec.cursor import Cursor, checksum, number
from pared.codec.split import Split, Tensor, mapped
from pared.core.errors import FileError

_In = TypeVar("_In")
_Out = TypeVar("_Out")

MAGIC = b"\x8dPRD"
VERSION = 1
SMALL = 1 << 16
"""Bytes of entries up to which tensors share a block."""

RATIO = 1 << 8
"""A file holds at most so many bytes for each of its own, beyond `FREE`: no reader reserves more memory than a file can be worth."""

FREE = 1 << 24
"""Bytes that any file may hold, however small it is."""

_PROGRAM_WEIGHT = 1 << 4  # bytes of entries that one of the program counts for, as it becomes many small objects
_LARGEST_PROGRAM = (1 << 31) - 1


class Source(IntEnum):
    """What a file was packed from; the numbers are those in the file."""

    SAFETENSORS = 0
    ONNX = 1


@dataclass(frozen=True)
class Block:
    """Tensors that are stored together.

    Args:
        members: which of the file's tensors.
        offset: where the block begins.
        length: its bytes.
        checksum: CRC-32 of these.
    """

    members: tuple[int, ...]
    offset: int
    length: int
    checksum: bytes


class Decoded(NamedTuple):
    """A tensor that was read: which one, its entries, the byte that says how it is coded, and how many bytes it took."""

    index: int
    content: bytes
    code: int
    stored: int


class PackedFile:
    """A `.pared` file, opened: nothing but the program is read until it is asked for.

    Args:
        path: the file.

    Attributes:
        source: what it was packed from.
        program: all of that but the tensors' entries.
        tensors: names, types and shapes, in the file's order.
        blocks: where they are.
        head_bytes: of the file before its first block, with the program in them.

    Raises:
        FileError: if it is missing, cut off, damaged, forged or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileError(f"{self.path}: there is no such file.")
        self._data = mapped(self.path)
        cursor = Cursor(self._data, str(self.path))
        if bytes(self._data[: len(MAGIC)]) != MAGIC:
            raise cursor.error("this is no .pared file")
        cursor.take(len(MAGIC), "the magic number")
        version = cursor.take(1, "the version")[0]
        if version != VERSION:
            raise cursor.error(f"its version is {version}, this pared reads version {VERSION}; a newer pared may read it")
        source = cursor.take(1, "what it was packed from")[0]
        if source not in list(Source):
            raise cursor.error(f"it was packed from something unknown ({source})")
        self.source = Source(source)
        self.program = _read_program(cursor)
        self.tensors: Sequence[Tensor] = parse_program(self.source, self.program, str(self.path))
        self.blocks = self._index(cursor)
        self.head_bytes = self.blocks[0].offset if self.blocks else len(self._data)

    def _index(self, cursor: Cursor) -> list[Block]:
        groups = grouped(self.tensors)
        found = [(cursor.number("the length of a block"), bytes(cursor.take(4, "a checksum"))) for _ in groups]
        head = cursor.data[: cursor.place]
        if bytes(cursor.take(4, "a checksum")) != checksum(head):
            raise cursor.error("its head is damaged: the checksum differs")
        blocks, offset = [], cursor.place
        for group, (length, crc) in zip(groups, found, strict=True):
            blocks.append(Block(tuple(group), offset, length, crc))
            offset += length
        size = sum(tensor.layout.size for tensor in self.tensors)
        least = _check_worth(cursor, len(self.program), size)
        if len(cursor.data) != max(offset, least):
            raise cursor.error(f"it has {len(cursor.data):,} bytes instead of {offset:,}: it is cut off or something was added")
        if np.frombuffer(cursor.data[offset:], np.uint8).any():
            raise cursor.error("there is something after the last tensor")
        return blocks

    def read(self, name: str) -> np.ndarray:
        """One tensor by its name, without reading the others (but for small ones in the same block).

        Returns:
            An array of its type and shape; types that numpy lacks, such as bfloat16, come as unsigned integers of the same bits.

        Raises:
            FileError: if there is no such tensor, or its block is damaged.
        """
        names = [tensor.name for tensor in self.tensors]
        if name not in names:
            raise FileError(f"{self.path}: there is no tensor {name!r}; `pared inspect` lists them.")
        index = names.index(name)
        block = next(block for block in self.blocks if index in block.members)
        layout = self.tensors[index].layout
        content = dict(self.decode(block))[index]
        return np.frombuffer(content, layout.element.dtype).reshape(layout.shape)

    def decode(self, block: Block) -> list[tuple[int, bytes]]:
        """The tensors of a block, as their numbers and entries.

        Raises:
            FileError: if it is damaged.
        """
        return [(one.index, one.content) for one in self.walk(block)]

    def walk(self, block: Block) -> Iterator[Decoded]:
        """The tensors of a block one by one, with how each of them is stored.

        Raises:
            FileError: if the block is damaged.
        """
        cursor = self._open(block)
        for index in block.members:
            start = cursor.place
            content = self._one(cursor, index)
            yield Decoded(index, content, cursor.data[start], cursor.place - start)
        if cursor.left:
            raise cursor.error(f"there is something after tensor {self.tensors[block.members[-1]].name!r}, the last of its block")

    def _open(self, block: Block) -> Cursor:
        payload = self._data[block.offset : block.offset + block.length]
        if checksum(payload) != block.checksum:
            first = self.tensors[block.members[0]].name
            raise FileError(f"{self.path}: the block of tensor {first!r} is damaged: the checksum differs.")
        return Cursor(payload, str(self.path))

    def _one(self, cursor: Cursor, index: int) -> bytes:
        tensor = self.tensors[index]
        try:
            return tensors.decode(cursor, tensor.layout)
        except FileError as error:
            reason = str(error).removeprefix(f"{self.path}: ")
            raise FileError(f"{self.path}: tensor {tensor.name!r}: {reason}") from None
        except (ValueError, OverflowError, MemoryError) as error:  # a shape that no array can have, or more than this machine has
            raise FileError(f"{self.path}: tensor {tensor.name!r} can't be held in memory ({error}).") from None

    def contents(self, threads: int = 1, progress: Callable[[int], None] | None = None) -> Iterator[tuple[int, bytes]]:
        """All tensors as their numbers and entries, block by block.

        Args:
            threads: that decode blocks at once; each holds one block in memory.
            progress: called with the bytes of entries that were decoded last.
        """
        for found in in_turn(self.decode, self.blocks, threads):
            for index, content in found:
                yield index, content
                if progress is not None:
                    progress(len(content))


def write(split: Split, source: Source, path: Path, coded: Sequence[bytes]) -> None:
    """Write a file: `coded` are the tensors as `tensors.encode` gives them."""
    payloads = []
    for group in grouped(split.tensors):
        payloads.append(b"".join(coded[index] for index in group))
    packed = frames.pack(split.program, bare=True, dictionary=_dictionary())
    head = MAGIC + bytes([VERSION, source]) + number(len(split.program)) + number(len(packed)) + packed
    head += b"".join(number(len(payload)) + checksum(payload) for payload in payloads)
    with path.open("wb") as file:
        file.write(head + checksum(head))
        for payload in payloads:
            file.write(payload)
        file.write(b"\0" * (least_length(len(split.program), sum(tensor.layout.size for tensor in split.tensors)) - file.tell()))


def least_length(program: int, size: int) -> int:
    """Bytes that a file has at least with so many bytes of program and of entries.

    >>> least_length(1000, 1 << 20), least_length(1000, 100 << 20)
    (0, 344127)
    """
    return max(-(-(_PROGRAM_WEIGHT * program + size - FREE) // RATIO), 0)


def _check_worth(cursor: Cursor, program: int, size: int) -> int:
    least = least_length(program, size)
    if len(cursor.data) < least:
        claims = f"{len(cursor.data):,} bytes claim to hold {program:,} bytes of program and {size:,} of entries"
        raise cursor.error(f"{claims}, which is more than the format allows: it is cut off or forged")
    return least


def grouped(listed: Sequence[Tensor]) -> list[list[int]]:
    """Which tensors share a block: large ones have one each, small ones follow together, up to 64 KiB of entries a block.

    >>> from pared.codec.elements import ELEMENTS, Layout
    >>> sizes = (10, 1 << 17, 30_000, 40_000)
    >>> grouped([Tensor("", Layout(ELEMENTS["uint8"], (size,))) for size in sizes])
    [[1], [0, 2], [3]]
    """
    large = [[index] for index, tensor in enumerate(listed) if tensor.layout.size > SMALL]
    small: list[list[int]] = []
    room = -1
    for index, tensor in enumerate(listed):
        if tensor.layout.size > SMALL:
            continue
        if tensor.layout.size > room or not small:
            small.append([])
            room = SMALL
        small[-1].append(index)
        room -= tensor.layout.size
    return large + small


def parse_program(source: Source, program: bytes, name: str) -> Sequence[Tensor]:
    """The tensors that a program speaks of."""
    if source is Source.ONNX:
        return onnx_program.parse(program, name)[1]
    return safetensors_program.parse(program, name)[0]


def in_turn(work: Callable[[_In], _Out], items: Sequence[_In], threads: int) -> Iterator[_Out]:
    """`work` on every item, the results in order, no more than `threads` items ahead."""
    if threads <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(work, item) for item in items[:threads]]
        for index in range(len(items)):
            result = running.pop(0).result()
            if index + threads < len(items):
                running.append(pool.submit(work, items[index + threads]))
            yield result


def _read_program(cursor: Cursor) -> bytes:
    size, length = cursor.number("the size of the program", _LARGEST_PROGRAM), cursor.number("the length of the program")
    packed = cursor.take(length, "the program")
    _check_worth(cursor, size, 0)
    try:
        return frames.unpack(packed, size, "the program", bare=True, dictionary=_dictionary())
    except FileError as error:
        raise FileError(f"{cursor.name}: {error}") from None


@functools.cache
def _dictionary() -> zstandard.ZstdCompressionDict:
    """Strings that programs have in common, which need not be stored in each of them."""
    data = resources.files("pared.codec").joinpath("program.dictionary").read_bytes()
    return zstandard.ZstdCompressionDict(data, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
