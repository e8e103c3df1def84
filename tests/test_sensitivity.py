"""What cutting one class at a time costs: against cuts done by hand, and the picture of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.core.errors import RunError, SettingsError, WeightsError
from pared.graph import count
from pared.graph.analysis import Analysis
from pared.prune import Magnitude, Random, plan
from pared.prune.chooser import Chooser
from pared.prune.sensitivity import ClassSensitivity, Sensitivity, SensitivityPoint, sensitivity
from pared.report.sensitivity import NAMED, write_sensitivity
from pared.training import Task, evaluate


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def task(**settings: object) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    batches = [(part, (part[:, 0] > 0).long()) for part in x.split(16)]
    return Task(batches, batches, batches, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", [None, Random(3)])
def test_each_number_is_that_of_the_network_cut_by_hand(importance: Random | None) -> None:
    model, data = mlp(), task()
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, data, (0.75, 0.3), importance)
    assert (found.metric, found.higher_is_better, found.original) == ("accuracy", True, evaluate(model, data))
    assert found.macs == 4 * 8 + 8 * 6 + 6 * 3
    assert [(each.layers, each.neurons) for each in found.classes] == [(("0",), 8), (("2",), 6)]
    for each in found.classes:
        for point in each.points:
            small = Chooser({each.layers[0]: point.share}, importance or Magnitude()).cut(model, data.example_inputs()).model
            assert point.metric == evaluate(small, data)
            assert point.macs == count(small, data.example_inputs()).macs
            assert point.neurons == len(small.get_submodule(each.layers[0]).weight)  # type: ignore[arg-type]
    assert [point.neurons for point in found.classes[0].points] == [6, 3]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shares_of_one_and_zero() -> None:
    found = sensitivity(mlp(), task(), (1.0, 0.0))
    for each in found.classes:
        whole, least = each.points
        assert (whole.neurons, whole.metric, whole.macs) == (each.neurons, found.original, found.macs)
        assert least.neurons == 1
        assert least.macs < whole.macs


def test_classes_are_those_of_the_plan_without_what_is_left_and_what_is_inexact() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    data = task()
    assert [each.layers for each in plan(model, data.example_inputs()).classes] == [("0",), ("2",)]
    assert [each.layers for each in sensitivity(model, data, [0.5]).classes] == [("0",)]
    assert [each.layers for each in sensitivity(model, data, [0.5], norms=True).classes] == [("0",), ("2",)]
    assert [each.layers for each in sensitivity(model, data, [0.5], leave=["0"], norms=True).classes] == [("2",)]


class Attention(nn.Module):
    """Heads: neurons in a grid, and two classes behind one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(4, 24), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(-1, 2, 4)).reshape(-1, 2, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 2, 8)
        return self.head(self.out(mixed).relu().mean(1))


def test_grids_and_several_classes_of_one_layer() -> None:
    x = torch.randn(32, 8)
    batches = [(x, torch.zeros(32, dtype=torch.long))]
    found = sensitivity(Attention(), Task(batches, batches, batches), [0.5])
    assert len(found.classes) > 1
    for each in found.classes:
        assert each.points[0].neurons < each.neurons
        assert each.points[0].macs < found.macs


def test_scores_are_computed_once() -> None:
    calls = []

    class Counting:
        def __call__(self, analysis: Analysis, task: Task | None) -> np.ndarray:
            calls.append(task)
            return Magnitude()(analysis)

    sensitivity(mlp(), task(), (0.75, 0.5, 0.25), Counting())
    assert len(calls) == 1
    assert calls[0] is not None


def test_scores_that_are_nan() -> None:
    def nothing(analysis: Analysis, task: Task | None) -> np.ndarray:
        return np.full(analysis.first.count, np.nan)

    with pytest.raises(WeightsError, match="gives NaN"):
        sensitivity(mlp(), task(), (0.5,), nothing)


