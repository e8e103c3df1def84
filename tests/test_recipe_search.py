"""Looking for the share of neurons that a budget allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pared.core.errors import RunError
from pared.core.units import Ratio
from pared.recipe import Budget, method_name
from pared.recipe.search import TRIALS, best_share, candidate, search
from pared.training import Task, Train


@pytest.mark.parametrize(
    ("limit", "tried", "best"),
    [
        (1.0, [1.0], 1.0),
        (0.3, [1.0, 0.25, 0.5, 0.354, 0.297], 0.297),
        (0.9, [1.0, 0.25, 0.5, 0.707, 0.841], 0.841),
        (0.01, [1.0, 0.25, 0.125, 0.088, 0.074], 0.074),  # nothing fits: the nearest
    ],
)
def test_largest_share_that_is_small_enough(limit: float, tried: list[float], best: float) -> None:
    seen: list[float] = []
    found = best_share(lambda share: seen.append(share) or {"size": share <= limit, "drop": False}, shrink=True)
    assert (seen, found) == (tried, best)


@pytest.mark.parametrize(
    ("limit", "tried", "best"),
    [
        (2.0, [1.0], 1.0),  # even unpruned it loses too much
        (0.3, [1.0, 0.25, 0.5, 0.354, 0.297], 0.354),
        (0.9, [1.0, 0.25, 0.5, 0.707, 0.841], 1.0),
        (0.01, [1.0, 0.25, 0.125, 0.088, 0.074], 0.074),
    ],
)
def test_smallest_share_that_is_good_enough(limit: float, tried: list[float], best: float) -> None:
    seen: list[float] = []
    found = best_share(lambda share: seen.append(share) or {"drop": share >= limit}, shrink=False)
    assert (seen, found) == (tried, best)


def test_a_share_of_one_prunes_nothing() -> None:
    assert [method_name(step) for step in candidate(1.0, Train()).steps] == ["quantize.int8"]
    assert [method_name(step) for step in candidate(0.5).steps] == ["prune.neurons", "distill.teach", "quantize.int8"]


def toy_task() -> Task:
    inputs = torch.randn(96, 6)
    batches = list(zip(inputs.split(16), (inputs @ torch.randn(6, 3)).argmax(1).split(16), strict=True))
    return Task(batches[:4], batches[4:5], batches[5:])


def test_a_search_that_began_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run" / "trials").mkdir(parents=True)
    with pytest.raises(RunError, match=r"holds a search already\. Go on with --resume"):
        search(nn.Linear(6, 3), toy_task(), None, Budget(size=Ratio(0.1)), tmp_path / "run")


@pytest.mark.slow
def test_search(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    budget, task = Budget(size=Ratio(0.1)), toy_task()
    result = search(model, task, Train(epochs=3), budget, tmp_path / "run", quick=True, baselines=False)
    trials = json.loads((tmp_path / "run" / "trials" / "trials.json").read_text())
    assert len(trials) == TRIALS
    assert result.met is True
    assert result.to_dict() == json.loads((tmp_path / "run" / "result.json").read_text())
    # the largest of those that were small enough
    assert result.steps[0].settings["keep"] == max(trial["keep"] for trial in trials if trial["met"]["size"])
    again = search(model, task, Train(epochs=3), budget, tmp_path / "run", quick=True, baselines=False, resume=True)
    assert again.to_dict() == result.to_dict()
