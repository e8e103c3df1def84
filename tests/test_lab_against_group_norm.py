from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pared.architecture.nets import resnet8
from pared.core.errors import ModelError, SettingsError
from pared.graph import count
from pared.lab.against_group_norm import arms
from pared.lab.against_group_norm.arms import Arm, fast, measured, projected, sgd
from pared.lab.against_group_norm.peer import GroupNorm, before_steps, obstacle
from pared.lab.against_group_norm.run import AgainstGroupNorm
from pared.lab.against_group_norm.verdict import judge, lost, ratio, table
from pared.measure import Latency
from pared.training import Task


def task_of(*shape: int) -> Task:
    torch.manual_seed(0)
    batches = [(torch.randn(8, *shape), torch.arange(8) % 3)]
    return Task(batches, batches, batches)


def convnet() -> nn.Sequential:
    torch.manual_seed(1)
    body = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


def arm(test: float, ms: float = 1.0, seconds: float = 10.0) -> dict[str, Any]:
    return {"valid": test, "test": test, "macs": 100 * ms, "params": 10 * ms, "ms": ms, "seconds": seconds}


def row(seed: int, ours: float, peer: float, ms: float = 0.5, unprojected: str = "RuntimeError") -> dict[str, Any]:
    arms = {"dense": arm(9.0, seconds=0.0), "dense, trained on": arm(8.75), "sparse learning": arm(10.0)}
    for speedup in (2.1, 2.6):
        arms |= {f"pared {speedup}": arm(ours, ms), f"group norm {speedup}": arm(peer, 0.5)}
    return {"key": f"resnet8 seed {seed}", "net": "resnet8", "seed": seed, "unprojected": unprojected, "arms": arms}


def test_figures_are_means_over_rows() -> None:
    rows = [row(0, 9.5, 10.0), row(1, 8.25, 9.0)]
    assert lost(rows, "pared 2.1") == -0.125
    assert lost(rows, "pared 2.1", "dense, trained on") == 0.125
    assert lost(rows, "pared 2.1", "group norm 2.1") == -0.625
    assert ratio([row(0, 9.0, 9.0, ms=0.5), row(1, 9.0, 9.0, ms=0.25)], "pared 2.1", "group norm 2.1", "ms") == 0.75


def test_all_claims_hold() -> None:
    verdict = judge([row(0, 8.5, 9.0)], (2.1, 2.6))
    assert verdict.outcome == "reproduced"
    assert "at 2.1 times pared loses nothing (-0.50 points of test error): yes." in verdict.text
    assert "at 2.6 times pared loses at most 0.3 points (-0.50 points of test error): yes." in verdict.text
    assert "at 2.6 times it is at least as accurate as the group-norm pruner (-0.50): yes." in verdict.text
    assert "at 2.1 times pared has -0.25 to the dense network trained on as long;" in verdict.text
    assert "at 2.6 times pared has -0.25 to the dense network trained on as long." in verdict.text
    assert verdict.text.endswith("can't cut 1 of 1 networks as they come, with padded shortcuts.")


def test_a_claim_for_each_way_to_fail() -> None:
    assert judge([row(0, 9.2, 9.5)], (2.1, 2.6)).text.count(": no.") == 1  # 0.2 points are too many at 2.1 times only
    assert judge([row(0, 9.4, 9.5)], (2.1, 2.6)).text.count(": no.") == 2
    assert judge([row(0, 8.5, 8.25)], (2.1, 2.6)).text.count(": no.") == 2
    assert judge([row(0, 8.5, 9.0, ms=0.6)], (2.1, 2.6)).text.count(": no.") == 2
    assert judge([row(0, 9.5, 9.25, ms=0.6)], (2.1, 2.6)).outcome == "did not reproduce"
    assert "can't cut 0 of 1" in judge([row(0, 8.5, 9.0, unprojected="")], (2.1, 2.6)).text


def test_the_table_shows_every_arm_and_counts_the_sparse_learning() -> None:
    lines = table([row(0, 9.5, 10.0), row(1, 8.5, 9.0)])
    assert lines[0] == ("test error, %", "mean", "resnet8 seed 0", "resnet8 seed 1", "MACs", "parameters", "time", "training, s")
    assert [line[0] for line in lines[1:5]] == ["dense", "dense, trained on", "sparse learning", "pared 2.1"]
    assert lines[1][-1] == "0"
    assert lines[4] == ("pared 2.1", "9.00", "9.50", "8.50", "0.500", "0.500", "0.500", "10")
    assert lines[5][0] == "group norm 2.1"
    assert lines[5][-1] == "20"
    assert {len(line) for line in lines} == {8}


def test_settings_are_checked_and_rows_are_ordered() -> None:
    assert AgainstGroupNorm().keys() == ("resnet8 seed 0", "resnet8 seed 1", "resnet8 seed 2", "resnet20 seed 0")
    with pytest.raises(SettingsError, match=r"sparse must be a whole number at least 0 and at most 4"):
        AgainstGroupNorm(sparse=5)
    with pytest.raises(SettingsError, match="speedups must be a number greater than 1 and at most 100"):
        AgainstGroupNorm(speedups=(1,))
    with pytest.raises(SettingsError, match="speedups must be one or more numbers"):
        AgainstGroupNorm(speedups=())
    with pytest.raises(SettingsError, match="deep_seeds must be some of seeds"):
        AgainstGroupNorm(seeds=(1,))
    with pytest.raises(SettingsError, match="samples must be a whole number at least 1"):
        AgainstGroupNorm(samples=0)
    with pytest.raises(SettingsError, match="rounds must be a divisor of tune"):
        AgainstGroupNorm(rounds=3)
    with pytest.raises(SettingsError, match="scope must be layer or global"):
        AgainstGroupNorm(scope="all")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="teacher must be true or false"):
        AgainstGroupNorm(teacher=1)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="normalizer must be max or mean"):
        GroupNorm(normalizer="median")  # type: ignore[arg-type]


