"""The arithmetic of int8: ranges, scales, integer weights, against numpy and on paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pared.quantize import affine_range, choose_qparams, quantize_weight


def histogram(values: Tensor, bins: int = 2048) -> tuple[Tensor, float, float]:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    return torch.histc(values, bins, low, high), low, high


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (-1.0, 1.55, 0.01, 100),
        (0.0, 2.55, 0.01, 0),
        (1.0, 2.55, 0.01, 0),  # widened to hold 0
        (-2.55, -1.0, 0.01, 255),
        (0.0, 0.0, 1.0, 0),
        (-0.0051, 2.5449, 0.01, 1),  # the zero point is rounded
    ],
)
def test_scale_and_zero_point(low: float, high: float, scale: float, zero_point: int) -> None:
    found = choose_qparams(low, high)
    assert found == (pytest.approx(scale), zero_point)
    assert found[0] * (found[1] - found[1]) == 0.0  # the real 0 is an integer


def test_values_survive_a_round_trip_within_half_a_step() -> None:
    values = np.linspace(-0.7, 1.3, 1001)
    scale, zero_point = choose_qparams(-0.7, 1.3)
    integers = np.clip(np.rint(values / scale) + zero_point, 0, 255)
    assert np.abs(scale * (integers - zero_point) - values).max() <= scale / 2 * 1.01 + scale * 0.5  # the last: the zero point's rounding
    assert integers.min() == 0
    assert integers.max() == 255


def test_tiny_range_does_not_divide_by_zero() -> None:
    scale, _ = choose_qparams(0.0, 1e-44)
    assert np.float32(scale) > 0


def test_minmax_holds_zero() -> None:
    assert affine_range(torch.ones(4), 2.0, 3.0) == (0.0, 3.0)
    assert affine_range(torch.ones(4), -3.0, -2.0) == (-3.0, 0.0)
    assert affine_range(torch.zeros(4), 0.0, 0.0, "mse") == (0.0, 0.0)


def test_outlier_wrecks_minmax_only() -> None:
    values = torch.cat([torch.randn(100_000), torch.tensor([500.0])])
    counts, low, high = histogram(values, 20_000)
    wide = affine_range(counts, low, high, "minmax")
    percentile = affine_range(counts, low, high, "percentile")
    squares = affine_range(counts, low, high, "mse")

    def error(limits: tuple[float, float]) -> float:
        scale, zero = choose_qparams(*limits)
        body = values[:-1]
        return float(((torch.round(body / scale) + zero).clamp(0, 255) - zero).mul(scale).sub(body).square().mean())

    assert wide == (low, 500.0)
    assert error(wide) > 100 * error(percentile)
    assert percentile == pytest.approx((-3.9, 3.9), abs=0.3)  # 0.005 % of a Gaussian lie beyond 3.89 on each side
    assert squares[1] < 500.0
    assert squares[1] / 500.0 == pytest.approx(squares[0] / low)


def test_percentile_against_numpy() -> None:
    values = torch.rand(50_000) ** 4 * 8
    counts, low, high = histogram(values)
    found = affine_range(counts, low, high, "percentile")
    assert found[0] == 0.0
    assert found[1] == pytest.approx(np.percentile(values.numpy(), 99.99), abs=2 * high / 2048)


def test_mse_is_the_least_of_all_candidates() -> None:
    values = torch.randn(20_000) ** 3
    counts, low, high = histogram(values)
    found = affine_range(counts, low, high, "mse", levels=16)
    centres = low + (np.arange(2048) + 0.5) * (high - low) / 2048

    def error(step: int) -> float:
        scale, zero = choose_qparams(low * step / 100, high * step / 100, 16)
        rounded = np.clip(np.rint(centres / scale) + zero, 0, 15)
        return float((counts.numpy() * (scale * (rounded - zero) - centres) ** 2).sum())

    best = min(range(1, 101), key=error)
    assert found == pytest.approx((low * best / 100, high * best / 100))
    assert best < 100


def test_ties_keep_the_widest_range() -> None:
    counts = torch.zeros(2048)
    counts[0] = 1.0  # all mass next to 0: the error is that of one bin for many ranges
    assert affine_range(counts * 0, 0.0, 1.0, "mse") == (0.0, 1.0)


def test_weights_against_numpy() -> None:
    weight = torch.randn(5, 3, 2, 2)
    for axis in (0, 1):
        for bits in (7, 8, 2):
            integers, scales = quantize_weight(weight, axis, bits)
            limit = 2 ** (bits - 1) - 1
            array = np.moveaxis(weight.numpy(), axis, 0)
            for channel in range(array.shape[0]):
                scale = np.float32(np.abs(array[channel]).max()) / np.float32(limit)
                expected = np.rint(array[channel] / scale)
                assert scales[channel] == scale
                np.testing.assert_array_equal(np.moveaxis(integers.numpy(), axis, 0)[channel], expected)
            assert int(integers.abs().max()) == limit
            assert integers.dtype == torch.int8


def test_channels_of_zeros_and_least_scales() -> None:
    integers, scales = quantize_weight(torch.tensor([[0.0, 0.0], [0.63, 0.0]]))
    assert integers.tolist() == [[0, 0], [63, 0]]
    assert scales.tolist() == pytest.approx([0.01, 0.01])
    assert quantize_weight(torch.zeros(2, 2))[1].tolist() == [1.0, 1.0]
    integers, scales = quantize_weight(torch.tensor([[0.63], [0.63]]), least_scale=torch.tensor([0.0, 0.1]))
    assert integers.tolist() == [[63], [6]]
    assert scales.tolist() == pytest.approx([0.01, 0.1])
