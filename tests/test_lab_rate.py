"""The experiments with rate-aware training: what is chosen, the verdicts, and one small run of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pared.core.errors import SettingsError
from pared.lab.experiment import configured
from pared.lab.rate_ablations import run as ablations
from pared.lab.rate_ablations.run import VARIANTS, RateAblations
from pared.lab.rate_aware import run as aware
from pared.lab.rate_aware.run import SETUPS, RateAware, Setup, choose
from pared.training import Task


def images(name: str, seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    batches = [(torch.rand(8, 1, 28, 28, generator=generator), torch.arange(8) % 10) for _ in range(2)]
    return Task(batches, batches, batches)


def point(weights: int, valid: float, test: float) -> dict[str, Any]:
    return {"price": 1e-6, "weights": weights, "bytes": weights + 100, "program": 100, "valid": valid, "test": test}


def row(setup: Setup, seed: int, *points: dict[str, Any]) -> dict[str, Any]:
    baseline = {"valid": 90.0, "test": 89.0}
    return {
        "key": f"{setup.name} seed {seed}",
        "setup": setup.name,
        "seed": seed,
        "baseline": baseline,
        "float_bytes": 10**6,
        "points": list(points),
    }


def test_the_smallest_point_that_is_accurate_enough_is_chosen() -> None:
    large, middle, small = point(9000, 89.9, 88.0), point(5000, 89.6, 89.9), point(1000, 88.0, 87.0)
    found = row(SETUPS[0], 0, large, middle, small)
    assert choose(found, 0.3) is large
    assert choose(found, 0.4) is middle
    assert choose(found, 2.0) is small
    assert choose(found, 0.0) is large


def test_the_verdict_takes_means_of_bytes_and_losses() -> None:
    setup = SETUPS[0]
    solid, loose = setup.goals[0], setup.goals[2]
    rows = [row(setup, seed, point(solid + by, 89.8, 88.8 - by / 1000), point(loose, 89.1, 87.9)) for seed, by in ((0, -100), (1, 100))]
    verdict = RateAware(only=(setup.name,)).verdict(rows)
    assert verdict.outcome == "partly reproduced"
    assert f"at most 0.3 points lost (0.20) at no more than {solid:,} bytes ({solid:,}): yes" in verdict.text
    assert f"at most 1.0 points lost (1.10) at no more than {loose:,} bytes ({loose:,}): no" in verdict.text
    assert verdict.figures[1][-2:] == ("solid", "2")
    assert len(verdict.figures) == 1 + 2 + 2


def test_a_network_that_is_not_known_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"lab\.rate_aware: only must be some of lenet300 mnist-10k"):
        configured(RateAware(), {"only": ["lenet7"]})
    with pytest.raises(SettingsError, match=r"lab\.rate_ablations: price must be"):
        configured(RateAblations(), {"price": 0})


def test_a_curve_has_a_file_for_every_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aware, "dark_task", images)
    found = aware.measure(Setup("lenet300", "mnist-10k", 1, 1e-3, ((0.0, 1), (1e-5, 1)), (1, 1, 1, 1)), 0)
    assert found["key"] == "lenet300 mnist-10k seed 0"
    assert [each["price"] for each in found["points"]] == [0.0, 1e-5]
    assert all(each["weights"] + each["program"] == each["bytes"] < found["float_bytes"] / 8 for each in found["points"])
    assert found["points"][0]["widths"][-1] == 10


def test_every_variant_is_packed_with_contexts_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "dark_task", images)
    experiment = RateAblations(epochs=1, train=1)
    rows = list(experiment.run(lambda event: None, None, frozenset(experiment.keys()[1:])))  # type: ignore[arg-type]
    assert [each["variant"] for each in rows] == ["all on"]
    assert rows[0]["weights"] <= rows[0]["static"]
    assert experiment.verdict(rows).outcome == "unfinished"


def test_the_verdict_on_parts() -> None:
    same = {"valid": 90.0, "test": 90.0, "nonzero": 5, "entropy": 1800}
    sizes = dict(zip(VARIANTS, ((1000, 2000), (1100, 1200), (9000, 9100)), strict=True))
    rows = [
        {"variant": name, "seed": 0, "weights": weights, "static": static, "bytes": weights, **same}
        for name, (weights, static) in sizes.items()
    ]
    verdict = RateAblations().verdict(rows)
    assert verdict.outcome == "reproduced"
    assert "(9,000 to 1,000 bytes)" in verdict.text
    assert "save at least a quarter (50 %)" in verdict.text
    assert "price knew none (8 %)" in verdict.text
    assert "zeroth-order entropy (0.56)" in verdict.text
