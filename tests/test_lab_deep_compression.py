"""The experiment with Deep Compression: one small run, and what its verdict says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pared.architecture.nets import lenet300
from pared.core.errors import SettingsError
from pared.lab.deep_compression import run
from pared.lab.deep_compression.run import EXPERIMENT, DeepCompression
from pared.lab.deep_compression.schedules import SCHEDULES, Schedule
from pared.lab.experiment import configured
from pared.training import Train

SMALL = Schedule(
    lambda: lenet300(size=8, width=0.1),
    3,
    Train(epochs=1, augment=False),
    1,
    ({"fc1": 0.3}, {"fc1": 0.2}),
    ((2, 2), (3, 4)),
    Train(epochs=1),
)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setitem(run.SCHEDULES, "small digits", SMALL)
    (found,) = DeepCompression(seeds=(3,), networks=("small digits",)).run(lambda event: None, tmp_path, frozenset())
    return found


def test_a_row_counts_whole_files_and_weights(row: dict[str, Any]) -> None:
    assert row["key"] == "small digits seed 3"
    assert row["original"] == 4 * (64 * 30 + 30 + 30 * 10 + 10 + 10 * 10 + 10)
    assert row["same"] is True
    assert row["contexts"] <= row["static"] < row["dense_packed"] < row["original"]
    assert [each[:2] for each in row["tried"]] == [[0, "2"], [0, "3 / 4"], [1, "2"], [1, "3 / 4"]]
    # none of these is 40 times smaller, so the smallest is taken
    number, bits, size, _ = min(row["tried"], key=lambda each: each[2])
    assert (row["keep"], row["bits"]) == (SMALL.keep[number], bits)
    assert abs(row["contexts"] - size) < 100
    assert row["left"] == pytest.approx(100 * (SMALL.keep[number]["fc1"] * 1920 + 400) / 2320, abs=0.1)
    assert {f"{start}_{bits}" for start in run.STARTS for bits in (2, 3)} <= row.keys()


def test_the_verdict_takes_the_better_dense_network(row: dict[str, Any]) -> None:
    good = {**row, "original": 4_000, "contexts": 100, "static": 110, "huffman": 120, "dense": 2.0, "long": 1.5, "error": 1.8}
    good |= {"linear_2": 5.0, "forgy_2": 6.0, "linear_3": 3.0, "forgy_3": 3.0}
    found = EXPERIMENT.verdict([good])
    assert found.outcome == "reproduced"
    assert "small digits: 40.0 times smaller at +0.30 points against the better dense network: yes." in found.text
    assert found.figures[1][:6] == ("small digits", "2.00", "1.50", "1.80", "100", "40.0")
    for change in ({"error": 1.81}, {"contexts": 101}, {"same": False}, {"huffman": 110}, {"forgy_2": 4.9}):
        assert EXPERIMENT.verdict([{**good, **change}]).outcome == "partly reproduced"


def test_shares_and_settings() -> None:
    for schedule in SCHEDULES.values():
        layers = {name for name, module in schedule.build().named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        assert all(set(keep) == layers for keep in schedule.keep)
    with pytest.raises(SettingsError, match="networks must be of lenet300 mnist-10k"):
        configured(EXPERIMENT, {"networks": ["lenet6 mnist"]})
