"""Group lasso: exact zeros under any optimiser, what is cut, resuming, and a whole run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.core.errors import SettingsError, TrainingError
from pared.core.rules import bake
from pared.core.seeds import seed_everything
from pared.prune.group_lasso import GroupLasso
from pared.runtime import Engine, export
from pared.training import Journal, Task, Train, evaluate


def vectors(samples: int = 32, inputs: int = 6) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, inputs, generator=generator)
    batches = [(part, (part[:, 0] > 0).long()) for part in x.split(8)]
    return Task(batches, batches, batches)


def images(samples: int = 32) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 2, 6, 6, generator=generator)
    batches = [(part, (part[:, 0].mean((1, 2)) > 0).long()) for part in x.split(8)]
    return Task(batches, batches, batches)


def mlp(hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(x + self.outer(self.inner(x))).mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual()


def shrunk(method: GroupLasso, model: nn.Module, task: Task) -> tuple[nn.Module, nn.Module]:
    """The trained network before the cut, and after it."""
    seed_everything(1)
    masked = copy.deepcopy(model)
    method.shrink(masked, task)
    seed_everything(1)
    return masked.eval(), method(model, task).eval()


# --- exact zeros ---


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_zeros_are_exact_in_a_loop_of_the_users_own(name: str) -> None:
    def loop(model: nn.Module, task: Task, train: Train, objective: object = None) -> None:
        optimizer = OPTIMISERS[name](model.parameters())
        for _ in range(train.epochs):
            for inputs, targets in task.train:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()

    task = Task(*[vectors().train] * 3, fit=loop)
    strength = {"sgd": 0.15, "momentum and decay": 0.1, "adam": 2.0, "adamw": 2.0, "rmsprop": 2.0}[name]
    masked, cut = shrunk(GroupLasso(strength=strength, train="25ep"), mlp(16), task)
    dead = (masked[0].weight == 0).all(1) & (masked[0].bias == 0)
    assert 0 < int(dead.sum()) < 16
    assert cut[0].out_features == 16 - int(dead.sum())
    x = torch.randn(50, 6)
    assert torch.allclose(masked(x), cut(x), atol=1e-5)


def test_shrinking_and_cutting_can_be_done_one_after_the_other() -> None:
    method, model, task = GroupLasso(strength=0.2, train=Train(epochs=10, optimizer="sgd", learning_rate=0.05)), mlp(16), vectors()
    masked, expected = shrunk(method, model, task)
    before = copy.deepcopy(masked.state_dict())
    found = method.cut(masked, task)
    assert found[0].out_features < 16
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in masked.state_dict().items())


@pytest.mark.parametrize("by_size", [False, True])
def test_a_step_takes_off_as_much_as_it_says(by_size: bool) -> None:
    def one_step(model: nn.Module, task: Task, train: Train, objective: object = None) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    model = mlp(16)
    before = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().numpy()
    lengths = np.linalg.norm(before, axis=1, keepdims=True)
    amount = 0.5 * 0.4 * (np.sqrt(7) if by_size else 1)  # 6 weights and a bias
    expected = before * np.maximum(0, 1 - amount / lengths)
    GroupLasso(strength=0.4, by_size=by_size, train="1ep").shrink(model, Task(*[vectors().train] * 3, fit=one_step))
    after = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().numpy()
    np.testing.assert_allclose(after, expected, atol=1e-6)
    assert 0 < (after == 0).all(1).sum() < 16 or not by_size


def test_a_loop_without_torchs_optimisers_is_refused() -> None:
    task = Task(*[vectors().train] * 3, fit=lambda model, task, train, objective=None: None)
    with pytest.raises(TrainingError, match=r"took no step with a torch\.optim\.Optimizer"):
        GroupLasso(train="1ep")(mlp(), task)


# --- what is cut ---


def test_strength_zero_is_ordinary_training() -> None:
    plan, task = Train(epochs=2), vectors()
    seed_everything(1)
    small = GroupLasso(strength=0, train=plan)(mlp(), task)
    seed_everything(1)
    plain = plan(mlp(), task)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("groups", [("filters",), ("channels",), ("filters", "channels")])
def test_everything_dead_keeps_one(groups: tuple[Any, ...]) -> None:
    small = GroupLasso(strength=1000, groups=groups, train="1ep")(mlp(), vectors())
    assert small[0].out_features == small[2].in_features == 1


@pytest.mark.parametrize(("groups", "strength"), [(("filters",), 0.12), (("channels",), 0.17), (("filters", "channels"), 0.11)])
def test_masked_is_cut_is_deployed(groups: tuple[Any, ...], strength: float, tmp_path: Any) -> None:
    task = images()
    method = GroupLasso(strength=strength, groups=groups, train=Train(epochs=25, optimizer="sgd", learning_rate=0.05))
    masked, cut = shrunk(method, residual(), task)
    assert cut.inner[0].weight.shape[0] < 5 or cut.stem.weight.shape[0] < 6
    x = torch.randn(9, 2, 6, 6)
    with torch.no_grad():
        assert torch.allclose(masked(x), cut(x), atol=1e-5)
        deployed = Engine(export(bake(cut), task.example_inputs(), tmp_path / "small.onnx")).run(x.numpy())[0]
        np.testing.assert_allclose(deployed, cut(x).numpy(), atol=1e-4)


def test_groups_reach_over_tied_layers_and_take_in_norms() -> None:
    model = residual()
    groups = GroupLasso().find(model, images())
    assert sorted(group.count for group in groups) == [5, 6]
    stream = next(group for group in groups if group.count == 6)
    expected = sum(
        parameter.detach().reshape(6, -1).square().sum(1)
        for name, parameter in model.named_parameters()
        if name.startswith(("stem", "norm", "outer"))
    )
    assert torch.allclose(stream.norms().square(), torch.as_tensor(expected), rtol=1e-5)
    assert stream.sizes().tolist() == [2 * 9 + 1 + 2 + 5 * 9 + 2] * 6
    both = next(group for group in GroupLasso(groups=("channels", "filters")).find(model, images()) if group.count == 6)
    read = model.head.weight.square().sum(0) + model.inner[0].weight.square().sum((0, 2, 3))
    assert torch.allclose(both.norms().square(), torch.as_tensor(expected + read), rtol=1e-5)


def test_a_dead_neuron_behind_batch_norm_emits_nothing() -> None:
    masked, cut = shrunk(GroupLasso(strength=50, train=Train(epochs=2, optimizer="sgd", learning_rate=0.05)), residual(), images())
    assert not masked.inner[1].bias.any()
    assert not masked.inner[1].weight.any()
    x = torch.randn(4, 2, 6, 6)
    assert torch.allclose(masked(x), cut(x), atol=1e-5)
    assert cut.inner[0].weight.shape[:2] == (1, 1)


def test_a_neuron_that_is_zero_but_speaks_through_a_sigmoid_stays() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3))
    masked, cut = shrunk(GroupLasso(strength=1000, train="1ep"), model, vectors())
    assert not masked[0].weight.any()
    assert cut[0].out_features == 4
    unread = GroupLasso(strength=1000, groups=("channels",), train="1ep")(model, vectors())
    assert unread[0].out_features == 1


def test_what_is_left_keeps_its_neurons() -> None:
    small = GroupLasso(strength=1000, train="1ep", leave=("0",))(mlp(), vectors())
    assert small[0].out_features == 8
    assert small[0].weight.any()


def test_frozen_weights_are_not_shrunk() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    small = GroupLasso(strength=1000, train="1ep")(model, vectors())
    assert torch.equal(small[0].weight, model[0].weight)
    assert small[0].bias.any()


def test_weight_norm_is_left_alone() -> None:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    small = GroupLasso(strength=1000, train="1ep")(model, vectors()).eval()
    assert bool(torch.isfinite(small(torch.randn(3, 6))).all())


def test_heads_of_grouped_convolutions_die_as_a_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)
    )
    masked, cut = shrunk(GroupLasso(strength=0.18, train=Train(epochs=20, optimizer="sgd", learning_rate=0.02)), model, images())
    x = torch.randn(4, 2, 6, 6)
    assert torch.allclose(masked(x), cut(x), atol=1e-5)
    assert {group.count for group in GroupLasso().find(model, images())} == {4}
    alive = masked[0].weight.reshape(4, -1).any(1)
    assert 0 < int(alive.sum()) < 4
    assert cut[2].groups == int(alive.sum())


def test_shapes_are_masked_and_whole_input_channels_are_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )
    method = GroupLasso(strength=0.03, groups=("shapes",), train=Train(epochs=20, optimizer="sgd", learning_rate=0.03))
    masked, cut = shrunk(method, model, images())
    columns = (masked[2].weight != 0).any(0)
    assert 0 < int(columns.sum()) < columns.numel()
    kept = columns.flatten(1).any(1)
    assert cut[0].out_channels == int(kept.sum())
    x = torch.randn(5, 2, 6, 6)
    assert torch.allclose(masked(x), cut(x), atol=1e-5)
    Train(epochs=1, learning_rate=0.1)(cut, images())
    tuned = bake(GroupLasso(strength=method.strength, groups=method.groups, train=method.train, tune="2ep")(model, images()))
    assert torch.equal((tuned[2].weight != 0).any(0), (cut[2].weight != 0).any(0))


def test_a_dead_branch_is_zero_as_a_whole_and_its_block_goes() -> None:
    method = GroupLasso(strength=100, groups=("depth",), train=Train(epochs=2, optimizer="sgd", learning_rate=0.05))
    masked, cut = shrunk(method, residual(), images())
    assert not any(parameter.any() for part in (masked.inner, masked.outer) for parameter in part.parameters())
    assert all(part.weight.any() for part in (masked.stem, masked.head))
    assert sorted(cut.state_dict()) == sorted(name for name in masked.state_dict() if not name.startswith(("inner", "outer")))
    x = torch.randn(5, 2, 6, 6)
    assert torch.allclose(masked(x), cut(x), atol=1e-5)


@pytest.mark.parametrize("groups", [("depth",), ("filters",)])
def test_networks_without_such_groups_just_train(groups: tuple[Any, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    assert GroupLasso(groups=groups).find(model, vectors()) == []
    assert GroupLasso(groups=groups, train="1ep")(model, vectors())[0].weight.shape == (3, 6)


# --- settings, resuming, the whole ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": -1}, "strength must be a number at least 0"),
        ({"groups": ()}, "groups must be one or more of filters, channels, shapes, depth"),
        ({"groups": ("rows",)}, "groups must be one or more of"),
        ({"groups": "filters"}, "groups must be one or more of"),
        ({"train": Train(early_stop=2)}, "train must be a plan without early_stop"),
        ({"leave": "fc"}, "leave must be a list of module paths"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        GroupLasso(**wrong)


class Killed(Exception):
    """Raised in the middle of a training."""


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_killed_step_ends_as_an_undisturbed_one(optimizer: Any, tmp_path: Any) -> None:
    method = GroupLasso(strength=0.3, train=Train(epochs=4, optimizer=optimizer, learning_rate=0.05), tune="2ep")

    def run(directory: str, die_at: int | None = None) -> nn.Module:
        def report(event: dict[str, Any]) -> None:
            if event["event"] == "batch" and event["epoch"] == die_at:
                raise Killed

        seed_everything(3)
        return method(mlp(), Task(*[vectors().train] * 3, journal=Journal(tmp_path / directory), report=report))

    undisturbed = run("a")
    with pytest.raises(Killed):
        run("b", die_at=3)
    resumed = run("b")
    again = run("b")
    for other in (resumed, again):
        assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), other.parameters(), strict=True))


def test_digits_lose_neurons_and_little_accuracy(tmp_path: Any) -> None:
    from pared.data import load

    task = load("digits", batch_size=64)
    seed_everything(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
    )
    base = Train(epochs=6, learning_rate=5e-3)(model, task)
    plan = Train(epochs=10, optimizer="sgd", learning_rate=0.05)
    small = GroupLasso(strength=0.05, train=plan, tune=Train(epochs=3, learning_rate=1e-3))(base, task)
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (base, small)]
    files = [
        export(network.eval(), task.example_inputs(), tmp_path / name) for network, name in ((base, "base.onnx"), (small, "small.onnx"))
    ]
    assert counts[1] < 0.7 * counts[0]
    assert files[1].stat().st_size < 0.8 * files[0].stat().st_size
    assert evaluate(small, task, "valid") > evaluate(base, task, "valid") - 0.03
