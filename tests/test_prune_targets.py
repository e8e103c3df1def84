"""Neurons by targets: what `of` names shrinks to the share, within floor, cap, only and leave; and the loop's guard."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.core.bisection import bisect
from pared.core.errors import SettingsError
from pared.graph import count
from pared.measure.deployed import deploy
from pared.prune import Magnitude, Neurons, Random
from pared.prune.allocation import Room, by_ranking
from pared.prune.chooser import Chooser
from pared.prune.targets import Counted, Trials, reach
from pared.training import Task, Train


def task(channels: int = 1) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(16, channels, 8, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator))]
    return Task(batches, batches, batches)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    )


def cost(model: nn.Module, of: str, folder: Path) -> int:
    if of == "bytes":
        return deploy(model, task(), folder / "net.onnx").stat().st_size
    found = count(model, torch.zeros(2, 1, 8, 8))
    return found.macs if of == "macs" else found.params


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("of", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_a_target_is_met_and_not_by_far(of: Any, scope: Any, keep: float, tmp_path: Path) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    small = Neurons(keep=keep, of=of, scope=scope, round_to=1)(model, task())
    share = cost(small, of, tmp_path) / cost(model, of, tmp_path)
    assert 0.85 * keep <= share <= keep
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rounds_come_to_the_same_target(tmp_path: Path) -> None:
    small = Neurons(keep=0.3, of="macs", rounds=3, tune=Train(epochs=0), round_to=1)(network(), task())
    assert 0.25 <= cost(small, "macs", tmp_path) / cost(network(), "macs", tmp_path) <= 0.3


def test_a_target_beyond_the_floor_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pared"):
        small = Neurons(keep=0.01, of="macs", floor=0.5, round_to=1)(network(), task())
    assert "the target 0.01 can't be reached within floor, cap, leave and only" in caplog.text
    assert [layer.out_channels for layer in small.modules() if isinstance(layer, nn.Conv2d)] == [16, 24]


def test_keep_one_changes_nothing() -> None:
    model = network()
    small = Neurons(keep=1.0, of="macs")(model, task())
    assert all(torch.equal(small.state_dict()[name], value) for name, value in model.state_dict().items())


def outputs(model: nn.Module) -> list[int]:
    return [module.weight.shape[0] for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def scaled() -> nn.Sequential:
    """The first convolution's weights are a hundred times those of the second."""
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(100)
        model[3].weight.div_(100)
    return model


def test_a_global_ranking_knows_classes_apart_only_without_a_scale() -> None:
    importance = Magnitude(normalize="none")
    counts = outputs(Neurons(keep=0.5, scope="global", importance=importance, floor=0.125, round_to=1)(scaled(), task()))
    assert counts[0] == 32  # all of it before any of the others
    assert counts[1] == 6  # the floor of 48
    even = outputs(Neurons(keep=0.5, scope="global", floor=0.125, round_to=1)(scaled(), task()))
    assert even[0] < 32
    assert sum(even[:3]) == sum(counts[:3]) == (32 + 48 + 64) // 2


def test_a_cap_holds_in_a_global_ranking() -> None:
    importance = Magnitude(normalize="none")
    method = Neurons(keep=0.5, scope="global", importance=importance, floor=0.125, cap=0.75, round_to=1)
    assert outputs(method(scaled(), task()))[0] == 24


def test_only_and_leave() -> None:
    assert outputs(Neurons(keep=0.5, only=("3",))(network(), task())) == [32, 24, 64, 4]
    assert outputs(Neurons(keep=0.5, leave=("3",))(network(), task())) == [16, 48, 32, 4]
    with pytest.raises(SettingsError, match="nowhere"):
        Neurons(keep=0.5, only=("nowhere",))(network(), task())


def test_settings_are_refused_together() -> None:
    with pytest.raises(SettingsError) as caught:
        Neurons(of="size", scope="all", floor=0.9, cap=0.5, teacher=True, repair="glue", guard=-1)  # type: ignore[arg-type]
    text = str(caught.value)
    for field in ("of", "scope", "tune", "repair", "guard"):
        assert f"prune.neurons: {field}" in text
    with pytest.raises(SettingsError, match="floor"):
        Neurons(floor=0.9, cap=0.5)
    with pytest.raises(SettingsError, match="one number"):
        Neurons(keep={"0": 0.5}, of="macs")


