"""Clusters on a line: the slide's matrix, every partition tried by hand, ties, repeats, and nothing at all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pared.codec.huffman import code_lengths
from pared.core.errors import SettingsError, WeightsError
from pared.quantize import initial_centroids, kmeans, nearest, optimal_kmeans

SLIDE = torch.tensor([[0.5, 1.3, 4.3, -0.1], [0.1, -0.2, -1.2, 0.3], [1.0, 3.0, -0.4, 0.1], [-0.5, -0.1, -3.4, -5.0]])


def squared_error(values: Tensor, centroids: Tensor) -> float:
    return float((values.double() - centroids.double()[nearest(values, centroids)]).square().sum())


def least_error(values: list[float], count: int) -> float:
    """Of all ways to cut the sorted values into `count` pieces."""
    ordered = np.sort(np.array(values))
    cuts = itertools.combinations(range(1, len(values)), count - 1)
    return min(sum(((piece - piece.mean()) ** 2).sum() for piece in np.split(ordered, cut)) for cut in cuts)


# --- the slide's 4 x 4 matrix ---


def test_the_best_four_clusters_of_the_slide():
    centroids = optimal_kmeans(SLIDE, 4)
    assert centroids.tolist() == pytest.approx([-4.2, -0.2875, 0.775, 3.65])
    assert squared_error(SLIDE, centroids) == pytest.approx(4.0213, abs=1e-4)
    sizes = torch.bincount(nearest(SLIDE, centroids).flatten())
    assert sizes.tolist() == [2, 8, 4, 2]
    shares = sizes.double() / 16
    assert float(-(shares * shares.log2()).sum()) == 1.75


@pytest.mark.parametrize(
    ("start", "expected", "error"),
    [("linear", [-4.2, -1.2, 2 / 11, 3.65], 5.2814), ("density", [-4.2, -5 / 12, 0.55, 3.65], 4.2283)],
)
def test_where_lloyd_stops_on_the_slide(start, expected, error):
    centroids = kmeans(SLIDE, 4, start)
    assert centroids.tolist() == pytest.approx(expected)
    assert squared_error(SLIDE, centroids) == pytest.approx(error, abs=1e-4)


def test_the_grouping_usually_drawn_is_worse():
    drawn = torch.tensor([-4.2, -0.4166667, 0.4, 2.8666667])
    groups = [[-5, -3.4], [-1.2, -0.5, -0.4, -0.2, -0.1, -0.1], [0.1, 0.1, 0.3, 0.5, 1.0], [1.3, 3.0, 4.3]]
    assert sum(((np.array(group) - centre) ** 2).sum() for group, centre in zip(groups, drawn.tolist(), strict=True)) == pytest.approx(
        7.235, abs=1e-3
    )
    again = kmeans(SLIDE, 4, drawn)
    assert squared_error(SLIDE, again) < 7.235


# --- codes of cluster numbers ---


@pytest.mark.parametrize(("sizes", "lengths", "bits"), [([2, 8, 4, 2], [3, 1, 2, 3], 28), ([2, 6, 5, 3], [3, 1, 2, 3], 31)])
def test_huffman_codes_of_the_slide(sizes, lengths, bits):
    found = code_lengths(np.array(sizes))
    assert found.tolist() == lengths
    assert found @ sizes == bits  # 32 with two bits for each weight
    assert 16 * entropy(sizes) == pytest.approx(28 if bits == 28 else 16 * 1.883, abs=0.01)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_mean_huffman_code_is_less_than_a_bit_above_the_entropy(sizes):
    mean = code_lengths(np.array(sizes)) @ sizes / sum(sizes)
    assert entropy(sizes) - 1e-9 <= mean < entropy(sizes) + 1


def entropy(sizes: list[int]) -> float:
    shares = np.array(sizes) / sum(sizes)
    return float(-(shares * np.log2(shares)).sum())


# --- initial centroids ---


def test_initial_centroids():
    values = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    assert initial_centroids(values, 5, "linear").tolist() == [0, 1, 2, 3, 4]
    assert initial_centroids(values, 2, "density").tolist() == [0, 1]
    assert initial_centroids(values, 4, "density").tolist() == [0, 0, 1, 4]
    torch.manual_seed(0)
    first = initial_centroids(values, 3, "forgy")
    torch.manual_seed(0)
    assert torch.equal(first, initial_centroids(values, 3, "forgy"))
    assert set(first.tolist()) <= {0.0, 1.0, 4.0}
    assert first.tolist() == sorted(first.tolist())
    assert initial_centroids(values, 9, "forgy").shape == (9,)
    assert initial_centroids(torch.tensor(2.0), 1).tolist() == [2.0]


def test_forgy_draws_no_value_twice():
    assert initial_centroids(torch.arange(6.0), 6, "forgy").tolist() == [0, 1, 2, 3, 4, 5]


# --- both algorithms ---


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9), st.integers(1, 5))
def test_the_exact_search_finds_the_least_error(values, count):
    tensor, different = torch.tensor(values, dtype=torch.float64), len(set(values))
    best = optimal_kmeans(tensor, count)
    assert best.tolist() == sorted(set(best.tolist()))
    assert len(best) == min(count, different)
    expected = least_error([float(value) for value in values], count) if different > count else 0.0
    assert squared_error(tensor, best) == pytest.approx(expected, abs=1e-9)
    for start in ("linear", "density", "forgy"):
        found = kmeans(tensor, count, start)
        assert len(found) == min(count, different)
        assert squared_error(tensor, found) >= expected - 1e-9


@pytest.mark.parametrize("start", ["linear", "density"])
def test_lloyd_ends_at_means_of_nearest_values_as_a_numpy_twin_says(start):
    values = torch.randn(200, generator=torch.Generator().manual_seed(3)).double()
    numbers, centres = values.numpy(), initial_centroids(values, 4, start).numpy()
    for _ in range(200):
        index = np.abs(numbers[:, None] - centres).argmin(1)
        centres = np.array([numbers[index == at].mean() for at in range(4)])
    assert np.allclose(kmeans(values, 4, start).numpy(), centres)


def test_an_empty_cluster_moves_into_the_worst():
    values = torch.tensor([0.0, 1.0, 2.0, 100.0])  # linear: 0, 50, 100, of which 50 is empty
    assert kmeans(values, 3).tolist() == [0.0, 1.5, 100.0] or kmeans(values, 3).tolist() == [0.5, 2.0, 100.0]
    assert len(kmeans(torch.cat([torch.linspace(0, 1, 50), torch.tensor([1e6])]), 16)) == 16


def test_a_value_in_the_middle_goes_to_the_lower():
    assert nearest(torch.tensor([1.0, 1.0 + 1e-6]), torch.tensor([0.0, 2.0])).tolist() == [0, 1]
    assert nearest(torch.zeros(0), torch.tensor([1.0])).shape == (0,)
    assert nearest(torch.tensor(5.0), torch.tensor([1.0])).item() == 0


@pytest.mark.parametrize("cluster", [kmeans, optimal_kmeans])
def test_few_values_are_kept_to_the_last_bit(cluster):
    values = torch.tensor([0.1, -0.3, 0.1, 7.7])
    assert torch.equal(cluster(values, 3), torch.tensor([-0.3, 0.1, 7.7]))
    assert torch.equal(cluster(values, 256), torch.tensor([-0.3, 0.1, 7.7]))
    assert torch.equal(cluster(torch.full((5,), 0.1), 2), torch.tensor([0.1]))
    assert cluster(torch.zeros(0), 4).shape == (0,)


@pytest.mark.parametrize("cluster", [kmeans, optimal_kmeans])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_stay(cluster, dtype):
    values = torch.linspace(-1, 1, 40).to(dtype)
    found = cluster(values, 8)
    assert found.dtype == dtype
    assert 1 <= len(found) <= 8


@pytest.mark.parametrize("cluster", [kmeans, optimal_kmeans])
def test_a_large_offset_cancels_nothing(cluster):
    small = torch.tensor([0.0, 1.0, 10.0, 11.0], dtype=torch.float64)
    assert torch.allclose(cluster(small + 1e9, 2), torch.tensor([0.5, 10.5], dtype=torch.float64) + 1e9, rtol=0, atol=1e-6)


def test_many_different_values():
    values = torch.special.ndtri((torch.arange(20_000) + 0.5).double() / 20_000)
    best, lloyd = optimal_kmeans(values, 16), kmeans(values, 16)
    assert len(best) == len(lloyd) == 16
    assert squared_error(values, best) <= squared_error(values, lloyd)
    # of a normal distribution the best 16 levels leave 0.009497 of the variance (Max 1960, table I)
    assert squared_error(values, best) / 20_000 == pytest.approx(0.009497, rel=0.005)


def test_error_falls_with_the_count():
    values = torch.randn(300, generator=torch.Generator().manual_seed(1))
    errors = [squared_error(values, optimal_kmeans(values, count)) for count in (1, 2, 4, 8, 16, 299, 300)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_wrong_arguments_are_named():
    for wrong in (0, 1.5, True):
        with pytest.raises(SettingsError, match="count must be a whole number"):
            kmeans(torch.ones(2), wrong)
    with pytest.raises(SettingsError, match=r"start must be linear, density, forgy or 2 centroids. Got 'random'"):
        kmeans(torch.ones(2), 2, "random")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="start must be"):
        kmeans(torch.ones(2), 2, torch.ones(3))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(WeightsError, match="NaN or infinity"):
            optimal_kmeans(torch.tensor([1.0, bad]), 2)
    with pytest.raises(WeightsError, match="no value"):
        initial_centroids(torch.zeros(0), 2)
