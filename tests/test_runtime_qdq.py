"""Quantize and dequantize: against numpy, against ONNX Runtime, and their gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.runtime import Engine, export
from pared.runtime.qdq import dequantize, quantize, quantize_dequantize

CASES = [
    (torch.tensor(0.5), torch.tensor(3, dtype=torch.uint8), 0),
    (torch.tensor(0.25), torch.tensor(-7, dtype=torch.int8), 0),
    (torch.tensor([0.5, 0.1, 2.0]), torch.tensor([0, 5, -5], dtype=torch.int8), 1),
    (torch.tensor([0.5, 0.1]), torch.tensor([0, 250], dtype=torch.uint8), 0),
]


def numpy_twin(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * x.ndim
    if scale.ndim:
        shape[axis] = -1
    low, high = np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max
    return np.clip(np.rint(x / scale.reshape(shape)) + zero.astype(np.float32).reshape(shape), low, high).astype(zero.dtype)


@pytest.mark.parametrize(("scale", "zero_point", "axis"), CASES)
def test_equals_numpy(scale: Tensor, zero_point: Tensor, axis: int) -> None:
    # ties (0.25 / 0.5), values out of range, and ordinary ones
    x = torch.tensor([[0.25, 0.75, -0.25], [1000.0, -1000.0, 0.3]])
    integers = numpy_twin(x.numpy(), scale.numpy(), zero_point.numpy(), axis)
    assert quantize(x, scale, zero_point, axis).numpy().tolist() == integers.tolist()
    shape = [1, 1]
    if scale.dim():
        shape[axis] = -1
    real = (integers.astype(np.float32) - zero_point.numpy().astype(np.float32).reshape(shape)) * scale.numpy().reshape(shape)
    np.testing.assert_array_equal(dequantize(torch.from_numpy(integers), scale, zero_point, axis).numpy(), real)
    np.testing.assert_array_equal(quantize_dequantize(x, scale, zero_point, axis).numpy(), real)


def test_ties_go_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)).tolist() == [0, 2, 2, 0, -2]


def test_gradient_passes_inside_the_range_only() -> None:
    x = torch.tensor([-1.0, 0.0, 0.12, 25.4, 25.5, 26.0], requires_grad=True)  # 255 * 0.1 = 25.5 is the top
    quantize_dequantize(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.uint8)).backward(torch.arange(1.0, 7.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


@pytest.mark.parametrize("name", ["quantize", "quantize_dequantize"])
def test_operators_are_registered_soundly(name: str) -> None:
    arguments = (torch.randn(2, 3), torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8), 0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.pared, name).default, arguments, test_utils=checks)
    torch.library.opcheck(
        torch.ops.pared.dequantize.default, (torch.ones(2, 3, dtype=torch.int8), torch.ones(2), None, 0), test_utils=checks
    )


class Stored(nn.Module):
    weight: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-63, 64, (64, 48), dtype=torch.int8, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("scale", torch.linspace(0.01, 0.02, 64))
        self.register_buffer("input_scale", torch.tensor(0.1))
        self.register_buffer("input_zero", torch.tensor(128, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        x = dequantize(quantize(x, self.input_scale, self.input_zero), self.input_scale, self.input_zero)  # type: ignore[arg-type]
        return nn.functional.linear(x, dequantize(self.weight, self.scale, None, 0))


def test_onnx_holds_int8_and_agrees(tmp_path: Path) -> None:
    model = Stored()
    file = export(model, torch.randn(2, 48), tmp_path / "stored.onnx")
    assert file.stat().st_size < 64 * 48 + 1000
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(Engine(file).run(x.numpy())[0], model(x).numpy(), rtol=1e-5, atol=1e-4)
