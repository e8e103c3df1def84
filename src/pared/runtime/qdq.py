"""Quantize and dequantize as PyTorch operators with an ONNX translation, so that int8 networks export as they are.

    pared::quantize(x, scale, zero_point, axis)              float -> integers of zero_point's type
    pared::dequantize(q, scale, zero_point, axis)            integers -> float
    pared::quantize_dequantize(x, scale, zero_point, axis, highest)   both, with the straight-through gradient

The affine map is real = scale * (integer - zero_point) (Jacob et al. 2018, 1712.05877, section 2.1), rounding half to even and dividing
by the scale, as the ONNX operators do, so that PyTorch and an engine agree on ties. A zero-dimensional scale covers the whole tensor,
a one-dimensional one has an entry for each index of `axis`. The type of `zero_point` (int8, uint8 or int32) is the type of the integers.
Fewer bits than the type has are integers of that type up to `highest`: there is no engine with kernels for less than 8 bits.

>>> x, scale, zero_point = torch.tensor([-1.0, 0.0, 0.26]), torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8)
>>> quantize(x, scale, zero_point)
tensor([0, 3, 6], dtype=torch.uint8)
>>> dequantize(quantize(x, scale, zero_point), scale, zero_point)
tensor([-0.3000,  0.0000,  0.3000])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from torch import Tensor


@torch.library.custom_op("pared::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0) -> Tensor:
    """Round `x / scale` half to even, add the zero point and clamp to the type of `zero_point`; the shape is that of `x`."""
    limits = torch.iinfo(zero_point.dtype)
    levels = torch.round(x / _along(scale, x, axis)) + _along(zero_point, x, axis).to(x.dtype)
    return levels.clamp(limits.min, limits.max).to(zero_point.dtype)


@torch.library.custom_op("pared::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = 0) -> Tensor:
    """Return `(q - zero_point) * scale` in the scale's type; no zero point means 0, which symmetric weights use."""
    levels = q.to(torch.int32)
    if zero_point is not None:
        levels = levels - _along(zero_point, q, axis).to(torch.int32)
    return levels.to(scale.dtype) * _along(scale, q, axis)


@torch.library.custom_op("pared::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0, highest: int = 255) -> Tensor:
    """Return `dequantize(quantize(x))`; the gradient passes unchanged where `x` lies in the range and is zero where it was clamped.

    The straight-through estimator (Bengio et al. 2013, 1308.3432): one operator, because integers carry no gradient in PyTorch.
    Integers above `highest` become `highest`.
    """
    return dequantize(quantize(x, scale, zero_point, axis).clamp(max=_highest(zero_point, highest)), scale, zero_point, axis)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = 0) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0, highest: int = 255) -> Tensor:
    return torch.empty_like(x, dtype=scale.dtype)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
    x, scale, zero_point, axis, highest = inputs
    levels = torch.round(x / _along(scale, x, axis)) + _along(zero_point, x, axis).to(x.dtype)
    ctx.save_for_backward((levels >= torch.iinfo(zero_point.dtype).min) & (levels <= _highest(zero_point, highest)))


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    (inside,) = ctx.saved_tensors
    return gradient * inside, None, None, None, None


def _highest(zero_point: Tensor, highest: int) -> int:
    return min(torch.iinfo(zero_point.dtype).max, highest)


quantize_dequantize.register_autograd(_straight_through, setup_context=_remember)


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Shape one-dimensional `values` so that they broadcast along `axis` of `like`."""
    if values.dim() == 0:
        return values
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _onnx_quantize(x: Any, scale: Any, zero_point: Any, axis: int = 0) -> Any:
    return op.QuantizeLinear(x, scale, zero_point, axis=axis)


def _onnx_dequantize(q: Any, scale: Any, zero_point: Any = None, axis: int = 0) -> Any:
    if zero_point is None and q.dtype == ir.DataType.INT8:
        # ONNX Runtime computes Gemm in int8 only if the zero point of the weight is spelled out
        zeros: Any = ir.tensor(np.zeros(tuple(int(size) for size in scale.shape), np.int8))
        zero_point = op.Constant(value=zeros)
    return op.DequantizeLinear(q, scale, zero_point, axis=axis)


def _onnx_quantize_dequantize(x: Any, scale: Any, zero_point: Any, axis: int = 0, highest: int = 255) -> Any:
    integers: Any = op.QuantizeLinear(x, scale, zero_point, axis=axis)
    if highest < 255:  # on integers, so that the engine still sees a layer between integers
        largest: Any = ir.tensor(np.array(highest, np.uint8))
        bound: Any = op.Constant(value=largest)
        integers = op.Min(integers, bound)
    return op.DequantizeLinear(integers, scale, zero_point, axis=axis)


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ONNX translation of the three operators, for the `custom_translation_table` of `torch.onnx.export`."""
    return {
        torch.ops.pared.quantize.default: _onnx_quantize,
        torch.ops.pared.dequantize.default: _onnx_dequantize,
        torch.ops.pared.quantize_dequantize.default: _onnx_quantize_dequantize,
    }
