"""Linear layers whose weights lie on grids of 4 or 2 bits become MatMulNBits, the engine's own operator for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

DOMAIN = "com.microsoft"
BLOCKS = (128, 64, 32, 16)
"""Consecutive weights of an output that share a scale, in the order in which they are tried: fewer scales are smaller and mostly faster."""

LEAST = 2**14
"""Weights of the smallest layer that is packed: below, the call itself is what takes time, in either form."""

_ACCURACY_LEVEL = 4  # activations in int8; with 0, in float, 2 bits are up to forty times slower than float weights
_SMALLEST_OF_TWO_BITS = 32  # with blocks of 16 the engine has no fast kernel of 2 bits at any level
_LARGEST = 15  # what 4 bits hold on one side of 0
_CLOSE = 2.0**-20
_STEPS_AROUND = 3


class Packed(NamedTuple):
    """A weight of shape (outputs, inputs) as MatMulNBits takes it: weight = (integer - zero point) · scale, by blocks of inputs.

    Attributes:
        bits: 2 or 4.
        block: inputs of a block.
        integers: uint8, shape (outputs, blocks, bytes of a block), the first in the lowest bits.
        scales: float32, shape (outputs, blocks).
        zero_points: uint8, shape (outputs, bytes), packed likewise; None where all are 2^(bits - 1).
    """

    bits: int
    block: int
    integers: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


def pack_weight(weight: NDArray[np.float32]) -> Packed | None:
    """The packed form of a weight of shape (outputs, inputs), if it has one that gives every weight to the last bit.

    >>> weight = np.float32(0.1) * np.array([[-2, 1, 0, 1]], np.float32)
    >>> packed = pack_weight(weight)
    >>> packed.bits, packed.block, int(packed.integers[0, 0, 0]) == 0 + (3 << 2) + (2 << 4) + (3 << 6), packed.zero_points
    (2, 128, True, None)
    >>> pack_weight(np.array([[1.0, np.pi, np.e]], np.float32)) is None
    True
    """
    if weight.size == 0 or not np.isfinite(weight).all():
        return None
    for block in BLOCKS:
        if block > BLOCKS[-1] and _grids(weight[:1], block) is None:
            continue
        found = _grids(weight, block)
        if found is not None:
            return _packed(*found, block)
    return None


def pack_linear_layers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace, in place, products with a constant matrix of 16,384 weights or more that `pack_weight` has a form for.

    The weights stay what they are to the last bit. The engine rounds the inputs of such a layer to 8 bits, block by block, because its
    kernels for float inputs are slower than those of float weights: outputs change by some thousandths.

    Returns:
        The same model.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    packed: dict[tuple[str, bool], tuple[list[str], Packed] | None] = {}
    for node in model.graph.node:
        if not _is_product(node, initializers):
            continue
        as_rows = node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1
        key = (node.input[1], as_rows)
        if key not in packed:
            packed[key] = _packed_tensors(model, initializers[node.input[1]], as_rows)
        found = packed[key]
        if found is not None:
            _replace(node, *found, initializers[node.input[1]].dims[1 if as_rows else 0])
    if any(packed.values()):
        if not any(entry.domain == DOMAIN for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
        left = [tensor for tensor in model.graph.initializer if tensor.name in read]
        del model.graph.initializer[:]
        model.graph.initializer.extend(left)
    return model


def _is_product(node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type not in ("Gemm", "MatMul") or node.domain not in ("", "ai.onnx") or node.input[1] not in initializers:
        return False
    tensor = initializers[node.input[1]]
    if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2 or tensor.dims[0] * tensor.dims[1] < LEAST:
        return False
    if node.op_type == "MatMul":
        return True
    plain = _attribute(node, "alpha", 1.0) == 1.0 and _attribute(node, "beta", 1.0) == 1.0 and _attribute(node, "transA", 0) == 0
    outputs = tensor.dims[0] if _attribute(node, "transB", 0) == 1 else tensor.dims[1]
    bias = node.input[2] if len(node.input) > 2 else ""
    return plain and (not bias or (bias in initializers and list(initializers[bias].dims) == [outputs]))


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    found = [helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name]
    return found[0] if found else default


def _packed_tensors(model: onnx.ModelProto, tensor: onnx.TensorProto, as_rows: bool) -> tuple[list[str], Packed] | None:
    """The names of the packed form's tensors, which are added to the model."""
    weight = numpy_helper.to_array(tensor)
    packed = pack_weight(np.ascontiguousarray(weight if as_rows else weight.T))
    if packed is None:
        return None
    names = []
    for part, values in (("integers", packed.integers), ("scales", packed.scales.reshape(-1)), ("zero_points", packed.zero_points)):
        if values is not None:
            names.append(f"{tensor.name}.{part}.{int(as_rows)}")
            model.graph.initializer.append(numpy_helper.from_array(values if part != "zero_points" else values.reshape(-1), names[-1]))
    return names, packed


