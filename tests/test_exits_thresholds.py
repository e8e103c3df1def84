"""Thresholds are the cheapest that keep the quality, and lie where rounding decides nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pared.dynamic import choose_thresholds
from pared.dynamic.thresholds import NEVER

# --- thresholds ---


def brute_force(confidence: np.ndarray, quality: np.ndarray, cost: np.ndarray, max_drop: float) -> float:
    """The least cost over all thresholds at observed confidences."""
    best = np.inf
    for thresholds in itertools.product(*[[*np.unique(row), NEVER] for row in confidence]):
        where = np.argmax(np.vstack([confidence >= np.array(thresholds)[:, None], np.ones((1, confidence.shape[1]), bool)]), axis=0)
        samples = np.arange(len(where))
        if quality[where, samples].sum() >= quality[-1].sum() - max_drop * len(where) - 1e-9:
            best = min(best, cost[where].sum())
    return best


def spent(thresholds: np.ndarray, confidence: np.ndarray, quality: np.ndarray, cost: np.ndarray) -> tuple[float, float]:
    where = np.argmax(np.vstack([confidence.astype(np.float32) >= thresholds[:, None], np.ones((1, confidence.shape[1]), bool)]), axis=0)
    return cost[where].sum(), quality[where, np.arange(len(where))].sum()


@pytest.mark.parametrize("exits", [1, 2, 3])
@pytest.mark.parametrize("max_drop", [0.0, 0.1, 1.0])
def test_thresholds_are_the_cheapest(exits, max_drop):
    rng = np.random.default_rng(exits)
    for _ in range(5):
        confidence = rng.choice([0.3, 0.5, 0.7, 0.8, 0.9, 1.0], size=(exits, 9))
        quality = (rng.random((exits + 1, 9)) < np.linspace(0.5, 0.95, exits + 1)[:, None]).astype(float)
        cost = np.cumsum(rng.integers(1, 9, exits + 1)).astype(float)
        thresholds = choose_thresholds(confidence, quality, cost, max_drop)
        assert thresholds.dtype == np.float32
        total, reached = spent(thresholds, confidence, quality, cost)
        assert reached >= quality[-1].sum() - max_drop * 9 - 1e-9
        assert total == brute_force(confidence, quality, cost, max_drop)


def test_no_threshold_where_every_early_answer_is_wrong():
    assert choose_thresholds(np.array([[0.9, 0.8]]), np.array([[0, 0], [1, 1]]), np.array([1.0, 2.0])).tolist() == [NEVER]
    assert choose_thresholds(np.zeros((0, 3)), np.ones((1, 3)), np.array([1.0])).tolist() == []


def test_threshold_lies_between_neighbouring_confidences():
    confidence = np.array([[0.9, 0.6, 0.5]])
    assert choose_thresholds(confidence, np.array([[1, 0, 0], [1, 1, 1]]), np.array([1.0, 2.0])) == pytest.approx([0.75])
    near = np.array([[1.0, np.nextafter(np.float32(1), np.float32(0))]])
    chosen = choose_thresholds(near, np.array([[1, 0], [1, 1]]), np.array([1.0, 2.0]))
    assert ((near.astype(np.float32) >= chosen) == [[True, False]]).all()


def test_equal_confidences_leave_together():
    chosen = choose_thresholds(np.array([[0.9, 0.9, 0.5]]), np.array([[1, 0, 1], [1, 1, 1]]), np.array([1.0, 2.0]))
    assert chosen.tolist() == [NEVER]
