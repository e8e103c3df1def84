"""ONNX models without their tensors' entries, and with them again. The program is a model whose large tensors hold one byte: where from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto

from pared.codec.elements import ELEMENTS, MOST_AXES, Layout
from pared.codec.split import Split, Tensor, unique_names
from pared.core.errors import FileError

LEAST = 16
"""Bytes from which on a tensor's entries leave the program."""

_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
"""Where entries can be; a moved tensor holds the number of its field as one byte."""

_TYPED = {"float_data": "float32", "int32_data": "int32", "int64_data": "int64", "double_data": "float64", "uint64_data": "uint64"}
_ELEMENTS = {
    TensorProto.FLOAT: "float32", TensorProto.UINT8: "uint8", TensorProto.INT8: "int8", TensorProto.UINT16: "uint16",
    TensorProto.INT16: "int16", TensorProto.INT32: "int32", TensorProto.INT64: "int64", TensorProto.BOOL: "bool",
    TensorProto.FLOAT16: "float16", TensorProto.DOUBLE: "float64", TensorProto.UINT32: "uint32", TensorProto.UINT64: "uint64",
    TensorProto.COMPLEX64: "complex64", TensorProto.COMPLEX128: "complex128", TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "float8_e4m3fn", TensorProto.FLOAT8E4M3FNUZ: "float8_e4m3fnuz", TensorProto.FLOAT8E5M2: "float8_e5m2",
    TensorProto.FLOAT8E5M2FNUZ: "float8_e5m2fnuz", 24: "float8_e8m0fnu",
}  # fmt: skip
_AT_ONCE = 1 << 16  # entries that are python objects at a time
_HALF_BYTES = (21, 22, 23)  # uint4, int4, float4e2m1
_QUARTER_BYTES = (25, 26)  # uint2, int2


def read(path: Path) -> onnx.ModelProto:
    """Read a model with the tensors that lie in files beside it, which are then part of it.

    Raises:
        FileError: if it is no ONNX model, or a file beside it is missing or lies elsewhere.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise FileError(f"{path}: this is no ONNX model, or it is damaged ({error}).") from None
    if not model.HasField("graph"):
        raise FileError(f"{path}: this is no ONNX model: there is no graph in it.")
    for tensor in tensor_messages(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        except Exception as error:
            raise FileError(f"{path}: the entries of {tensor.name!r} can't be read from a file beside it ({error}).") from None
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    return model


def split(model: onnx.ModelProto, name: str) -> Split:
    """Take the entries of all larger tensors out of `model`, which is changed.

    Args:
        model: a model.
        name: of its file, for messages.

    Raises:
        FileError: if a tensor's data doesn't fit its shape.
    """
    names: list[str] = []
    layouts: list[Layout] = []
    data: list[bytes] = []
    for tensor in tensor_messages(model):
        layout = _layout(tensor, name)
        if layout is None or layout.size < LEAST:
            continue
        moved = _entries(tensor, layout)
        if moved is None:
            if len(tensor.raw_data) == 1:
                raise FileError(f"{name}: the data of tensor {tensor.name!r} doesn't fit its shape {list(tensor.dims)}.")
            continue
        field, content = moved
        names.append(_name(tensor, name))
        layouts.append(layout)
        data.append(content)
        tensor.ClearField(field)
        tensor.raw_data = bytes([_FIELDS.index(field)])
    tensors = [Tensor(*pair) for pair in zip(unique_names(names), layouts, strict=True)]
    return Split(model.SerializeToString(deterministic=True), tensors, data)


def parse(program: bytes, name: str) -> tuple[onnx.ModelProto, list[Tensor], list[TensorProto]]:
    """The model of a program, what its moved tensors are, and these themselves, in one order.

    Raises:
        FileError: if it isn't the program of a model.
    """
    try:
        model = onnx.ModelProto.FromString(program)
    except DecodeError as error:
        raise FileError(f"{name}: the program is no ONNX model ({error}).") from None
    found: list[tuple[TensorProto, Layout]] = []
    for tensor in tensor_messages(model):
        if tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data):
            raise FileError(f"{name}: the program says of tensor {tensor.name!r} that its entries are in another file, which isn't read.")
        if (layout := _moved(tensor, name)) is not None:
            found.append((tensor, layout))
    names = unique_names([_name(tensor, name) for tensor, _ in found])
    return model, [Tensor(*pair) for pair in zip(names, (layout for _, layout in found), strict=True)], [tensor for tensor, _ in found]


def fill(tensor: TensorProto, content: bytes) -> None:
    """Put entries back to where they were."""
    field = _FIELDS[tensor.raw_data[0]]
    if field == "raw_data":
        tensor.raw_data = content
        return
    tensor.ClearField("raw_data")
    entries = np.frombuffer(content, ELEMENTS[_TYPED[field]].dtype)
    for start in range(0, len(entries), _AT_ONCE):
        getattr(tensor, field).extend(entries[start : start + _AT_ONCE].tolist())


def tensor_messages(message: Message) -> Iterator[Any]:
    """All tensors in a message, wherever they are: initializers, attributes, subgraphs, functions, training information."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if _repeated(value) else (value,):
            if isinstance(part, TensorProto):
                yield part
            elif isinstance(part, Message):
                yield from tensor_messages(part)