def _replace(node: onnx.NodeProto, names: list[str], packed: Packed, inputs: int) -> None:
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    zero_points = names[2:] or [""]
    operands = [node.input[0], *names[:2], *zero_points, "", bias]  # the empty one would reorder inputs
    while not operands[-1]:
        operands.pop()
    settings: dict[str, Any] = {
        "K": inputs,
        "N": len(packed.scales),
        "bits": packed.bits,
        "block_size": packed.block,
        "accuracy_level": _ACCURACY_LEVEL,
    }
    node.CopyFrom(helper.make_node("MatMulNBits", operands, list(node.output), node.name, domain=DOMAIN, **settings))


def _grids(weight: NDArray[np.float32], block: int) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Whole numbers, shape (outputs, blocks, block), and the scale of every block, so that their products are the weights; or None."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block)))
    blocks = padded.reshape(len(weight), -1, block)
    exact = blocks.astype(np.float64)
    peak = np.abs(exact).max(-1, keepdims=True)
    found = np.zeros(blocks.shape, np.int64)
    scales = np.ones(peak.shape, np.float32)
    open_ends = peak > 0
    for largest in range(1, _LARGEST + 1):
        step = np.where(peak > 0, peak, 1.0) / largest
        whole = np.rint(exact / step)
        fits = open_ends & (np.abs(exact - whole * step) <= _CLOSE * np.abs(exact)).all(-1, keepdims=True)
        for candidate in _around(step.astype(np.float32)):
            same = fits & (whole.astype(np.float32) * candidate == blocks).all(-1, keepdims=True)
            found = np.where(same, whole.astype(np.int64), found)
            scales = np.where(same, candidate, scales)
            fits, open_ends = fits & ~same, open_ends & ~same
        if not open_ends.any():
            break
    spread = np.maximum(found.max(-1), 0) - np.minimum(found.min(-1), 0)
    if open_ends.any() or (spread > _LARGEST).any():
        return None
    return found, scales[..., 0]


def _around(step: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The steps and their neighbours, as products are rounded."""
    found, below, above = [step], step, step
    for _ in range(_STEPS_AROUND):
        below, above = np.nextafter(below, np.float32(0)), np.nextafter(above, np.float32(np.inf))
        found += [below, above]
    return found


def _packed(found: NDArray[np.int64], scales: NDArray[np.float32], block: int) -> Packed:
    low, high = np.minimum(found.min(-1), 0), np.maximum(found.max(-1), 0)
    bits = 2 if block >= _SMALLEST_OF_TWO_BITS and int((high - low).max()) <= 3 else 4
    half = 2 ** (bits - 1)
    if low.min() >= -half and high.max() < half:
        return Packed(bits, block, _bytes(found + half, bits), scales, None)
    zero_points = -low
    return Packed(bits, block, _bytes(found + zero_points[..., None], bits), scales, _bytes(zero_points, bits))


def _bytes(integers: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Put the integers of the last axis into bytes, the first into the lowest bits."""
    each = 8 // bits
    padded = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, -integers.shape[-1] % each)])
    parts = padded.reshape(*padded.shape[:-1], -1, each)
    return (parts << (bits * np.arange(each))).sum(-1).astype(np.uint8)
