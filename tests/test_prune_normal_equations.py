"""Least squares from sums: what doesn't hold on samples left out isn't learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pared.prune.normal_equations import DAMPINGS, HalvedSums, Sums, ridge


def equations(rows: Tensor, wanted: Tensor, scale: Tensor | None = None, parts: int = 1) -> HalvedSums:
    found = HalvedSums(scale)
    for part, want in zip(rows.chunk(parts), wanted.chunk(parts), strict=True):
        found.add(part[None], want, with_shift=False)
    return found


def test_sums_of_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    rows, wanted = torch.randn(40, 3), torch.randn(40, 2)
    whole = Sums()
    whole.add(rows[None], wanted[None])
    for parts in (1, 5):
        halves = equations(rows, wanted, parts=parts).halves
        joined = halves[0] + halves[1]
        assert [half.count for half in halves] == [20, 20]
        torch.testing.assert_close(joined.gram, whole.gram)
        torch.testing.assert_close(joined.cross, whole.cross)
        torch.testing.assert_close(joined.error, whole.error)


def test_the_error_of_a_change_by_numpy() -> None:
    a, b, x = (np.random.default_rng(seed).normal(size=size) for seed, size in ((0, (30, 4)), (1, (30, 2)), (2, (4, 2))))
    sums = Sums()
    sums.add(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    np.testing.assert_allclose(sums.error_of(torch.from_numpy(x)[None])[0].numpy(), ((b - a @ x) ** 2).sum(0))


def test_what_is_really_so_is_found() -> None:
    torch.manual_seed(0)
    rows, truth = torch.randn(200, 5), torch.randn(5, 2)
    change, _ = equations(rows, rows @ truth).solve(None)
    torch.testing.assert_close(change[0].float(), truth, atol=1e-3, rtol=1e-3)


def test_an_output_of_chance_stays_while_another_is_solved() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 5)
    wanted = torch.stack([rows @ torch.ones(5), torch.randn(200)], dim=1)
    change, _ = equations(rows, wanted).solve(None)
    torch.testing.assert_close(change[0, :, 0].float(), torch.ones(5), atol=1e-2, rtol=1e-2)
    assert change[0, :, 1].tolist() == [0.0] * 5


def test_fewer_equations_than_unknowns_aren_t_learned_by_heart() -> None:
    """One direction counts, 59 are noise: on fresh rows the chosen damping does better than a hardly damped solution."""
    torch.manual_seed(0)
    truth = torch.zeros(60, 1)
    truth[0] = 2
    rows, fresh = torch.randn(50, 60), torch.randn(500, 60)
    wanted = rows @ truth + 2 * torch.randn(50, 1)
    found = equations(rows, wanted)
    chosen, _ = found.solve(None)
    bare, _ = found.solve(DAMPINGS[0])
    assert torch.allclose(bare, ridge(*(getattr(found.halves[0] + found.halves[1], name) for name in ("gram", "cross")), DAMPINGS[0]))
    errors = [float((fresh @ (change[0].float() - truth)).square().mean()) for change in (chosen, bare)]
    assert errors[0] < 0.7 * errors[1]


def test_a_single_equation_is_damped_most() -> None:
    found = HalvedSums()
    found.add(torch.tensor([[[2.0]]]), torch.tensor([[4.0]]), with_shift=False)
    change, whole = found.solve(None)
    assert whole.count == 1
    assert float(change) == pytest.approx(2 / (1 + DAMPINGS[-1]))


def test_outputs_are_solved_before_what_scales_them_and_weighed_behind() -> None:
    rows, wanted = torch.tensor([[1.0], [1.0]]), torch.tensor([[6.0, 6.0, 6.0], [6.0, 6.0, 6.0]])
    found = equations(rows, wanted, scale=torch.tensor([2.0, -3.0, 0.0]))
    change, whole = found.solve(1e-12)
    torch.testing.assert_close(change.flatten(), torch.tensor([3.0, -2.0, 0.0], dtype=torch.float64))
    assert whole.error.tolist() == [[18.0, 8.0, 0.0]]
    assert found.weighed(whole.error).tolist() == [[72.0, 72.0, 0.0]]


def test_a_shift_is_one_more_unknown() -> None:
    found = HalvedSums()
    found.add(torch.tensor([[[1.0], [2.0], [3.0], [5.0]]]), torch.tensor([[3.0], [5.0], [7.0], [11.0]]), with_shift=True)
    torch.testing.assert_close(found.solve(1e-12)[0].flatten(), torch.tensor([2.0, 1.0], dtype=torch.float64), atol=1e-6, rtol=1e-6)
