"""What a matrix costs: against an independent twin in numpy, and against the bytes of the codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pared.codec import integers
from pared.codec.integers import Coding
from pared.quantize.rate_cost import FEATURES, cost_of, features_of, plain_cost


def twin_features(filled: np.ndarray, width: int, period: int) -> np.ndarray:
    """Place by place, as the docstring says it."""
    rows, columns = filled.shape
    out = np.zeros((FEATURES, rows, columns))

    def at(i: int, j: int) -> float:
        return filled[i, j] if 0 <= i < rows and 0 <= j < columns else 0.0

    def odds(count: float, places: int) -> float:
        return np.log((count + 0.5) / (places - count + 0.5))

    for i in range(rows):
        for j in range(columns):
            out[0, i, j] = 1
            if min(rows, columns) > 1:
                out[1, i, j] = odds(filled[i].sum() - filled[i, j], columns - 1)
                out[2, i, j] = odds(filled[:, j].sum() - filled[i, j], rows - 1)
            out[3, i, j] = at(i, j - 1) + at(i, j + 1)
            out[4, i, j] = at(i - 1, j) + at(i + 1, j)
            if 0 < width < columns:
                for line in (-width, width):
                    if 0 <= j + line < columns:
                        out[5, i, j] += sum(at(i, j + line + by) for by in (-1, 0, 1))
            if 0 < period < columns:
                out[6, i, j] = at(i, j - period) + at(i, j + period)
    return out


def twin_cost(magnitudes: np.ndarray, coefficients: np.ndarray, width: int, period: int) -> tuple[np.ndarray, float, float]:
    """Bits of filling each place, of growing, and of everything, for given coefficients."""
    filled = (magnitudes > 0).astype(float)
    logits = np.tensordot(coefficients, twin_features(filled, width, period), 1).clip(-14, 14)
    count, total = filled.sum(), magnitudes.sum()
    more = (total - count + 0.5) / (total + 1)
    chance = 1 / (1 + np.exp(-logits))
    bits = -np.log2(np.where(filled > 0, chance, 1 - chance)).sum()
    bits += count * (1 - np.log2(1 - more)) - (total - count) * np.log2(more)
    filling = np.maximum(np.log2((1 - chance) / chance) + 1 - np.log2(1 - more), 0)
    return filling, -np.log2(more), bits


def matrix(rows: int, columns: int, density: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.full((rows, columns), density, dtype=torch.float64), generator)


@pytest.mark.parametrize(("rows", "columns", "width", "period"), [(7, 30, 6, 0), (5, 27, 3, 9), (1, 12, 0, 0), (6, 1, 0, 0), (4, 8, 9, 16)])
def test_the_cost_is_that_of_the_twin(rows, columns, width, period):
    magnitudes = matrix(rows, columns, 0.5, rows)
    found = features_of((magnitudes > 0).double(), width, period)
    assert np.allclose(found.numpy(), twin_features((magnitudes > 0).double().numpy(), width, period))
    coefficients = torch.linspace(-0.4, 0.5, FEATURES, dtype=torch.float64)
    cost = cost_of(magnitudes, coefficients, width, period, steps=0)
    filling, growing, total = twin_cost(magnitudes.numpy(), coefficients.numpy(), width, period)
    assert np.allclose(cost.filling.numpy(), filling)
    assert np.isclose(float(cost.growing), growing)
    assert np.isclose(float(cost.total), total)
    assert torch.equal(cost.coefficients, coefficients)


def test_the_fit_is_where_the_cost_is_least():
    magnitudes = matrix(20, 40, 0.4, 0)
    cost = cost_of(magnitudes, torch.zeros(FEATURES, dtype=torch.float64), 8, 0, steps=30)

    def places(coefficients: np.ndarray) -> float:
        penalty = 0.5 * 1e-2 * (coefficients**2).sum() / np.log(2)  # the ridge
        return twin_cost(magnitudes.numpy(), coefficients, 8, 0)[2] + penalty

    best = cost.coefficients.numpy()
    assert all(places(best) <= places(best + sign * 0.01 * np.eye(FEATURES)[n]) for n in range(FEATURES) for sign in (-1, 1))


def test_without_contexts_every_place_costs_the_entropy():
    magnitudes = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]])
    cost = plain_cost(magnitudes)
    chance = 2.5 / 9  # half a place added to both
    expected = -2 * np.log2(chance) - 6 * np.log2(1 - chance) + 2 * (1 - np.log2(1 - 0.5 / 3))
    assert np.isclose(float(cost.total), expected)
    assert len(cost.filling.unique()) == 1


def trained_like() -> torch.Tensor:
    """Rows that see a spot of a picture each, some of them dead: what trained first layers look like."""
    generator = torch.Generator().manual_seed(0)
    y, x = (part.flatten().double() for part in torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij"))
    centre = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 20 + 4
    near = torch.exp(-((y - centre[:, :1]).square() + (x - centre[:, 1:]).square()) / 9)
    alive = torch.rand(200, 1, generator=generator) > 0.4
    filled = (torch.rand(200, 784, generator=generator) < 0.6 * near) & alive
    large = 1 + (torch.rand(200, 784, generator=generator) < 0.1).double()
    return filled * large * torch.where(torch.rand(200, 784, generator=generator) < 0.5, -1.0, 1.0)


def gaussian(seed: int) -> torch.Tensor:
    return torch.randn(100, 300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round()


def sparse(density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    signs = torch.where(torch.rand(300, 300, generator=generator) < 0.5, -1.0, 1.0)
    return (torch.rand(300, 300, generator=generator) < density) * signs.double()


@pytest.mark.parametrize(
    ("values", "width", "tolerance"),
    [
        (trained_like(), 28, 0.10),
        (gaussian(0), 0, 0.03),
        (sparse(0.3), 0, 0.03),
        (sparse(0.05), 0, 0.05),
        (sparse(0.01), 0, 0.15),  # the coder takes a while to learn
        (gaussian(1)[:1], 0, 0.15),
    ],
)
def test_the_estimate_is_near_the_bytes_of_the_codec(values, width, tolerance):
    whole = values.round()
    cost = cost_of(whole.abs(), torch.zeros(FEATURES, dtype=torch.float64), width, steps=20)
    matrix = whole.to(torch.int64).numpy()
    _, neighbours = integers.smallest_adaptive(matrix, (0, 0))
    real = len(integers.encode(matrix, Coding.ADAPTIVE, neighbours))
    assert abs(float(cost.total) / 8 / real - 1) < tolerance


def test_knowing_neighbours_makes_a_trained_matrix_cheaper():
    values = trained_like().abs()
    with_contexts = cost_of(values, torch.zeros(FEATURES, dtype=torch.float64), 28, steps=20)
    assert float(with_contexts.total) < 0.8 * float(plain_cost(values).total)
    assert float(with_contexts.total) < float(cost_of(values, torch.zeros(FEATURES, dtype=torch.float64), 0, steps=20).total)
