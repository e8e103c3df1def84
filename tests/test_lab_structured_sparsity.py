"""The experiment with group lasso: which strength is chosen, what is compared, the verdict, and one small run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pared import data
from pared.architecture.nets import lenet5
from pared.core.errors import SettingsError
from pared.lab.experiment import configured
from pared.lab.structured_sparsity import run
from pared.lab.structured_sparsity.run import COLUMNS, EXPERIMENT, Attempt, StructuredSparsity, change, choose, compare
from pared.measure import Latency
from pared.prune import GroupLasso
from pared.training import Task


def images(samples: int = 16) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(8, 1, 28, 28, generator=generator), torch.arange(8) % 10) for _ in range(samples // 8)]
    return Task(batches, batches, batches)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are loaded by name only, and twice as many outputs take twice the time."""
    monkeypatch.setattr(
        run, "latency", lambda files, inputs: {name: Latency(file.stat().st_size, 0, 1, 1, "") for name, file in files.items()}
    )
    monkeypatch.setattr(run, "time_operators", lambda operators: [float(each.outputs) for each in operators])


def attempt(macs: int, valid: float) -> Attempt:
    return Attempt(0.01, nn.Identity(), nn.Identity(), nn.Identity(), macs, valid)


def row(seed: int = 0, **changes: Any) -> dict[str, Any]:
    good = dict.fromkeys(COLUMNS, 1.0) | {
        "dense": 9.0,
        "control": 9.0,
        "tuned": 9.5,
        "conv2": 20,
        "conv2_speedup": 2.0,
        "speedup": 2.0,
        "change": 1e-6,
        "seed": seed,
    }
    return good | changes


def test_the_fewest_macs_that_are_accurate_enough_are_chosen() -> None:
    weak, middle, strong = attempt(90, 91.5), attempt(50, 91.0), attempt(10, 90.9)
    assert choose([weak, middle, strong], 91.0) is middle
    assert choose([weak, middle, strong], 90.0) is strong
    assert choose([strong, middle, weak], 95.0) is weak


def test_a_change_is_a_share_of_the_largest_output() -> None:
    batches = [(torch.tensor([[1.0, -4.0]]), torch.tensor([0])), (torch.tensor([[2.0, 0.0]]), torch.tensor([0]))]
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        second.weight.copy_(torch.tensor([[1.5, 0.0], [0.0, 1.0]]))
    assert change(first, second, Task(batches, batches, batches)) == 0.25
    assert change(first, copy.deepcopy(first), Task(batches, batches, batches)) == 0


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "reproduced"),
        ({"tuned": 9.51}, "partly reproduced"),
        ({"conv2": 21}, "partly reproduced"),
        ({"change": 2e-5}, "partly reproduced"),
        ({"speedup": 1.99}, "partly reproduced"),
        ({"conv2_speedup": 1.99}, "partly reproduced"),
        ({"tuned": 20, "conv2": 50, "change": 1, "speedup": 1, "conv2_speedup": 1}, "did not reproduce"),
    ],
)
def test_the_verdict_has_six_claims(changes: dict[str, Any], outcome: str) -> None:
    found = EXPERIMENT.verdict([row(0, **changes), row(1, **changes)])
    assert found.outcome == outcome
    assert found.text.count(": yes.") + found.text.count(": no.") == 6
    assert found.figures[0] == ("", "mean", "seed 0", "seed 1")


def test_claims_are_about_means_and_the_worst_change() -> None:
    assert EXPERIMENT.verdict([row(0, tuned=9.9), row(1, tuned=9.1)]).outcome == "reproduced"
    assert EXPERIMENT.verdict([row(0, change=2e-5), row(1, change=0.0)]).outcome == "partly reproduced"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"epochs": -1}, "epochs"), ({"strengths": ()}, "strengths"), ({"strengths": (0.1, -1)}, "strengths"), ({"tune": 0.5}, "tune")],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=rf"lab\.structured_sparsity.*{message}"):
        configured(EXPERIMENT, wrong)


def test_what_is_cut_is_counted_and_timed() -> None:
    torch.manual_seed(0)
    task, dense = images(), lenet5()
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        masked.conv2.weight[10:] = 0
        masked.conv2.bias[10:] = 0
        masked.fc1.weight[100:] = 0
        masked.fc1.bias[100:] = 0
    cut = GroupLasso().cut(masked, task)
    found = compare(dense, dense, Attempt(0.01, masked, cut, cut, 1, 50.0), task)
    assert (found["conv1"], found["conv2"]) == (20, 10)
    assert found["masked"] == found["cut"] == found["tuned"]
    assert found["dense"] == found["control"]
    macs = 20 * 25 * 576 + 10 * 500 * 64 + 160 * 100 + 1000
    assert found["macs"] == round(100 * macs / 2_293_000, 2)
    zeros = 40 * 501 + 400 * 801 + 20 + 10 + 100 + 10  # biases begin at zero
    assert found["zeros"] == round(100 * zeros / 431_080, 2)
    assert found["bytes"]["tuned"] < found["bytes"]["dense"] / 4
    assert found["change"] < 1e-5
    assert found["speedup"] == round(found["bytes"]["dense"] / found["bytes"]["tuned"], 2)
    assert found["conv2_speedup"] == 5


@pytest.mark.slow
def test_a_seed_gives_the_same_row_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda name, seed, batch_size: images())
    small = StructuredSparsity(seeds=(3,), epochs=1, strengths=(0.0, 1000.0), train=1, tune=1)
    first, again = small.measure(3), small.measure(3)
    errors = ("dense", "control", "masked", "cut", "tuned", "change", "ladder", "strength", "macs")
    assert {name: first[name] for name in errors} == {name: again[name] for name in errors}
    assert first["ladder"][0]["macs"] < 2_293_000
    assert first["masked"] == first["cut"]
    assert set(COLUMNS) <= set(first)
