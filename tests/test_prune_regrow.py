"""RigL: counts stay, the smallest go, the largest gradients grow, and nothing revives a masked weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import optimizer as torch_optimizer

from pared.core.errors import SettingsError
from pared.core.rules import Mask, add_rule, bake, find_rule
from pared.prune.importance import Random
from pared.prune.regrow import Regrow, layer_counts, regrown
from pared.prune.selection import share_of
from pared.training import Journal, Task, Train


def toy_task(batches: int = 10, **settings: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(6, 8, generator=generator), torch.randint(0, 3, (6,), generator=generator)) for _ in range(batches)]
    return Task(data, data, data, **settings)


def toy_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def masks_of(model: nn.Module) -> list[Mask]:
    found = [rule for rule in model.modules() if isinstance(rule, Mask)]
    assert all(type(rule) is Mask for rule in found)
    return found


# --- counts ---


def test_erdos_renyi_by_hand():
    # sums of the axes 12 and 6 over sizes 32 and 8; half of 40 is 20: 20 · 12/18 = 13.3 and 6.7
    assert layer_counts([(4, 8), (4, 2)], 0.5, "erdos-renyi") == [13, 7]
    # three quarters: 30 · 6/18 = 10 is more than the 8 that there are, so the large one gets 22
    assert layer_counts([(4, 8), (4, 2)], 0.75, "erdos-renyi") == [22, 8]
    assert layer_counts([(4, 8), (4, 2)], 0.5, "uniform") == [16, 4]
    assert layer_counts([(3,), (3,)], 0.5, "uniform") == [2, 1]  # what rounding leaves goes to the first of equals


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 7), min_size=2, max_size=4), min_size=1, max_size=5),
    st.integers(0, 100),
    st.sampled_from(["erdos-renyi", "uniform"]),
)
def test_counts_are_exact_and_fit(shapes, percent, densities):
    counts = layer_counts(shapes, percent / 100, densities)
    sizes = [int(np.prod(shape)) for shape in shapes]
    assert sum(counts) == share_of(percent / 100, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if densities == "erdos-renyi":
        free = [at for at, count in enumerate(counts) if count < sizes[at]]
        factors = [counts[at] / sum(shapes[at]) for at in free]
        tolerance = max((1 / sum(shapes[at]) for at in free), default=0)
        assert not factors or max(factors) - min(factors) <= 2 * tolerance


# --- one exchange ---


def numpy_regrown(weight, gradient, keep, living, count):
    places = list(range(weight.size))
    connected = [at for at in places if keep.flat[at]]
    stays = sorted(connected, key=lambda at: (-abs(weight.flat[at]), at))[: len(connected) - count]
    free = [at for at in places if living.flat[at] and at not in stays]
    grown = sorted(free, key=lambda at: (-abs(gradient.flat[at]), at))[: len(connected) - len(stays)]
    new = np.zeros(weight.size, dtype=bool)
    new[stays + grown] = True
    return new.reshape(weight.shape)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_an_exchange_against_numpy_with_ties(rows, columns, seed):
    rng = np.random.default_rng(seed)
    weight, gradient = (rng.integers(-2, 3, (rows, columns)).astype(np.float32) for _ in range(2))
    living = rng.random((rows, columns)) < 0.8
    keep = living & (rng.random((rows, columns)) < 0.5)
    count = int(rng.integers(0, keep.sum() + 1))
    new = regrown(*(torch.from_numpy(each) for each in (weight, gradient, keep, living)), count)
    assert np.array_equal(new.numpy(), numpy_regrown(weight, gradient, keep, living, count))
    assert new.sum() == keep.sum()
    assert not (new.numpy() & ~living).any()


# --- the method ---


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_counts_stay_and_masked_weights_are_zero_with_all_that_is_remembered(optimizer):
    states: list[dict[str, Any]] = []

    def fit(model, task, train, objective=None):
        assert objective is not None
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        options = {"momentum": 0.9} if optimizer == "sgd" else {}
        loop = kinds[optimizer](model.parameters(), lr=0.05, weight_decay=0.01, **options)
        rules = masks_of(model)
        parameters = [model[index].parametrizations.weight.original for index in (0, 2)]
        for inputs, targets in task.train:
            before = [rule.keep.clone() for rule in rules]
            loop.zero_grad()
            loss = objective(model, task.prepare(inputs), targets)
            grown = [rule.keep & ~was for rule, was in zip(rules, before, strict=True)]
            assert all(not parameter[new].any() for parameter, new in zip(parameters, grown, strict=True))
            loss.backward()
            loop.step()
            for rule, parameter in zip(rules, parameters, strict=True):
                assert not parameter[~rule.keep].any()
                for value in loop.state[parameter].values():
                    assert value.shape != parameter.shape or not value[~rule.keep].any()
            states.append({"kept": [int(rule.keep.sum()) for rule in rules], "grown": [int(new.sum()) for new in grown]})

    small = Regrow(keep=0.3, train=Train(epochs=1), every=2, fraction=0.5, end=0.9)(toy_mlp(), toy_task(20, fit=fit))
    assert {tuple(state["kept"]) for state in states} == {tuple(layer_counts([(6, 8), (3, 6)], 0.3, "erdos-renyi"))}
    changed = [sum(state["grown"]) > 0 for state in states]
    assert any(changed)
    # 18 of 20 batches: ten exchanges or more ask for one at every batch but the first
    assert not changed[0]
    assert not any(changed[18:])
    assert sum(int(bake(small)[index].weight.count_nonzero()) for index in (0, 2)) == 20


def test_the_largest_gradients_of_the_dense_weight_grow():
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    task = toy_task(2)
    watched: list[Any] = []

    def fit(model, task, train, objective=None):
        rule, weight = masks_of(model)[0], model.weight.detach().clone()
        keep = rule.keep.clone()
        for inputs, targets in task.train:
            objective(model, inputs if isinstance(inputs, tuple) else (inputs,), targets)
        watched.append((keep, weight, rule.keep.clone()))

    Regrow(keep=0.5, train=Train(epochs=1), fraction=0.6, end=1.0)(model, Task(task.train, task.valid, task.test, fit=fit))  # type: ignore[arg-type]
    keep, weight, after = (each.numpy() for each in watched[0])
    inputs, targets = (each.numpy() for each in list(task.train)[1])  # the exchange was at the second batch
    scores = inputs @ weight.T + model.bias.detach().numpy()
    softmax = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    gradient = (softmax - np.eye(3)[targets]).T @ inputs / len(inputs)
    count = int(0.6 * (1 + np.cos(np.pi / 2)) / 2 * 12)
    assert count == 3
    assert np.array_equal(after, numpy_regrown(weight, gradient, keep, np.ones_like(keep), count))


def test_the_loss_of_the_batch_is_still_trained_on():
    losses = {}
    for fraction in (0.0, 0.3):
        seen: list[float] = []
        report = seen.append

        def listen(event, report=report):
            if event["event"] == "epoch":
                report(event["loss"])

        Regrow(keep=0.5, fraction=fraction, every=1, train=Train(epochs=8, learning_rate=0.03))(toy_mlp(), toy_task(report=listen))
        losses[fraction] = seen
    assert losses[0.0][-1] < losses[0.0][0]
    assert losses[0.3][-1] < losses[0.3][0]
    assert losses[0.0] != losses[0.3]


def test_nothing_stays_behind():
    hooks = dict(torch_optimizer._global_optimizer_post_hooks)
    model = toy_mlp()
    small = Regrow(keep=0.4, train="1ep")(model, toy_task())  # type: ignore[arg-type]
    assert dict(torch_optimizer._global_optimizer_post_hooks) == hooks
    assert not list(small.buffers(recurse=False))
    assert sum(int(rule.keep.sum()) for rule in masks_of(small)) == 26
    assert set(bake(small).state_dict()) == set(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        Regrow(train="1ep")(toy_mlp(), toy_task(loss=lambda outputs, targets: outputs.sum() * (1 / 0)))  # type: ignore[arg-type]
    assert dict(torch_optimizer._global_optimizer_post_hooks) == hooks


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("densities", ["uniform", "erdos-renyi"])
def test_nothing_and_everything(keep, densities):
    small = bake(Regrow(keep=keep, densities=densities, train="1ep", every=1)(toy_mlp(), toy_task()))  # type: ignore[arg-type]
    assert sum(int(small[index].weight.count_nonzero()) for index in (0, 2)) == 66 * keep


def test_earlier_masks_hold_frozen_layers_keep_theirs_and_the_start_may_be_chance():
    model = toy_mlp()
    living = torch.zeros(6, 8, dtype=torch.bool)
    living[:3] = True
    add_rule(model[0], "weight", Mask(living))
    small = Regrow(keep=0.3, densities="uniform", every=1, train="1ep")(model, toy_task())  # type: ignore[arg-type]
    assert not small[0].weight[3:].any()
    assert [int(rule.keep.sum()) for rule in masks_of(small)] == [15, 5]
    frozen = toy_mlp()
    frozen[0].weight.requires_grad_(False)
    small = bake(Regrow(keep=0.5, densities="uniform", every=1, train="1ep")(frozen, toy_task()))  # type: ignore[arg-type]
    assert set(small[0].weight.flatten().tolist()) <= {0.0, *frozen[0].weight.flatten().tolist()}
    starts = [
        find_rule(Regrow(importance=Random(seed), train=Train(epochs=0))(toy_mlp(), toy_task())[0], "weight", Mask) for seed in (1, 1, 2)
    ]
    assert torch.equal(starts[0].keep, starts[1].keep)  # type: ignore[union-attr]
    assert not torch.equal(starts[0].keep, starts[2].keep)  # type: ignore[union-attr]


def test_tied_weights_grow_by_the_gradients_of_both_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    small = Regrow(keep=0.25, densities="uniform", every=1, train="1ep")(Twice(), toy_task())  # type: ignore[arg-type]
    assert torch.equal(small.a.weight, small.b.weight)
    assert int(small.a.weight.count_nonzero()) == 16


def test_a_killed_training_goes_on_where_it_was(tmp_path):
    method = Regrow(keep=0.3, every=2, train=Train(epochs=3, learning_rate=0.05))
    whole = method(toy_mlp(), toy_task())

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "batch" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method(toy_mlp(), toy_task(journal=Journal(tmp_path), report=kill))
    resumed = method(toy_mlp(), toy_task(journal=Journal(tmp_path)))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_early_stopping_goes_back_to_weights_and_connections_of_one_epoch():
    plan = Train(epochs=6, learning_rate=0.1, early_stop=1)
    small = Regrow(keep=0.3, every=1, train=plan)(toy_mlp(), toy_task())
    for index, rule in zip((0, 2), masks_of(small), strict=True):
        parameter = small[index].parametrizations.weight.original
        assert not parameter[~rule.keep].any()
    assert sum(int(rule.keep.sum()) for rule in masks_of(small)) == 20


def test_wrong_settings_are_named_together():
    with pytest.raises(SettingsError) as error:
        Regrow(keep=-1, densities="even", fraction=2, every=0, end=3, importance=None, leave="0")  # type: ignore[arg-type]
    assert [problem.split(" must be ")[0] for problem in error.value.problems] == [
        f"prune.regrow: {field}" for field in ("keep", "densities", "fraction", "every", "end", "importance", "leave")
    ]