def test_events() -> None:
    events: list[dict[str, object]] = []
    sensitivity(mlp(), task(report=events.append), (0.5, 0.25))
    stage, batch = {"event": "stage", "of": 2}, {"event": "batch", "total": 2}
    one, two = ({**batch, "done": done} for done in (1, 2))
    assert events == [{**stage, "name": "0", "index": 1}, one, two, {**stage, "name": "2", "index": 2}, one, two]


def test_bad_settings() -> None:
    with pytest.raises(SettingsError) as caught:
        sensitivity(mlp(), task(), (0.5, 1.5, "a"), leave="0")  # type: ignore[arg-type]
    assert [problem.split(" must")[0] for problem in caught.value.problems] == [
        "prune.sensitivity: shares[1]", "prune.sensitivity: shares[2]", "prune.sensitivity: leave",
    ]  # fmt: skip
    for shares in ((), "0.5"):
        with pytest.raises(SettingsError, match="shares must be a list of numbers"):
            sensitivity(mlp(), task(), shares)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="no module 'nowhere'"):
        sensitivity(mlp(), task(), leave=("nowhere",))


def made_up(classes: int, higher_is_better: bool = True) -> Sensitivity:
    def points(number: int) -> tuple[SensitivityPoint, ...]:
        return tuple(SensitivityPoint(share, int(8 * share), 0.9 - number / 50 * (1 - share), 50) for share in (0.75, 0.5))

    each = tuple(ClassSensitivity((f"block{number}.conv",) * (1 + number % 2), 8, points(number)) for number in range(classes))
    return Sensitivity("accuracy", higher_is_better, 0.9, 100, (0.75, 0.5), each)


def test_text_and_json() -> None:
    found = made_up(2)
    lines = str(found).splitlines()
    assert lines[0] == "accuracy on the validation split 0.9000, 100 MACs; one class cut at a time"
    assert [re.split(r"\s{2,}", line) for line in lines[1:]] == [
        ["layers", "neurons", "keep 75 %", "keep 50 %"],
        ["block0.conv", "8", "0.9000 (50 % MACs)", "0.9000 (50 % MACs)"],
        ["block1.conv, block1.conv", "8", "0.8950 (50 % MACs)", "0.8900 (50 % MACs)"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["classes"][1]["points"][0] == {"share": 0.75, "neurons": 6, "metric": 0.895, "macs": 50}
    nothing = dataclasses.replace(found, classes=())
    assert str(nothing).endswith("\nnothing can be cut")


def test_ranking_follows_the_metric() -> None:
    assert [each.layers[0] for each in made_up(3).ranked()] == ["block2.conv", "block1.conv", "block0.conv"]
    assert [each.layers[0] for each in made_up(3, higher_is_better=False).ranked()] == ["block0.conv", "block1.conv", "block2.conv"]


@pytest.mark.parametrize("classes", [0, 1, 3, 60])
def test_picture(classes: int, tmp_path: Path) -> None:
    found = made_up(classes)
    first = write_sensitivity(found, tmp_path / "one.svg").read_bytes()
    assert first == write_sensitivity(found, tmp_path / "two.svg").read_bytes()
    text = first.decode()
    named = set(re.findall(r">(block\d+\.conv)", text))
    assert named == {f"block{number}.conv" for number in range(classes)[-NAMED:]}
    assert (f"{classes - NAMED} more in grey" in text) == (classes > NAMED)
    assert write_sensitivity(found, tmp_path / "one.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_a_metric_that_isn_t_a_number(tmp_path: Path) -> None:
    point = SensitivityPoint(0.5, 4, float("nan"), 50)
    found = Sensitivity("loss", False, 0.9, 100, (0.5,), (ClassSensitivity(("a",), 8, (point,)),))
    assert write_sensitivity(found, tmp_path / "a.svg").is_file()
    both = dataclasses.replace(made_up(2), classes=(*made_up(2).classes, *found.classes))
    assert both.ranked()[0].layers == ("a",)


def test_a_picture_that_can_t_be_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"ends in \.svg or \.png"):
        write_sensitivity(made_up(1), tmp_path / "one.pdf")
    with pytest.raises(RunError, match="no such folder"):
        write_sensitivity(made_up(1), tmp_path / "nowhere" / "one.svg")
