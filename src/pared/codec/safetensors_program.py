"""Safetensors files without their tensors' entries: the header, as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pared.codec.elements import ELEMENTS, MOST_AXES, Layout
from pared.codec.split import Split, Tensor, mapped
from pared.core.errors import FileError

_LONGEST = 100_000_000  # bytes of a header, as in the safetensors library
_ELEMENTS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip


def split(path: Path) -> Split:
    """Map a file into memory and take it apart.

    Raises:
        FileError: if it is no safetensors file.
    """
    whole = mapped(path)
    size = int.from_bytes(whole[:8], "little")
    if len(whole) < 8 or size > min(_LONGEST, len(whole) - 8):
        raise FileError(f"{path}: this is no safetensors file, or it is cut off.")
    program, body = bytes(whole[8 : 8 + size]), whole[8 + size :]
    tensors, starts = parse(program, str(path))
    if sum(tensor.layout.size for tensor in tensors) != len(body):
        raise FileError(f"{path}: the header speaks of other tensors than there are: the file is cut off or damaged.")
    data = [body[start : start + tensor.layout.size] for tensor, start in zip(tensors, starts, strict=True)]
    return Split(program, tensors, data)


def parse(program: bytes, name: str) -> tuple[list[Tensor], list[int]]:
    """What a header names, in the order of the entries, and where each begins.

    Raises:
        FileError: if it isn't a header, or tensors overlap or leave holes.
    """
    try:
        header = json.loads(program, object_pairs_hook=_no_twins)
        found = [_tensor(key, value) for key, value in header.items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(f"{name}: the header isn't that of a safetensors file ({error}).") from None
    found.sort(key=lambda pair: (pair[1], pair[1] + pair[0].layout.size, pair[0].name))
    place = 0
    for tensor, start in found:
        if start != place:
            raise FileError(f"{name}: tensor {tensor.name!r} begins at byte {start:,} instead of {place:,}.")
        place += tensor.layout.size
    return [tensor for tensor, _ in found], [start for _, start in found]


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _tensor(name: str, entry: Any) -> tuple[Tensor, int]:
    name.encode()  # half of a pair of surrogates is no text
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > MOST_AXES:
        raise ValueError(f"tensor {name!r} has {len(shape)} axes, and at most {MOST_AXES} are possible")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in (*shape, start, end)) or start > end:
        raise ValueError(f"tensor {name!r} has impossible sizes")
    element = ELEMENTS.get(_ELEMENTS.get(entry["dtype"], ""))
    if element is None:
        return Tensor(name, Layout(ELEMENTS["bytes"], (end - start,))), start
    layout = Layout(element, shape)
    if math.prod(shape) * element.size != end - start:
        raise ValueError(f"tensor {name!r} has {end - start:,} bytes, which isn't what its shape needs")
    return Tensor(name, layout), start