def _repeated(value: Any) -> bool:
    return not isinstance(value, Message)


def _name(tensor: TensorProto, name: str) -> str:
    """A tensor's name, which protobuf gives as bytes where it isn't text."""
    if not isinstance(tensor.name, str):
        raise FileError(f"{name}: the name of a tensor is no text: {tensor.name!r}.")
    return tensor.name


def _layout(tensor: TensorProto, name: str) -> Layout | None:
    """Type and shape; types below a byte are rows of bytes, text has none."""
    dims = tuple(tensor.dims[: MOST_AXES + 1])
    if len(dims) > MOST_AXES or any(size < 0 for size in dims):
        raise FileError(f"{name}: tensor {tensor.name!r} has a shape that no array can have: {list(dims)}.")
    count = math.prod(dims)
    if tensor.data_type in _HALF_BYTES or tensor.data_type in _QUARTER_BYTES:
        each = 2 if tensor.data_type in _HALF_BYTES else 4
        return Layout(ELEMENTS["bytes"], ((count + each - 1) // each,))
    element = _ELEMENTS.get(tensor.data_type)
    return Layout(ELEMENTS[element], dims) if element else None


def _entries(tensor: TensorProto, layout: Layout) -> tuple[str, bytes] | None:
    """The field that holds all entries, and these; None if no single one does."""
    used = [field for field in (*_FIELDS, "string_data") if len(getattr(tensor, field))]
    if used == ["raw_data"]:
        return ("raw_data", tensor.raw_data) if len(tensor.raw_data) == layout.size else None
    if len(used) != 1 or _TYPED.get(used[0]) != layout.element.name or len(getattr(tensor, used[0])) != layout.count:
        return None
    return used[0], np.array(getattr(tensor, used[0]), layout.element.dtype).tobytes()


def _moved(tensor: TensorProto, name: str) -> Layout | None:
    """The layout of a tensor whose entries aren't in the program, or None."""
    if len(tensor.raw_data) != 1:
        return None
    layout = _layout(tensor, name)
    if layout is None or layout.size < LEAST:
        return None
    if tensor.raw_data[0] >= len(_FIELDS):
        raise FileError(f"{name}: the program says of tensor {tensor.name!r} that its entries are in a field that doesn't exist.")
    field = _FIELDS[tensor.raw_data[0]]
    if field != "raw_data" and _TYPED[field] != layout.element.name:
        raise FileError(f"{name}: the program says of tensor {tensor.name!r} that its entries are of another type.")
    return layout