def test_shortcuts_that_change_width_are_projected() -> None:
    network = projected(resnet8(channels=1))
    kinds = [type(block.shortcut).__name__ for stage in (network.stage1, network.stage2, network.stage3) for block in stage]  # type: ignore[union-attr]
    assert kinds == ["Identity", "Sequential", "Sequential"]
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    before = sum(parameter.numel() for parameter in resnet8(channels=1).parameters())
    added = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(parameter.numel() for parameter in network.parameters()) == before + added


class Heavier:
    """Adds one to every gradient."""

    def regularize(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += 1


def test_the_penalty_is_added_before_the_steps_of_this_model_only() -> None:
    model, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for layer in (model, other):
        nn.init.ones_(layer.weight)
        layer.weight.grad = torch.zeros(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with before_steps(model, Heavier()):
        optimizer.step()
        torch.optim.SGD(other.parameters(), lr=0.25).step()
    assert (model.weight.item(), other.weight.item()) == (0.75, 1.0)
    model.weight.grad.zero_()  # type: ignore[union-attr]
    optimizer.step()
    assert model.weight.item() == 0.75


def test_pared_cuts_to_the_share() -> None:
    small = AgainstGroupNorm(tune=0, sparse=0, teacher=False).ours(0.5)(convnet(), task_of(1, 6, 6))
    whole = count(convnet(), task_of(1, 6, 6).example_inputs())
    assert count(small, task_of(1, 6, 6).example_inputs()).macs <= 0.5 * whole.macs


def test_deployed_files_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "latency", lambda files, inputs: {name: Latency(0.5, 0.5, 1, 1, "none") for name in files})
    task = task_of(1, 6, 6)
    found = measured({"dense": Arm(convnet(), 0.0), "dense, trained on": Arm(convnet(), 1.26)}, task, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense-trained-on.onnx", "dense.onnx"]
    assert found["dense"]["test"] == found["dense, trained on"]["test"]
    assert found["dense"]["macs"] == 36 * 8 * 9 + 36 * 64 * 9 + 24
    assert found["dense, trained on"]["seconds"] == 1.3
    assert found["dense"]["ms"] == 0.5


def test_without_torch_pruning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModelError, match="pip install torch-pruning"):
        GroupNorm().cut(convnet(), task_of(1, 6, 6), 0.5)


def test_the_peer_cuts_the_weakest_channels_and_leaves_the_outputs() -> None:
    pytest.importorskip("torch_pruning")
    model: Any = convnet()
    task = task_of(1, 6, 6)
    with torch.no_grad():  # norms fall from channel to channel
        for layer in (model[0], model[3]):
            layer.weight.copy_(torch.linspace(1, 0.125, 8)[:, None, None, None].expand_as(layer.weight))
    small: Any = GroupNorm().cut(model, task, 0.5)
    whole = count(model, task.example_inputs()).macs
    assert count(small, task.example_inputs()).macs <= 0.5 * whole
    assert small[7].out_features == 3
    kept = small[3].out_channels
    assert kept < 8
    assert torch.equal(small[3].weight, model[3].weight[:kept, : small[0].out_channels])
    assert model[3].out_channels == 8


def test_sparse_learning_shrinks_a_copy() -> None:
    pytest.importorskip("torch_pruning")
    model: Any = convnet()
    task = task_of(1, 6, 6)
    before = model[0].weight.clone()
    train = sgd(2, 0.01, weight_decay=0.0)
    without: Any = GroupNorm(train, 0.0).learn(model, task)
    learnt: Any = GroupNorm(train, 0.5).learn(model, task)
    unchanged: Any = GroupNorm(train=None).learn(model, task)
    assert learnt[0].weight.norm() < without[0].weight.norm()
    assert torch.equal(model[0].weight, before)
    again: Any = GroupNorm(train, 0.5).learn(model, task)
    assert torch.equal(again[0].weight, learnt[0].weight)
    assert torch.equal(unchanged[0].weight, before)


def test_padded_shortcuts_are_an_obstacle() -> None:
    pytest.importorskip("torch_pruning")
    task = task_of(1, 8, 8)
    assert obstacle(resnet8(channels=1, classes=3), task, 0.5) == "RuntimeError"
    assert obstacle(convnet(), task_of(1, 6, 6), 0.5) == ""


def test_rows_that_are_done_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, str]] = []

    def measure(self: AgainstGroupNorm, net: str, seed: int, folder: Path) -> dict[str, Any]:
        assert folder.is_dir()
        asked.append((net, seed, folder.name))
        return {"arms": {}}

    monkeypatch.setattr(AgainstGroupNorm, "measure", measure)
    rows = list(AgainstGroupNorm().run(lambda event: None, tmp_path, frozenset({"resnet8 seed 0", "resnet8 seed 2"})))
    assert asked == [("resnet8", 1, "resnet8-seed-1"), ("resnet20", 0, "resnet20-seed-0")]
    assert rows[1] == {"key": "resnet20 seed 0", "net": "resnet20", "seed": 0, "arms": {}}


def test_narrow_strided_shortcuts_keep_the_ordinary_format() -> None:
    def network(inputs: int) -> nn.Sequential:
        return fast(nn.Sequential(nn.Conv2d(3, inputs, 3), nn.Conv2d(inputs, 4, 1, stride=2)))  # type: ignore[return-value]

    assert network(6)[0].weight.is_contiguous()  # type: ignore[operator, union-attr]
    assert not network(8)[0].weight.is_contiguous()  # type: ignore[operator, union-attr]
