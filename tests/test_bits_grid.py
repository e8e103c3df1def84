"""The arithmetic of k bits against twins in numpy: values, and gradients by the papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.quantize import Grid, clip_activation, dorefa_integers, fake_quantize, find_grid
from pared.quantize.grid import integers, range_grid, scale_gradient
from pared.quantize.weight_blocks import Blocks


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def twin(values: np.ndarray, step: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.rint(np.clip(values / step, low, high))


# --- grids ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_a_symmetric_grid_reaches_the_largest_magnitude(bits):
    grid = range_grid(torch.tensor([-3.0, -0.5]), torch.tensor([1.0, 2.0]), bits)
    limit = 2 ** (bits - 1) - 1
    assert grid.step.tolist() == pytest.approx([3 / limit, 2 / limit])
    assert (grid.lowest.tolist(), grid.highest.tolist()) == ([-limit] * 2, [limit] * 2)


@given(st.floats(-8, 0), st.floats(0, 8), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_an_affine_grid_has_all_integers_and_an_exact_zero(low, high, bits):
    grid = range_grid(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), bits, symmetric=False)
    assert float(grid.highest - grid.lowest) == 2**bits - 1
    assert float(grid.lowest) <= 0 <= float(grid.highest)
    if high - low > 1e-300:
        assert abs(float(grid.lowest * grid.step) - low) <= float(grid.step) * 0.5000001
        assert abs(float(grid.highest * grid.step) - high) <= float(grid.step) * 0.5000001


def test_values_beyond_zero_widen_the_range():
    grid = range_grid(torch.tensor(1.0), torch.tensor(3.0), 2, symmetric=False)
    assert [float(part) for part in grid] == [1.0, 0.0, 3.0]


def test_empty_and_zero_and_denormal_blocks_have_a_step():
    assert find_grid(torch.zeros(2, 3), 4).step.tolist() == [[1.0], [1.0]]
    assert find_grid(torch.zeros(2, 0), 4).step.shape == (2, 1)
    grid = find_grid(torch.tensor([[1e-44, 0.0]]), 4, "minmax")
    assert float(grid.step) >= torch.finfo(torch.float32).tiny
    assert find_grid(torch.tensor([[0.0, 0.0], [7.0, -1.0]]), 4, "minmax").step.tolist() == [[1.0], [1.0]]


def test_all_equal_weights_are_exact():
    blocks = torch.full((1, 5), 0.7)
    for symmetric in (True, False):
        grid = find_grid(blocks, 4, "mse", symmetric=symmetric)
        assert torch.allclose(fake_quantize(blocks, grid), blocks, atol=1e-7)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_least_squares_is_never_worse_than_the_range_and_nearly_the_best(bits, symmetric):
    blocks = numbers(4, 200) ** 3
    wide, best = (find_grid(blocks, bits, method, symmetric=symmetric) for method in ("minmax", "mse"))
    wide_error, error = (((fake_quantize(blocks, grid) - blocks) ** 2).sum(1).numpy() for grid in (wide, best))
    assert (error <= wide_error).all()
    if symmetric:  # every step between 0 and that of the whole range, by brute force
        limit = 2 ** (bits - 1) - 1
        for row, mine in zip(blocks.numpy(), error, strict=True):
            steps = np.linspace(0.002, 1, 2000)[:, None] * np.abs(row).max() / limit
            least = ((twin(row, steps, -limit, limit) * steps - row) ** 2).sum(1).min()
            assert mine <= least * 1.03


def test_more_bits_never_have_a_larger_error():
    blocks = numbers(3, 400)
    errors = [float(((fake_quantize(blocks, find_grid(blocks, bits)) - blocks) ** 2).sum()) for bits in (2, 3, 4, 5, 6, 7, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    # a Gaussian loses about 6 dB less for each bit
    signal = float((blocks**2).sum())
    assert 10 * np.log10(signal / errors[2]) > 19
    assert 10 * np.log10(signal / errors[6]) > 39


# --- rounding ---


def test_halves_go_to_the_even_integer_and_zero_has_no_sign():
    grid = Grid(torch.tensor(1.0), torch.tensor(-3.0), torch.tensor(3.0))
    found = fake_quantize(torch.tensor([-1.5, -0.5, -0.4, -0.0, 0.5, 1.5, 2.5, 9.0]), grid)
    assert found.tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 3.0]
    assert not bool(torch.signbit(found[1:5]).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_products_of_integers_and_steps_bit_for_bit_and_stay(dtype, bits):
    blocks = numbers(6, 50, dtype=dtype)
    grid = find_grid(blocks, bits)
    values, whole = fake_quantize(blocks, grid), integers(blocks, grid)
    assert torch.equal(whole, whole.round())
    assert np.array_equal(values.numpy(), whole.numpy() * grid.step.numpy() + dtype_zero(dtype))
    assert torch.equal(fake_quantize(values, grid), values)


def dtype_zero(dtype: torch.dtype) -> np.ndarray:
    return torch.zeros((), dtype=dtype).numpy()


def test_the_gradient_passes_inside_the_range_and_that_of_the_step_is_lsqs():
    values = numbers(40) * 4
    values[0], values[1] = 3.0 * 0.7, -4.0 * 0.7  # on the ends, as far as a product is
    out = numbers(40, seed=1)
    free, step = values.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    low, high = -4, 3  # LSQ's integers of three bits
    (fake_quantize(free, Grid(step, torch.tensor(float(low)), torch.tensor(float(high)))) * out).sum().backward()
    ratio, g = values.numpy() / 0.7, out.numpy()
    inside = (ratio >= low) & (ratio <= high)
    by_step = np.where(inside, np.rint(ratio) - ratio, np.clip(ratio, low, high))
    assert free.grad is not None
    np.testing.assert_allclose(free.grad.numpy(), g * inside, rtol=1e-12)
    assert step.grad is not None
    np.testing.assert_allclose(float(step.grad), (g * by_step).sum(), rtol=1e-9)


def test_a_scaled_gradient_leaves_the_value():
    value = torch.tensor([3.0, 4.0], requires_grad=True)
    scaled = scale_gradient(value, torch.tensor([0.5, 1e20]))
    assert scaled.tolist() == [3.0, 4.0]
    scaled.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [0.5, pytest.approx(1e20)]


# --- DoReFa and PACT ---


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dorefa_weights_and_their_gradient(bits):
    weight, out, levels = numbers(30), numbers(30, seed=1), 2**bits - 1
    free = weight.clone().requires_grad_()
    found = dorefa_integers(free, bits)
    (found / levels * out).sum().backward()
    squashed = np.tanh(weight.numpy())
    at = np.argmax(np.abs(squashed))
    peak = np.abs(squashed[at])
    expected = 2 * np.rint(levels * (squashed / (2 * peak) + 0.5)) - levels
    np.testing.assert_array_equal(found.detach().numpy(), expected)
    assert (expected % 2 != 0).all()
    # w / max: the gradient also reaches the largest
    g = out.numpy() / peak
    g[at] -= (out.numpy() * squashed).sum() / peak**2 * np.sign(squashed[at])
    assert free.grad is not None
    np.testing.assert_allclose(free.grad.numpy(), g * (1 - squashed**2), rtol=1e-9, atol=1e-12)


def test_dorefa_of_nothing_and_of_zeros_is_finite():
    assert dorefa_integers(torch.zeros(0), 2).shape == (0,)
    assert bool(torch.isfinite(dorefa_integers(torch.zeros(3), 2)).all())


@pytest.mark.parametrize(("bits", "limit"), [(1, 1.0), (2, 1.0), (4, 2.5), (8, 6.0)])
def test_activations_and_pacts_gradients(bits, limit):
    values, out, levels = numbers(60) * 3, numbers(60, seed=1), 2**bits - 1
    free, bound = values.clone().requires_grad_(), torch.tensor(limit, dtype=torch.float64, requires_grad=True)
    found = clip_activation(free, bound, bits)
    (found * out).sum().backward()
    x, g = values.numpy(), out.numpy()
    np.testing.assert_allclose(found.detach().numpy(), np.rint(np.clip(x, 0, limit) * levels / limit) * limit / levels, rtol=1e-12)
    assert free.grad is not None
    assert bound.grad is not None
    np.testing.assert_allclose(free.grad.numpy(), g * ((x > 0) & (x < limit)))
    np.testing.assert_allclose(float(bound.grad), g[x >= limit].sum())


# --- blocks ---


@pytest.mark.parametrize("blocks", [Blocks("tensor"), Blocks("channel"), Blocks("group", 4), Blocks("group", 100), Blocks("group", 1)])
def test_blocks_go_there_and_back(blocks):
    weight = numbers(3, 5, 2, 2)
    split = blocks.split(weight)
    assert torch.equal(blocks.join(split, weight.shape), weight)
    assert int(blocks.sizes(weight).sum()) == weight.numel()
    assert split.shape[:2] == {"tensor": (1, 1), "channel": (3, 1), "group": (3, -(-20 // max(blocks.group, 1)))}[blocks.granularity]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_rows_of_a_transposed_convolution_are_its_outputs(groups, granularity):
    weight = numbers(4, 3, 2)  # inputs, outputs of a group, kernel
    blocks = Blocks(granularity, 3, transposed=groups)
    split = blocks.split(weight)
    assert torch.equal(blocks.join(split, weight.shape), weight)
    assert len(split) == 3 * groups
    rows = split.flatten(1)
    of_group = 4 // groups
    for group in range(groups):
        for output in range(3):
            expected = weight[group * of_group : (group + 1) * of_group, output].reshape(-1)
            assert torch.equal(rows[group * 3 + output][: len(expected)], expected)
