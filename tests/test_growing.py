"""Growing regularisation: the penalty's course, what it presses, and that the cut neurons are the chosen ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pared.core.errors import SettingsError, TrainingError
from pared.core.seeds import seed_everything
from pared.graph.analysis import analyse
from pared.graph.capture import capture
from pared.prune import growing
from pared.prune.growing import GrowingRegularization, _Choice, chosen_groups, growing_penalty
from pared.prune.importance import Magnitude, Random
from pared.training import Journal, Machine, Task, Train

FAST = Train(epochs=10, optimizer="sgd", learning_rate=0.05, schedule="constant")


def task(**settings: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, generator=generator)
    batches = [(part, (part[:, 0] > 0).long()) for part in x.split(8)]
    return Task(batches, batches, batches, **settings)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3))


def test_the_penalty_climbs_in_a_straight_line_and_stays() -> None:
    course = np.array([growing_penalty(step / 10, 2.0, 0.5) for step in range(10)])
    np.testing.assert_allclose(course, np.minimum(2.0, 0.4 * np.arange(10)))


def test_the_chosen_are_pressed_by_the_closed_form_and_the_others_not() -> None:
    """Without a gradient a pressed weight is divided by 1 + step size · penalty after every step, and by nothing else."""
    seen: list[torch.Tensor] = []

    def loop(model: Any, task: Task, train: Train, objective: Any = None) -> None:
        seen.append(model[0].weight.detach().clone())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(train.epochs):
            for inputs, targets in task.train:
                optimizer.zero_grad()
                (0 * objective(model, (inputs,), targets)).backward()
                optimizer.step()
        seen.append(model[0].weight.detach().clone())

    method = GrowingRegularization(keep=0.4, ceiling=2.0, growing=0.5, train="3ep", round_to=1)
    method(mlp(), task(fit=loop))
    before, after = (tensor.numpy().astype(np.float64) for tensor in seen)
    factor = np.prod([1 / (1 + 0.5 * min(2.0, 2.0 * step / 12 / 0.5)) for step in range(12)])
    chosen = np.argsort(np.abs(before).sum(1))[:6]
    expected = before.copy()
    expected[chosen] *= factor
    np.testing.assert_allclose(after, expected, rtol=1e-5)


def test_exactly_the_chosen_are_cut() -> None:
    model, data = mlp(), task()
    norms = model[0].weight.abs().sum(1)
    kept = sorted(norms.argsort(descending=True)[:4].tolist())
    small = GrowingRegularization(keep=0.4, ceiling=0, train=Train(epochs=0), round_to=1)(model, data)
    assert torch.equal(small[0].weight, model[0].weight[kept])


def test_pressed_neurons_leave_without_a_trace() -> None:
    method = GrowingRegularization(keep=0.4, train=Train(epochs=25, optimizer="sgd", learning_rate=0.1, schedule="constant"), round_to=1)
    model, data = mlp(), task()
    analysis = analyse(capture(model, data.example_inputs()))
    choice = _Choice(method.importance(analysis, data), 0.4, 1)
    groups = chosen_groups(analysis, choice)
    assert groups is not None
    before = float(groups.norms())
    seed_everything(1)
    method._train(model, data, groups)
    assert float(groups.norms()) < 1e-3 * before
    seed_everything(1)
    small = method(mlp(), data).eval()
    x = torch.randn(20, 6)
    assert torch.allclose(small(x), model.eval()(x), atol=1e-2)
    assert list(small.state_dict()) == list(mlp().state_dict())


def test_growing_loses_less_than_removing_at_once() -> None:
    data = task()
    seed_everything(0)
    base = Train(epochs=20, learning_rate=0.02)(mlp(), data)
    x, y = (torch.cat(parts) for parts in zip(*data.train, strict=True))

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model.eval()(x), y))

    at_once = GrowingRegularization(keep=0.2, train=Train(epochs=0), round_to=1)(base, data)
    grown = GrowingRegularization(keep=0.2, train=FAST, round_to=1)(base, data)
    assert grown[0].out_features == at_once[0].out_features == 2
    assert loss(grown) < loss(at_once)


@pytest.mark.parametrize(("keep", "left"), [(0.0, 1), (0.01, 1), (0.5, 5), (1.0, 10)])
def test_counts_are_exact(keep: float, left: int) -> None:
    method = GrowingRegularization(keep=keep, train="1ep", round_to=1, importance=Random(seed=1))
    assert method(mlp(), task())[0].out_features == left


def test_ties_are_cut_by_count() -> None:
    model = mlp()
    nn.init.constant_(model[0].weight, 0.5)
    assert GrowingRegularization(keep=0.3, train="1ep", round_to=1)(model, task())[0].out_features == 3


def test_a_killed_step_ends_as_an_undisturbed_one(tmp_path: Any) -> None:
    class Killed(Exception):
        pass

    method = GrowingRegularization(keep=0.5, train=FAST, tune="1ep", round_to=1)

    def run(directory: str, die_at: int | None = None) -> nn.Module:
        def report(event: dict[str, Any]) -> None:
            if event["event"] == "batch" and event["epoch"] == die_at:
                raise Killed

        seed_everything(3)
        return method(mlp(), task(journal=Journal(tmp_path / directory), report=report))

    undisturbed = run("a")
    with pytest.raises(Killed):
        run("b", die_at=6)
    for other in (run("b"), run("b")):
        assert all(torch.equal(a, b) for a, b in zip(undisturbed.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_loop_without_torchs_optimisers_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"prune\.growing_regularization: the training took no step"):
        GrowingRegularization(train="1ep", round_to=1)(mlp(), task(fit=lambda model, task, train, objective=None: None))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 1.5}, "keep must be a number at least 0 and at most 1"),
        ({"importance": 3}, "importance must be an importance"),
        ({"ceiling": -1}, "ceiling must be a number at least 0"),
        ({"growing": 0}, "growing must be a number greater than 0"),
        ({"round_to": 0}, "round_to must be a whole number"),
        ({"train": Train(early_stop=1)}, "train must be a plan without early_stop"),
        ({"leave": "0"}, "leave must be a list"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        GrowingRegularization(**wrong)


def test_the_default_ranks_as_the_paper() -> None:
    assert GrowingRegularization().importance == Magnitude(order=1)


def test_it_is_looked_at_on_the_device_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looked(Exception):
        pass

    def look(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert {tensor.device.type for tensor in (*model.parameters(), *inputs)} == {"meta"}
        raise Looked

    # a device without memory stands in for a GPU
    monkeypatch.setattr(Machine, "device", torch.device("meta"))
    monkeypatch.setattr(growing, "capture", look)
    with pytest.raises(Looked):
        GrowingRegularization()(mlp(), task())
