"""How sure an exit must be: chosen by what samples set aside for choosing say."""

from __future__ import annotations

import itertools
import math

import numpy as np

NEVER = 2.0
"""A threshold that no confidence reaches (infinity would do too, but weights must be finite)."""

_COMBINATIONS = 4096  # that are tried for the exits before the last early one, which is solved exactly


def choose_thresholds(confidence: np.ndarray, quality: np.ndarray, cost: np.ndarray, max_drop: float = 0.0) -> np.ndarray:
    """The thresholds of least mean cost under which the mean quality is at most `max_drop` below that of the last exit.

    The last early exit is solved exactly: its samples are sorted by confidence, and every number of them that may leave is tried. The
    exits before it take thresholds from a grid of their confidences' quantiles, all combinations of them (each distinct value up to
    256 of them for two early exits; fewer each for more exits). A threshold lies half-way between the least confident sample
    that leaves and the next one, so that the last bits of another engine's softmax decide nothing.

    Args:
        confidence: shape (exits - 1, samples), the highest softmax output at each early exit.
        quality: shape (exits, samples), the metric of each exit's answer for each sample; higher is better.
        cost: shape (exits,), what a sample costs that leaves at each exit.
        max_drop: in the metric's own unit, 0.01 is one point of accuracy.

    Returns:
        Shape (exits - 1,), float32. An exit where nobody should leave has a threshold of 2, which no confidence reaches.

    >>> confidence = np.array([[0.9, 0.8, 0.6, 0.5]])
    >>> quality = np.array([[1, 1, 0, 1], [1, 1, 1, 1]])
    >>> choose_thresholds(confidence, quality, np.array([1.0, 4.0])).tolist()
    [0.699999988079071]
    """
    early, samples = confidence.shape
    wanted = quality[-1].sum() - max_drop * samples - 1e-9 * samples
    grids = [_grid(row, max(2, min(256, math.floor(_COMBINATIONS ** (1 / max(1, early - 1)))))) for row in confidence[:-1]]
    best: tuple[float, float, tuple[float, ...]] | None = None
    for firsts in itertools.product(*grids) if early else ():
        left = np.ones(samples, dtype=bool)
        spent = gained = 0.0
        for number, threshold in enumerate(firsts):
            leaves = left & (confidence[number] >= threshold)
            spent, gained = spent + leaves.sum() * cost[number], gained + quality[number][leaves].sum()
            left &= ~leaves
        total, reached, last = _last_exit(confidence[-1][left], quality[-2:, left], cost[-2:], wanted - gained)
        candidate = (spent + total, -(gained + reached), (*(-t for t in firsts), -last))
        if gained + reached >= wanted and (best is None or candidate < best):
            best = candidate
    return np.array([-t for t in best[2]] if best else [NEVER] * early, dtype=np.float32)


def _grid(confidence: np.ndarray, size: int) -> list[float]:
    """Thresholds between neighbouring quantiles of the confidences, from nobody leaves to everybody does."""
    distinct = np.unique(confidence)[::-1]
    picked = np.unique(np.linspace(0, len(distinct) - 1, min(size - 1, len(distinct))).round().astype(int))
    return [NEVER, *(_between(distinct, value) for value in distinct[picked])]


def _between(descending: np.ndarray, value: float) -> float:
    """The middle between `value` and the next lower of the distinct values (or 0), as 32 bits hold it."""
    lower = descending[descending < value]
    below = lower[0] if len(lower) else 0.0
    middle = np.float32((value + below) / 2)
    return float(middle if middle > below else value)  # of two neighbouring 32-bit numbers the middle may be rounded down


def _last_exit(confidence: np.ndarray, quality: np.ndarray, cost: np.ndarray, wanted: float) -> tuple[float, float, float]:
    """Cost, quality and threshold of the cheapest choice for one exit that reaches `wanted`, or of the best if none does."""
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    gained = np.concatenate([[0.0], np.cumsum(quality[0][order])])
    lost = np.concatenate([[0.0], np.cumsum(quality[1][order])])
    reached = gained + quality[1].sum() - lost
    leaving = np.arange(len(order) + 1)
    spent = leaving * cost[0] + (len(order) - leaving) * cost[1]
    # equal confidences leave together
    whole = np.concatenate([[True], sorted_confidence[1:] < sorted_confidence[:-1], [True]]) if len(order) else np.array([True])
    allowed = whole & (reached >= wanted)
    if not allowed.any():
        allowed = whole & (reached == reached[whole].max())
    number = int(np.flatnonzero(allowed)[np.argmin(spent[allowed])])
    threshold = NEVER if number == 0 else _between(np.unique(sorted_confidence)[::-1], sorted_confidence[number - 1])
    return float(spent[number]), float(reached[number]), threshold
