"""`pack`, `unpack` and `inspect`: whole files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from pared.codec import onnx_program, safetensors_program, tensors
from pared.codec.container import PackedFile, Source, in_turn, write
from pared.codec.elements import ELEMENTS
from pared.codec.split import Split
from pared.codec.tensors import Prefer, coding_name
from pared.core.errors import FileError
from pared.core.files import atomic_path

LARGEST_ONNX = (1 << 31) - 1
"""Bytes of the largest ONNX file."""

Progress = Callable[[int], None]
_SUFFIXES = {".safetensors": Source.SAFETENSORS, ".onnx": Source.ONNX}


@dataclass(frozen=True)
class Stored:
    """One tensor of a packed file.

    Args:
        name: its name.
        element: type of its entries.
        shape: sizes of its axes.
        coding: how it is stored, in words.
        size: bytes of its entries.
        stored: bytes that it takes in the file.
    """

    name: str
    element: str
    shape: tuple[int, ...]
    coding: str
    size: int
    stored: int

    @property
    def bits(self) -> float:
        """Bits that each entry takes in the file."""
        return 8 * self.stored / max(self.size // ELEMENTS[self.element].size, 1)


@dataclass(frozen=True)
class Inspection:
    """What a packed file holds, and where its bytes go.

    Args:
        source: "onnx" or "safetensors".
        tensors: in the file's order.
        program: bytes of the head of the file: the packed program, lengths and checksums.
        weights: bytes of all tensors, with zeros that a file is filled up with.
        original: bytes of the unpacked program and entries.
    """

    source: str
    tensors: tuple[Stored, ...]
    program: int
    weights: int
    original: int

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return self.program + self.weights


def pack(source: str | Path, target: str | Path, prefer: Prefer = "auto", *, threads: int = 1, progress: Progress | None = None) -> None:
    """Pack an ONNX or safetensors file without losing a bit of it; the file is read back and compared before it appears.

    Args:
        source: the file, `.onnx` or `.safetensors`; tensors in files beside an ONNX model become part of the packed file.
        target: where to write.
        prefer: which codings may be chosen. "auto" takes the adaptive one only where it saves 2 %, as it is tens of times slower to
            read; "smallest" takes it wherever it saves anything; "static" and "huffman" never; "raw" packs only the program.
        threads: that work on tensors at once.
        progress: called with the bytes of entries that were coded last, and again when they were checked.

    Raises:
        FileError: if the source is missing, damaged or of another type.
        RunError: if the target can't be written.

    >>> import numpy as np, tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"weight": np.zeros((300, 784), np.float32)}, f"{folder}/w.safetensors")
    ...     pack(f"{folder}/w.safetensors", f"{folder}/w.pared")
    ...     unpack(f"{folder}/w.pared", f"{folder}/again.safetensors")
    ...     same = Path(f"{folder}/w.safetensors").read_bytes() == Path(f"{folder}/again.safetensors").read_bytes()
    ...     inspect(f"{folder}/w.pared").tensors[0].coding, same
    ('grid, constant', True)
    """
    source, target = Path(source), Path(target)
    split, kind = take_apart(source)

    def code(index: int) -> bytes:
        coded = tensors.encode(split.data[index], split.tensors[index].layout, prefer)
        if progress is not None:
            progress(split.tensors[index].layout.size)
        return coded

    coded = list(in_turn(code, range(len(split.tensors)), threads))
    with atomic_path(target) as temporary:
        write(split, kind, temporary, coded)
        _compare(split, PackedFile(temporary), threads, progress)


def unpack(source: str | Path, target: str | Path, *, threads: int = 1, progress: Progress | None = None) -> None:
    """Write the file that was packed: a safetensors file byte for byte, an ONNX model as an equal message with equal tensors.

    Args:
        source: the `.pared` file.
        target: where to write, `.onnx` or `.safetensors`, whichever was packed.
        threads: that decode at once.
        progress: called with the bytes of entries that were decoded last.

    Raises:
        FileError: if the source is damaged, or holds something else than the target's name says.
        RunError: if the target can't be written.
    """
    packed, target = PackedFile(source), Path(target)
    suffix = f".{packed.source.name.lower()}"
    if target.suffix in _SUFFIXES and target.suffix != suffix:
        raise FileError(f"{target}: {packed.path} holds a {suffix} file. Give the target that suffix.")
    if packed.source is Source.ONNX:
        model = to_onnx(packed, threads, progress)
        with atomic_path(target) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        return
    _, starts = safetensors_program.parse(packed.program, str(packed.path))
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        head = len(packed.program).to_bytes(8, "little") + packed.program
        file.write(head)
        for index, content in packed.contents(threads, progress):
            file.seek(len(head) + starts[index])
            file.write(content)
        file.truncate(len(head) + sum(tensor.layout.size for tensor in packed.tensors))


def to_onnx(packed: PackedFile, threads: int = 1, progress: Progress | None = None) -> onnx.ModelProto:
    """The model in a packed file.

    Raises:
        FileError: if the file is damaged, holds no model, or one that is too large for an ONNX file.
    """
    if packed.source is not Source.ONNX:
        raise FileError(f"{packed.path}: it holds tensors only, no model. Unpack it to a .safetensors file.")
    size = len(packed.program) + sum(tensor.layout.size for tensor in packed.tensors)
    if size > LARGEST_ONNX:
        raise FileError(f"{packed.path}: the model has {size:,} bytes; an ONNX file holds at most {LARGEST_ONNX:,}.")
    model, _, messages = onnx_program.parse(packed.program, str(packed.path))
    for index, content in packed.contents(threads, progress):
        onnx_program.fill(messages[index], content)
    return model


def inspect(path: str | Path) -> Inspection:
    """Read where a packed file's bytes go; all of it is decoded on the way, so a damaged file is found.

    Raises:
        FileError: if the file is damaged.
    """
    packed = PackedFile(path)
    rows: dict[int, Stored] = {}
    for block in packed.blocks:
        for one in packed.walk(block):
            name, layout = packed.tensors[one.index]
            rows[one.index] = Stored(name, layout.element.name, layout.shape, coding_name(one.code), layout.size, one.stored)
    listed = tuple(rows[index] for index in range(len(packed.tensors)))
    weights = packed.path.stat().st_size - packed.head_bytes
    original = len(packed.program) + sum(row.size for row in listed)
    return Inspection(packed.source.name.lower(), listed, packed.head_bytes, weights, original)


def take_apart(path: Path) -> tuple[Split, Source]:
    """The program and the tensors of a file, by its suffix.

    Raises:
        FileError: if it is missing, damaged or of another type.
    """
    if not path.is_file():
        raise FileError(f"{path}: there is no such file.")
    if path.suffix not in _SUFFIXES:
        raise FileError(f"{path}: only .onnx and .safetensors files can be packed. Export the network first (`pared.runtime.export`).")
    if _SUFFIXES[path.suffix] is Source.SAFETENSORS:
        return safetensors_program.split(path), Source.SAFETENSORS
    return onnx_program.split(onnx_program.read(path), str(path)), Source.ONNX


def _compare(split: Split, packed: PackedFile, threads: int, progress: Progress | None) -> None:
    """Hold what was written against what it was made from."""
    same = packed.program == split.program and list(packed.tensors) == list(split.tensors)
    for index, content in packed.contents(threads, progress):
        same = same and content == split.data[index]
    if not same:
        raise AssertionError(f"{packed.path}: what was packed isn't what comes out. This is a fault of pared; the file wasn't written.")
