"""The steps of group lasso: the maths against numpy and against a known solution, and the hook that carries them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.prune.proximal import Shrinkage, after_steps, group_soft_threshold, step_size


def numpy_soft_threshold(rows: np.ndarray, amount: float) -> np.ndarray:
    result = np.zeros_like(rows)
    for index, row in enumerate(rows):
        norm = np.sqrt((row * row).sum())
        if norm > amount:
            result[index] = row * (norm - amount) / norm
    return result


# --- the maths ---


@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0, 100.0])
def test_soft_threshold_equals_numpy(amount: float) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 5))
    rows[2] = 0
    ours = group_soft_threshold(torch.from_numpy(rows), amount).numpy()
    np.testing.assert_allclose(ours, numpy_soft_threshold(rows, amount), atol=1e-12)
    assert (ours[np.linalg.norm(rows, axis=1) <= amount] == 0).all()


def test_a_row_as_long_as_the_amount_is_zero() -> None:
    assert group_soft_threshold(torch.tensor([[3.0, 4.0]]), 5.0).tolist() == [[0.0, 0.0]]


def test_soft_threshold_is_the_proximal_operator() -> None:
    rows, amount = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), 0.8

    def value(point: Tensor) -> float:
        return float(0.5 * (point - rows).square().sum() + amount * torch.linalg.vector_norm(point, dim=1).sum())

    best = group_soft_threshold(rows, amount)
    generator = torch.Generator().manual_seed(1)
    assert all(value(best) <= value(best + 0.1 * torch.randn(3, 4, generator=generator)) + 1e-6 for _ in range(50))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"lr": 0.1}, 0.1),
        ({"lr": 0.1, "momentum": 0.0, "dampening": 0}, 0.1),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0}, 1.0),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0.9}, 0.1),
        ({"lr": torch.tensor(0.5), "betas": (0.9, 0.999)}, 0.5),
        ({"lr": 0.1, "momentum": 1.0}, 0.1),
    ],
)
def test_step_size_is_what_a_steady_gradient_moves(settings: dict[str, Any], size: float) -> None:
    assert step_size(settings) == pytest.approx(size)


def steady_move(**settings: Any) -> float:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], **settings)
    for _ in range(300):
        before, weight.grad = weight.item(), torch.ones(1, dtype=torch.float64)
        optimizer.step()
    return before - weight.item()


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.5}])
def test_step_size_is_that_of_torch(settings: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01, **settings)
    assert step_size(optimizer.param_groups[0]) == pytest.approx(steady_move(lr=0.01, **settings))


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_lasso_on_an_orthogonal_design_has_the_known_solution(settings: dict[str, Any]) -> None:
    """½|W - T|² + λ Σ|w_g|: with orthonormal inputs the solution is the soft threshold of least squares, with λ itself."""
    target = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, -2.0]], dtype=torch.float64)
    weight, strength = nn.Parameter(torch.ones(3, 2, dtype=torch.float64)), 0.75
    optimizer = torch.optim.SGD([weight], lr=0.02, **settings)

    def shrink(step: float) -> None:
        weight.copy_(group_soft_threshold(weight, step * strength))

    with after_steps([Shrinkage(weight, shrink)]):
        for _ in range(1500):
            optimizer.zero_grad()
            (0.5 * (weight - target).square().sum()).backward()
            optimizer.step()
    np.testing.assert_allclose(weight.detach().numpy(), numpy_soft_threshold(target.numpy(), strength), atol=1e-6)
    assert weight[1].tolist() == [0, 0]


# --- the hook ---


def test_other_optimisers_are_left_alone_and_nothing_stays() -> None:
    from torch.optim import optimizer as module

    before = len(module._global_optimizer_post_hooks)
    mine, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def train() -> None:
        with after_steps([Shrinkage(mine, lambda _: mine.zero_())]):
            for parameter in (other, mine):
                parameter.grad = torch.zeros(1)
                torch.optim.SGD([parameter], lr=0.1).step()
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert (mine.item(), other.item()) == (0.0, 1.0)
    assert len(module._global_optimizer_post_hooks) == before
