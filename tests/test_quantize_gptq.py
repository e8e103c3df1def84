"""GPTQ and AdaRound on single matrices: closed forms, twins in numpy, and never worse than rounding to nearest."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pared.core.errors import SettingsError
from pared.quantize.adaround import GAMMA, ZETA, adaround, rectified_sigmoid, regularizer
from pared.quantize.gptq import gptq
from pared.quantize.row_rounding import better_rows, dequantize, round_to_nearest, row_errors, row_scales

ROUNDINGS = pytest.mark.parametrize("rounding", [gptq, functools.partial(adaround, iterations=400)], ids=["gptq", "adaround"])


def problem(seed: int, rows: int = 4, columns: int = 12, samples: int = 60) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    rng = np.random.default_rng(seed)
    inputs = torch.from_numpy(rng.normal(size=(samples, columns)) @ rng.normal(size=(columns, columns)))
    return torch.from_numpy(rng.normal(size=(rows, columns))), inputs.T @ inputs


def error(weight: Tensor, integers: Tensor, gram: Tensor, scales: Tensor) -> float:
    return float(row_errors(weight, integers, gram, scales).sum())


# --- what both promise ---


@ROUNDINGS
def test_shapes_that_do_not_fit_are_refused(rounding):
    weight, gram = problem(0)
    scales = row_scales(weight, 7)
    for wrong, message in (
        ((weight[0], gram, scales, -7, 7), r"weight must be of shape \(…, rows, columns\)\. Got \(12,\)"),
        ((weight, gram[:-1], scales, -7, 7), r"gram must be of shape \(12, 12\)\. Got \(11, 12\)"),
        ((weight, gram, scales[:-1], -7, 7), r"scales must be of shape \(4,\), or that of the weight\. Got \(3,\)"),
        ((weight, gram, scales, 7, -7), r"low must be at most high \(-7\)\. Got 7"),
    ):
        with pytest.raises(SettingsError, match=message):
            rounding(*wrong)


def test_settings_out_of_range_are_refused():
    weight, gram = problem(0)
    scales = row_scales(weight, 7)
    with pytest.raises(SettingsError, match="damping must be a number greater than 0"):
        gptq(weight, gram, scales, -7, 7, damping=0)
    with pytest.raises(SettingsError, match="iterations must be a whole number at least 0"):
        adaround(weight, gram, scales, -7, 7, iterations=-1)


@ROUNDINGS
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_a_layer_is_below_that_of_nearest(rounding, bits, seed):
    weight, gram = problem(seed)
    limit = 2 ** (bits - 1) - 1
    scales = row_scales(weight, limit, gram.diagonal() if seed else None)
    plain = round_to_nearest(weight, scales, -limit, limit)
    found = rounding(weight, gram, scales, -limit, limit)
    assert int(found.abs().max()) <= limit
    assert error(weight, found, gram, scales) < error(weight, plain, gram, scales)
    assert (row_errors(weight, found, gram, scales) <= row_errors(weight, plain, gram, scales)).all()


@ROUNDINGS
def test_much_is_gained_on_correlated_inputs(rounding):
    weight, gram = problem(0, rows=20, columns=60, samples=200)
    scales = row_scales(weight, 7, gram.diagonal())
    plain = round_to_nearest(weight, scales, -7, 7)
    assert error(weight, rounding(weight, gram, scales, -7, 7), gram, scales) < 0.5 * error(weight, plain, gram, scales)


@ROUNDINGS
def test_without_correlation_it_is_nearest(rounding):
    weight, _ = problem(0)
    scales = row_scales(weight, 7)
    plain = round_to_nearest(weight, scales, -7, 7)
    for gram in (torch.diag(torch.arange(12.0)), torch.zeros(12, 12)):
        assert torch.equal(rounding(weight, gram, scales, -7, 7), plain)


@ROUNDINGS
def test_an_input_that_is_always_zero_is_rounded_to_nearest(rounding):
    weight, gram = problem(1)
    gram[3], gram[:, 3] = 0.0, 0.0
    scales = row_scales(weight, 7)
    assert torch.equal(rounding(weight, gram, scales, -7, 7)[:, 3], round_to_nearest(weight, scales, -7, 7)[:, 3])


@ROUNDINGS
def test_zeros_stay_zero(rounding):
    weight, gram = problem(2)
    weight[:, ::3] = 0.0
    scales = row_scales(weight, 3)
    found = rounding(weight, gram, scales, -3, 3)
    assert not found[:, ::3].any()
    assert error(weight, found, gram, scales) < error(weight, round_to_nearest(weight, scales, -3, 3), gram, scales)


@ROUNDINGS
def test_matrices_side_by_side_are_rounded_like_each_alone(rounding):
    pairs = [problem(seed) for seed in (3, 4)]
    weight, gram = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    scales = row_scales(weight, 7, gram.diagonal(dim1=1, dim2=2))
    found = rounding(weight, gram, scales, -7, 7)
    for at, (one, its_gram) in enumerate(pairs):
        assert torch.equal(scales[at], row_scales(one, 7, its_gram.diagonal()))
        assert torch.equal(found[at], rounding(one, its_gram, scales[at], -7, 7))


@ROUNDINGS
def test_the_scale_of_the_gram_does_not_matter_and_nothing_is_random(rounding):
    weight, gram = problem(5)
    scales = row_scales(weight, 7)
    torch.manual_seed(0)
    first = rounding(weight, gram, scales, -7, 7)
    state = torch.get_rng_state()
    assert torch.equal(first, rounding(weight, gram * 2.0**-20, scales, -7, 7))
    assert torch.equal(state, torch.get_rng_state())


@ROUNDINGS
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (2, 1)])
def test_small_shapes(rounding, shape):
    weight, gram = torch.full(shape, 0.3), torch.ones(shape[1], shape[1])
    scales = row_scales(weight, 7)
    assert rounding(weight, gram, scales, -7, 7).shape == shape


@ROUNDINGS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_of_any_type_with_gradients(rounding, dtype):
    weight, gram = problem(6)
    parameter = torch.nn.Parameter(weight.to(dtype))
    scales = row_scales(parameter, 7)
    found = rounding(parameter, gram, scales, -7, 7)
    assert found.dtype == torch.int32
    assert not found.requires_grad
    assert error(parameter, found, gram, scales) < error(parameter, round_to_nearest(parameter, scales, -7, 7), gram, scales)


@ROUNDINGS
def test_all_weights_alike(rounding):
    _, gram = problem(7)
    weight = torch.full((2, 12), 0.7)
    scales = row_scales(weight, 7)
    assert (rounding(weight, gram, scales, -7, 7) == 7).all()


# --- GPTQ ---


def test_two_columns_on_paper():
    # 0.4 becomes 0; its error moves to the second column times 0.9, which becomes 0.76, so 1
    weight, gram, scales = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.ones(1)
    found = gptq(weight, gram, scales, -7, 7, damping=1e-9)
    assert found.tolist() == [[0, 1]]
    assert error(weight, found, gram, scales) == pytest.approx(0.16 + 0.36 - 2 * 0.9 * 0.24)
    assert error(weight, torch.zeros(1, 2), gram, scales) == pytest.approx(0.16 + 0.16 + 2 * 0.9 * 0.16)


def one_by_one(weight: np.ndarray, gram: np.ndarray, scales: np.ndarray, limit: int) -> np.ndarray:
    """The same without Cholesky: after each column the rest is refitted with the inverse of the part of G that is left."""
    left, rounded = weight.copy(), np.zeros_like(weight)
    damped = gram + 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
    for at in range(len(gram)):
        inverse = np.linalg.inv(damped[at:, at:])
        rounded[:, at] = np.clip(np.rint(left[:, at] / scales), -limit, limit)
        change = (left[:, at] - rounded[:, at] * scales) / inverse[0, 0]
        left[:, at:] -= change[:, None] * inverse[0]
    return rounded


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_the_blocks_and_the_factor_give_what_single_steps_give(block, by_activation):
    weight, gram = problem(8, rows=5, columns=20)
    scales = row_scales(weight, 7)
    order = np.argsort(-gram.diagonal().numpy(), kind="stable") if by_activation else np.arange(20)
    expected = np.empty((5, 20))
    expected[:, order] = one_by_one(weight.numpy()[:, order], gram.numpy()[order][:, order], scales.double().numpy(), 7)
    best = better_rows(weight, round_to_nearest(weight, scales, -7, 7), torch.from_numpy(expected).int(), gram, scales)
    assert torch.equal(gptq(weight, gram, scales, -7, 7, block=block, by_activation=by_activation), best)
    assert (best.numpy() == expected).mean() > 0.7  # most rows come from the sweep


def test_the_guard_returns_nearest_where_the_sweep_is_worse():
    weight, gram = problem(9, rows=300, columns=6)
    scales = row_scales(weight, 1)
    plain = round_to_nearest(weight, scales, -1, 1)
    swept = torch.from_numpy(one_by_one(weight.numpy(), gram.numpy(), scales.double().numpy(), 1)).int()
    worse = row_errors(weight, swept, gram, scales) > row_errors(weight, plain, gram, scales)
    assert worse.any()
    assert torch.equal(gptq(weight, gram, scales, -1, 1, by_activation=False)[worse], plain[worse])
    assert torch.equal(gptq(weight, gram, scales, -1, 1, damping=1e9), plain)  # nothing is made up for


def test_less_than_the_samples_that_a_gram_needs():
    weight, gram = problem(10, columns=30, samples=5)  # singular: only the damping makes it invertible
    scales = row_scales(weight, 3)
    plain = round_to_nearest(weight, scales, -3, 3)
    assert error(weight, gptq(weight, gram, scales, -3, 3), gram, scales) < 0.3 * error(weight, plain, gram, scales)


# --- AdaRound ---


def test_the_rectified_sigmoid_and_its_regularizer():
    v = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    x = v.detach().numpy()
    sigmoid = 1 / (1 + np.exp(-x))
    h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
    shares = rectified_sigmoid(v)
    assert shares.detach().numpy() == pytest.approx(h)
    value = regularizer(shares, 4.0)
    assert value.item() == pytest.approx((1 - np.abs(2 * h - 1) ** 4).sum())
    value.backward()
    inside = (h > 0) & (h < 1)
    slope = -4 * np.abs(2 * h - 1) ** 3 * np.sign(2 * h - 1) * 2 * 1.2 * sigmoid * (1 - sigmoid) * inside
    assert v.grad is not None
    assert v.grad.numpy() == pytest.approx(slope)


def learned(weight: np.ndarray, gram: np.ndarray, scales: np.ndarray, limit: int, iterations: int) -> np.ndarray:
    """The twin: gradients by hand and Adam by its formulas, in double precision."""
    steps = weight / scales[:, None]
    down, unit = np.floor(steps), gram / np.diag(gram).mean()
    share = (steps - down - GAMMA) / (ZETA - GAMMA)
    v = np.log(share / (1 - share))
    mean, square = np.zeros_like(v), np.zeros_like(v)
    for at in range(iterations):
        sigmoid = 1 / (1 + np.exp(-v))
        h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
        q = down + h
        change = np.clip(q, -limit, limit) - steps
        gradient = 2 * change @ unit * ((q >= -limit) & (q <= limit))
        if at / iterations >= 0.2:
            beta = 20 - 18 * (at / iterations - 0.2) / 0.8
            gradient -= beta * np.abs(2 * h - 1) ** (beta - 1) * np.sign(2 * h - 1) * 2
        gradient *= 1.2 * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        v -= 0.03 * (mean / (1 - 0.9 ** (at + 1))) / (np.sqrt(square / (1 - 0.999 ** (at + 1))) + 1e-8)
    return np.clip(down + (1.2 / (1 + np.exp(-v)) - 0.1 >= 0.5), -limit, limit)


def test_what_is_learned_is_what_the_twin_learns():
    weight, gram = problem(11, rows=3, columns=8)
    scales = row_scales(weight, 7, gram.diagonal())
    expected = torch.from_numpy(learned(weight.numpy(), gram.numpy(), scales.double().numpy(), 7, 200)).int()
    best = better_rows(weight, round_to_nearest(weight, scales, -7, 7), expected, gram, scales)
    assert torch.equal(adaround(weight, gram, scales, -7, 7, iterations=200), best)
    assert torch.equal(best, expected)


@pytest.mark.parametrize("seed", range(3))
def test_of_all_ways_to_round_up_or_down_it_finds_one_of_the_best(seed):
    weight, gram = problem(seed + 20, rows=1, columns=8)
    scales = row_scales(weight, 7)
    down = torch.floor(weight / scales[:, None])
    ways = torch.cat([(down + torch.tensor(up)).clamp(-7, 7) for up in itertools.product((0.0, 1.0), repeat=8)])
    errors = row_errors(weight.expand(256, 8), ways, gram, scales.expand(256)).sort().values
    found = error(weight, adaround(weight, gram, scales, -7, 7), gram, scales)
    assert found <= errors[7]  # among the best three in a hundred


# --- scales ---


def test_scales_cut_off_what_gains_more_than_it_costs():
    weight = torch.tensor([[1.0, *[0.1] * 99]])  # 3 bits over the whole range would round all but one to 0
    wide, fitted = row_scales(weight, 3), row_scales(weight, 3, torch.ones(100))
    assert wide.item() == pytest.approx(1 / 3)
    assert fitted.item() < 0.12
    heavy = torch.ones(100)
    heavy[0] = 1e6  # unless the large one is what counts
    assert row_scales(weight, 3, heavy).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_with_integers_are_exact_in_half_precision(dtype, bits):
    weight = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).to(dtype) * torch.logspace(-6, 1, 50)[:, None].to(dtype)
    limit = 2 ** (bits - 1) - 1
    for scales in (row_scales(weight, limit), row_scales(weight, limit, torch.ones(20))):
        values = dequantize(torch.arange(-limit, limit + 1).expand(50, -1), scales)
        assert torch.equal(values.to(dtype).float(), values)


def test_rows_of_zeros_have_a_scale():
    assert row_scales(torch.zeros(2, 3), 7).tolist() == [1.0, 1.0]
    assert row_scales(torch.tensor([[0.0, 0.0], [7.0, 0.0]]), 7, torch.ones(2)).tolist() == [1.0, 1.0]
