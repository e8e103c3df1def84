"""Plans, schedules, optimizers, accuracy, machines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pared.core.errors import SettingsError
from pared.training import Accuracy, Machine, Train
from pared.training.plan import learning_rate_factor, make_optimizer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": -1}, "train: epochs must be a whole number at least 0"),
        ({"epochs": 1.5}, "epochs"),
        ({"optimizer": "lion"}, r"train: optimizer must be adam, adamw or sgd\. Got 'lion'"),
        ({"learning_rate": 0}, "learning_rate must be a number greater than 0"),
        ({"schedule": "cosin"}, "schedule"),
        ({"early_stop": 0}, "early_stop"),
        ({"label_smoothing": 2}, "label_smoothing"),
        ({"label_smoothing": 0.1, "teach": 0.5}, "label_smoothing must be 0 where teach isn't"),
        ({"teach": 1.5}, "teach must be a number at least 0 and at most 1"),
        ({"temperature": 0}, "temperature must be a number greater than 0"),
        ({"momentum": float("nan")}, "momentum"),
    ],
)
def test_plans_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Train(**fields)


def test_all_mistakes_of_a_plan_are_reported_together() -> None:
    with pytest.raises(SettingsError) as caught:
        Train(epochs=-1, warmup=-1, augment="yes")  # type: ignore[arg-type]
    assert len(caught.value.problems) == 3


def test_parse() -> None:
    assert Train.parse("3ep") == Train.parse(3) == Train(epochs=3)
    plan = Train(epochs=2, optimizer="sgd")
    assert Train.parse(plan) is plan
    with pytest.raises(SettingsError, match="2ep"):
        Train.parse("two")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.75, 0.25]),
        ("linear", [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        ("step", [0.5, 1.0, 1.0, 1.0, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_on_paper(schedule: Any, expected: list[float]) -> None:
    assert [learning_rate_factor(step, 5, 2, schedule) for step in range(5)] == pytest.approx(expected)


def test_step_schedule_reaches_a_hundredth() -> None:
    assert [learning_rate_factor(step, 8, 0, "step") for step in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_only_matrices_are_decayed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    groups = make_optimizer(model, Train(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 2)]
    bare = nn.BatchNorm1d(3)
    assert len(make_optimizer(bare, Train(optimizer="sgd", momentum=0.0)).param_groups) == 1


def test_accuracy_with_ties_top_k_and_places() -> None:
    outputs = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    assert Accuracy()(outputs, torch.tensor([0, 2])).tolist() == [1, 0]
    assert Accuracy(top=2)(outputs, torch.tensor([1, 2])).tolist() == [1, 1]
    assert Accuracy(top=2)(outputs, torch.tensor([2, 0])).tolist() == [0, 0]
    assert Accuracy(top=9)(outputs, torch.tensor([2, 0])).tolist() == [1, 1]
    assert (Accuracy().name, Accuracy(top=5).name) == ("accuracy", "top-5 accuracy")
    places = torch.zeros(1, 2, 4)
    places[0, 1, :3] = 1
    assert Accuracy()(places, torch.ones(1, 4, dtype=torch.long)).tolist() == [0.75]
    with pytest.raises(SettingsError, match="accuracy: top"):
        Accuracy(top=0)


def test_machines_that_cannot_be() -> None:
    with pytest.raises(SettingsError) as caught:
        Machine(devices=0, precision="8-true", strategy="fsdp")  # type: ignore[arg-type]
    assert len(caught.value.problems) == 3
    with pytest.raises(SettingsError, match="machine: "):
        Machine(accelerator="abacus").fabric()
