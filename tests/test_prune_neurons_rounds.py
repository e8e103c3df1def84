"""Rounds of pruning neurons: what stays, repairs, a teacher, and a guard."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pared.core.errors import SettingsError, WeightsError
from pared.graph.analysis import Analysis
from pared.graph.rewritten import Rewritten
from pared.prune import GrowingRegularization, Neurons, loop
from pared.training import Objective, Task, Train
from pared.training.soft_targets import distillation_loss
from pared.training.teaching import taught_by


def task(**settings: Any) -> Task:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    batches = [(part, (part[:, 0] > 0).long()) for part in x.split(16)]
    return Task(batches, batches, batches, **settings)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


class Stubborn(nn.Module):
    """Says a width in a way that can't be repaired, so that a cut leaves a rewritten graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x)).reshape(-1, 4, 4).reshape(-1, 16)
        return self.c(self.b(x).relu())


@pytest.mark.parametrize("leave", [("a",), ("act",), ("b",)])
def test_what_is_left_stays_in_every_round_also_of_a_rewritten_network(leave: tuple[str, ...]) -> None:
    small = Neurons(keep=0.25, rounds=3, leave=leave, round_to=1)(Stubborn(), task())
    sizes = {name: small.get_parameter(f"{name}.weight").shape[0] for name in "ab"}
    if leave == ("b",):
        assert isinstance(small, Rewritten)
        assert sizes == {"a": 4, "b": 16}
    else:
        assert sizes == {"a": 16, "b": 4}


@pytest.mark.parametrize("repair", ["batch-norm", "least-squares"])
def test_a_repair_changes_weights_and_not_shapes(repair: Any) -> None:
    data = task()
    plain, repaired = (Neurons(keep=0.5, round_to=1, repair=how)(mlp(), data) for how in ("none", repair))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in repaired.parameters()]
    assert not all(torch.equal(plain.state_dict()[name], value) for name, value in repaired.state_dict().items())


def test_least_squares_comes_nearer_to_the_original() -> None:
    data, model = task(), mlp().eval()
    x = torch.cat([inputs for inputs, _ in data.train])
    plain, repaired = (Neurons(keep=0.5, round_to=1, repair=how)(model, data) for how in ("none", "least-squares"))
    errors = [float((small(x) - model(x)).square().mean().detach()) for small in (plain, repaired)]
    assert errors[1] < errors[0]


def test_the_teacher_is_the_tasks_or_else_the_model_given() -> None:
    found: list[float] = []
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)

    def fit(model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
        assert objective is not None
        found.append(float(objective(model.eval(), (x,), y).detach()))

    model, other = mlp().eval(), mlp().eval()
    other[5].bias.data += torch.tensor([3.0, 0.0])
    for teacher in (None, other):
        data = task(fit=fit, teacher=teacher)
        small = Neurons(keep=0.5, tune="1ep", teacher=True)(model, data).eval()
        logits = small(x)
        expected = 0.1 * data.loss(logits, y) + 0.9 * distillation_loss(logits, (teacher or model)(x), 4.0)
        assert found[-1] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found[0] != pytest.approx(found[1])


def test_a_teacher_alone_needs_no_labels() -> None:
    model = mlp().eval()
    data = task()
    objective = taught_by(model, data, 2.0, 1.0)
    assert float(objective(model, (torch.randn(4, 4),), torch.tensor([])).detach()) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize(("losses", "rounds_kept"), [((0.0, 0.005, 0.02), 2), ((0.5,), 0), ((0.01, 0.01, 0.01), 3), ((float("nan"),), 0)])
def test_a_guard_ends_the_loop_at_the_last_good_network(
    losses: tuple[float, ...], rounds_kept: int, higher_is_better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Metric:
        name = "metric"

        def __init__(self) -> None:
            self.higher_is_better = higher_is_better

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.zeros(len(outputs))

    values = iter([0.0, *(-loss if higher_is_better else loss for loss in losses)])
    monkeypatch.setattr(loop, "evaluate", lambda model, task: next(values))
    events: list[dict[str, Any]] = []
    data = task(metric=Metric(), report=events.append)
    small = Neurons(keep=0.125, rounds=3, round_to=1, guard=0.01)(mlp(), data)
    assert small[0].out_features == (16, 8, 4, 2)[rounds_kept]
    guards = [event for event in events if event["event"] == "guard"]
    assert [guard["holds"] for guard in guards] == [True] * rounds_kept + [False] * (rounds_kept < 3)
    assert [guard["round"] for guard in guards] == list(range(1, len(guards) + 1))
    assert guards[0]["allowed"] == 0.01


def test_every_round_says_how_far_it_has_got() -> None:
    events: list[dict[str, Any]] = []
    Neurons(keep=0.25, rounds=2, round_to=1)(mlp(), task(report=events.append))
    assert [(event["event"], event["round"], event["rounds"], event["of"]) for event in events] == [
        ("cut", 1, 2, "neurons"), ("cut", 2, 2, "neurons")
    ]  # fmt: skip
    widths = [16, 8, 4]
    macs = [4 * width + width * width + 2 * width for width in widths]
    assert [(event["macs"], event["original_macs"]) for event in events] == [(macs[1], macs[0]), (macs[2], macs[0])]
    assert not any("target" in event for event in events)


def test_a_real_guard_returns_a_network_as_good_as_asked() -> None:
    data = task()
    model = Train(epochs=20, learning_rate=0.02)(mlp(), data)
    small = Neurons(keep=0.0625, floor=0, rounds=4, round_to=1, guard=0.05)(model, data)
    assert loop.evaluate(small, data) >= loop.evaluate(model, data) - 0.05


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"of": "flops"}, "of"),
        ({"scope": "all"}, "scope"),
        ({"keep": {"0": 0.5}, "of": "macs"}, "keep"),
        ({"keep": {"0": 0.5}, "scope": "global"}, "keep"),
        ({"floor": -0.1}, "floor"),
        ({"floor": 0.6, "cap": 0.5}, "floor"),
        ({"cap": 0}, "cap"),
        ({"repair": "glue"}, "repair"),
        ({"guard": -1}, "guard"),
        ({"teacher": True}, "tune"),
        ({"teacher": 1, "tune": "1ep"}, "teacher"),
        ({"only": "0"}, "only"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError, match=rf"^prune.neurons: {field} must be"):
        Neurons(**settings)


def test_unknown_paths_are_named() -> None:
    for settings in ({"only": ("nothing",)}, {"leave": ("nothing",)}):
        with pytest.raises(SettingsError, match="'nothing'"):
            Neurons(**settings)(mlp(), task())  # type: ignore[arg-type]


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(WeightsError, match="NaN"):
        Neurons(importance=lambda analysis, task: torch.full((analysis.first.count,), torch.nan).numpy())(mlp(), task())


@pytest.mark.parametrize("method", [Neurons, partial(GrowingRegularization, train="1ep")])
def test_an_importance_that_gives_nan_is_named(method: Callable[..., Any]) -> None:
    class Broken:
        def __call__(self, analysis: Analysis, task: Task | None) -> NDArray[np.float64]:
            return np.full(analysis.first.count, np.nan)

    with pytest.raises(WeightsError, match="Broken gives NaN"):
        method(importance=Broken())(mlp(), task())