class Ordered:
    """A metric that the test decides, one value for each evaluation."""

    name, higher_is_better = "score", True

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.full((len(outputs),), self.values.pop(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "kept"), [([0.9, 0.89, 0.88], 0.25), ([0.9, 0.89, 0.8], 0.5), ([0.9, 0.5], 1.0), ([0.9, float("nan")], 1.0)]
)
def test_a_guard_returns_the_last_good_network(values: list[float], kept: float) -> None:
    events: list[dict[str, Any]] = []
    rounds = len(values) - 1
    guarded = dataclasses.replace(task(), metric=Ordered(values), report=events.append)
    small = Neurons(keep=0.25, rounds=2, guard=0.03, round_to=1)(network(), guarded)
    assert outputs(small)[0] == int(32 * kept)
    assert [event["event"] for event in events] == ["cut", "guard"] * rounds
    assert [event["holds"] for event in events[1::2]] == [True] * (rounds - (kept > 0.25)) + [False] * (kept > 0.25)


def test_a_teacher_tunes() -> None:
    """With labels that say nothing, only the original can."""
    model = network()
    with torch.no_grad():
        model[9].weight.mul_(20)
    plan = Train(epochs=30, learning_rate=3e-3)
    without = Neurons(keep=0.5, importance=Random(0))(model, task())
    taught = Neurons(keep=0.5, importance=Random(0), tune=plan, teacher=True)(model, task())
    inputs = task().example_inputs(16)

    def distance(found: nn.Module) -> float:
        with torch.no_grad():
            return float((found.eval()(*inputs).softmax(1) - model.eval()(*inputs).softmax(1)).abs().mean())

    assert distance(taught) < 0.5 * distance(without)


@pytest.mark.parametrize("repair", ["batch-norm", "least-squares"])
def test_repair_comes_closer_to_the_original(repair: Any) -> None:
    model = network().eval()
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(*task().example_inputs(16))
    inputs = task().example_inputs(16)

    def distance(method: Neurons) -> float:
        with torch.no_grad():
            return float((method(model, task()).eval()(*inputs) - model.eval()(*inputs)).abs().mean())

    plain = Neurons(keep=0.5, importance=Random(0))
    assert distance(dataclasses.replace(plain, repair=repair)) < distance(plain) * (0.5 if repair == "least-squares" else 1.5)


def test_bisect_finds_the_largest_share() -> None:
    assert bisect(lambda share: share, 1.0) == 1.0
    assert bisect(lambda share: share + 2, 1.0) == 0.0
    assert abs(bisect(lambda share: share**3, 0.2, near=0.0) - 0.2 ** (1 / 3)) < 1e-3
    steps = bisect(lambda share: np.floor(share * 4) / 4, 0.5, near=0.0)
    assert 0.5 <= steps < 0.75


def test_a_ranking_counts_ties_and_ends() -> None:
    rooms = [Room(4, 4, 1, 4), Room(4, 4, 1, 2)]
    ones = [np.ones(4), np.ones(4)]
    assert by_ranking(ones, rooms, 0.5) == [3, 1]
    assert by_ranking(ones, rooms, 0.0) == [1, 1]
    assert by_ranking(ones, rooms, 1.0) == [4, 2]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_rounding_leaves_of_a_target_is_used(scope: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for width in (24, 40, 72) for layer in (nn.LazyLinear(width), nn.ReLU())], nn.LazyLinear(4))
    example = (torch.randn(2, 16),)
    model(*example)
    trials = Trials(model.eval(), example, Chooser(0.5, Random(0), scope=scope, round_to=8))
    cost = Counted("macs", model, example)
    for target in (0.37, 0.5, 0.61, 0.83):
        reached = reach(trials, cost, target)
        assert reached.cost <= target
        sizes = {key: room.size for key, room in trials.chooser.rooms(trials.analysis).items()}
        larger = [reached.counts | {key: count + 8} for key, count in reached.counts.items() if count + 8 <= sizes[key]]
        assert reached.cost >= 0.99 * target or all(cost.exact(trials.cut(counts)) > target for counts in larger)
