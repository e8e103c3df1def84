"""The arithmetic of int8: ranges, scales, integer weights, against numpy and on paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.graph import capture
from pared.quantize import affine_range, choose_qparams, quantize_weight
from pared.quantize.calibration import calibrate


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


def test_divergence_clips_outliers_and_keeps_the_body() -> None:
    values = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs(), torch.tensor([40.0])])
    counts, low, high = histogram(values)
    found = affine_range(counts, low, high, "kl")
    assert found[0] == 0.0
    assert 3.5 < found[1] < 6.0  # 256 of 2048 bins are the narrowest clip
    both, low, high = histogram(torch.cat([values, -values]))
    found = affine_range(both, low, high, "kl")
    assert found[0] == -found[1]
    assert found[1] < 6.0


def test_divergence_against_numpy() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
    counts, low, high = histogram(values.abs(), 256)
    steps, array = 16, counts.double().numpy()

    def divergence(clip: int) -> float:
        wanted, kept = array[:clip].copy(), np.zeros(clip)
        wanted[-1] += array[clip:].sum()
        for level in range(steps):
            members = [at for at in range(clip) if at * steps // clip == level and array[at] > 0]
            kept[members] = array[members].sum() / max(len(members), 1)
        wanted, kept = wanted / wanted.sum(), np.maximum(kept / kept.sum(), 1e-4 / clip)
        return float(sum(p * np.log(p / q) for p, q in zip(wanted, kept, strict=True) if p > 0))

    best = min([*range(steps, 256, 8), 256], key=divergence)
    assert best < 256
    assert affine_range(counts, low, high, "kl", levels=steps) == pytest.approx((0.0, (best + 0.5) * high / 256))


def test_divergence_of_what_fits_clips_nothing() -> None:
    assert affine_range(torch.ones(100), -1.0, 3.0, "kl") == (-1.0, 3.0)
    assert affine_range(torch.ones(100), -3.0, 0.0, "kl") == (-3.0, 0.0)


def test_running_mean_of_the_extremes_of_batches() -> None:
    graph = capture(nn.Sequential(nn.ReLU()), torch.zeros(2, 3)).module
    node = next(node for node in graph.graph.nodes if node.op == "placeholder")
    batches = [(torch.tensor([[low, 0.5, high]]),) for low, high in ((-1.0, 1.0), (-3.0, 2.0), (0.25, 6.0))]
    found = calibrate(graph, [node], batches, "ema")[node]
    weights = np.array([0.99**2, 0.99, 1.0])
    assert found == pytest.approx((weights @ [-1.0, -3.0, 0.25] / weights.sum(), weights @ [1.0, 2.0, 6.0] / weights.sum()))
    assert calibrate(graph, [node], [], "ema")[node] == (0.0, 0.0)


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
