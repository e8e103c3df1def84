"""Weight pruning removes exactly as many weights as asked for, the smallest, and they stay away."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from pared.core.errors import SettingsError, WeightsError
from pared.core.layers import compressible
from pared.core.rules import Mask, add_rule, bake, find_rule
from pared.prune import weights
from pared.prune.importance import Activity, Fisher, MemoryAwareSynapses, Random, Taylor
from pared.prune.weights import Weights, choose, keep_by_round, select
from pared.training import Task, Train


def toy_task(shape: tuple[int, ...] = (8,), classes: int = 3, **settings) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, *shape, generator=generator), torch.randint(0, classes, (6,), generator=generator)) for _ in range(3)]
    return Task(batches, batches, batches, **settings)


def toy_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def numpy_select(scores: np.ndarray, count: int) -> np.ndarray:
    order = sorted(range(scores.size), key=lambda index: (-scores.flat[index], index))
    mask = np.zeros(scores.size, dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


# --- select ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=24), st.integers(0, 100))
def test_select_keeps_the_exact_count_with_ties_by_position(values, percent):
    scores = torch.tensor(values, dtype=torch.float32)
    count = (percent * len(values) * 2 + 100) // 200  # round half up in whole numbers
    mask = select(scores, percent / 100)
    assert mask.sum() == count
    assert np.array_equal(mask.numpy(), numpy_select(scores.numpy(), count))


@pytest.mark.parametrize(
    ("keep", "total", "count"), [(0.29, 50, 15), (0.5, 3, 2), (0.1, 5, 1), (0.1, 4, 0), (0, 7, 0), (1, 7, 7), (0.35, 10, 4)]
)
def test_select_rounds_a_half_up(keep, total, count):
    assert int(select(torch.arange(float(total)), keep).sum()) == count


def test_select_keeps_shape_and_handles_nothing():
    assert select(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert select(torch.ones(0), 0.5).shape == (0,)
    assert select(torch.tensor(2.0), 1).tolist() is True


def test_select_ranks_infinities():
    assert select(torch.tensor([1.0, float("inf"), float("-inf")]), 1 / 3).tolist() == [False, True, False]


def test_select_refuses_nan_and_wrong_shares():
    with pytest.raises(WeightsError, match="NaN"):
        select(torch.tensor([1.0, float("nan")]), 0.5)
    for keep in (-0.1, 1.5, float("nan"), True, "half"):
        with pytest.raises(SettingsError, match="keep must be a number at least 0 and at most 1"):
            select(torch.ones(2), keep)


# --- schedule and choice ---


def test_cubic_schedule_removes_most_at_first_and_ends_at_keep():
    shares = keep_by_round(0.1, 4, "cubic")
    assert shares == pytest.approx([0.1 + 0.9 * (3 / 4) ** 3, 0.1 + 0.9 * (2 / 4) ** 3, 0.1 + 0.9 * (1 / 4) ** 3, 0.1])
    removed = [before - after for before, after in itertools.pairwise([1.0, *shares])]
    assert removed == sorted(removed, reverse=True)
    assert keep_by_round(0.3, 1, "cubic") == keep_by_round(0.3, 1, "one-shot") == [0.3]
    assert keep_by_round(0.3, 3, "one-shot") == [0.3] * 3


def test_choice_among_layers():
    scores = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])}
    alive = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    together = choose(scores, alive, 0.5, "global")
    assert together["a"].tolist() == [[False, False], [False, True]]
    assert together["b"].tolist() == [True, True]
    apart = choose(scores, alive, 0.5, "layer")
    assert apart["a"].tolist() == [[False, False], [True, True]]
    assert apart["b"].tolist() == [False, True]


def test_removed_weights_are_never_chosen():
    scores = {"a": torch.tensor([9.0, 1.0, 2.0, 3.0])}
    alive = {"a": torch.tensor([False, True, True, False])}
    assert choose(scores, alive, 1.0, "global")["a"].tolist() == [False, True, True, False]
    assert choose(scores, alive, 0.25, "layer")["a"].tolist() == [False, False, True, False]


# --- the method ---


@pytest.mark.parametrize("keep", [0, 0.1, 0.25, 0.5, 1])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exact_count_and_smallest_go(keep, scope):
    model = toy_mlp()
    before = copy.deepcopy(model.state_dict())
    small = bake(Weights(keep=keep, scope=scope)(model, toy_task()))
    kept = {name: (small.state_dict()[name] != 0).numpy() for name in ("0.weight", "2.weight")}
    sizes = {name: before[name].abs().numpy() for name in kept}
    if scope == "global":
        together = np.concatenate([size.ravel() for size in sizes.values()])
        expected = numpy_select(together, int(np.floor(keep * 66 + 0.5)))
        assert np.array_equal(np.concatenate([mask.ravel() for mask in kept.values()]), expected)
    else:
        for name, mask in kept.items():
            assert np.array_equal(mask, numpy_select(sizes[name], int(np.floor(keep * mask.size + 0.5))))
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        if "bias" in name:
            assert torch.equal(small.state_dict()[name], value)
    assert set(small.state_dict()) == set(before)


def test_norms_biases_and_embeddings_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU())
    small = bake(Weights(keep=0)(model, toy_task()))
    assert [name for name, value in small.named_parameters() if bool((value == 0).all())] == ["1.bias", "2.weight"]


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 4, 3, groups=2), nn.Conv2d(2, 3, 3), nn.Conv3d(1, 2, 2), nn.ConvTranspose2d(2, 3, 2), nn.Linear(4, 3)]
)
def test_all_kinds_of_layers(layer):
    small = bake(Weights(keep=0.5)(nn.Sequential(copy.deepcopy(layer)), toy_task()))
    assert int(small[0].weight.count_nonzero()) == (layer.weight.numel() + 1) // 2


def test_masks_are_nested_over_rounds_and_hold_through_training():
    class Watching(list):
        pass

    seen = Watching()

    def fit(model, task, train, objective=None):
        seen.append([find_rule(model[index], "weight", Mask).keep.clone() for index in (0, 2)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
        for inputs, targets in task.train:
            optimizer.zero_grad()
            task.loss(model(*task.prepare(inputs)), targets).backward()
            optimizer.step()

    small = Weights(keep=0.2, rounds=3, tune="1ep")(toy_mlp(), toy_task(fit=fit))
    counts = [sum(int(mask.sum()) for mask in masks) for masks in seen]
    assert counts == [round(66 * (0.2 + 0.8 * (2 / 3) ** 3)), round(66 * (0.2 + 0.8 * (1 / 3) ** 3)), 13]
    for earlier, later in itertools.pairwise(seen):
        assert all(bool((was | ~now).all()) for was, now in zip(earlier, later, strict=True))
    baked = bake(small)
    assert all(torch.equal(baked[index].weight != 0, mask) for index, mask in zip((0, 2), seen[-1], strict=True))


def test_one_shot_removes_everything_in_the_first_round():
    counts = []

    def fit(model, task, train, objective=None):
        counts.append(int(sum(find_rule(model[index], "weight", Mask).keep.sum() for index in (0, 2))))

    Weights(keep=0.5, rounds=3, schedule="one-shot", tune=Train(epochs=1))(toy_mlp(), toy_task(fit=fit))
    assert counts == [33, 33, 33]


def test_each_layer_has_its_own_share_in_every_round():
    counts = []

    def fit(model, task, train, objective=None):
        counts.append([int(find_rule(model[index], "weight", Mask).keep.sum()) for index in (0, 2)])

    Weights(keep={"0": 0.25, "2": 0.5}, rounds=2, tune="1ep")(toy_mlp(), toy_task(fit=fit))
    assert counts == [[17, 10], [12, 9]]  # 16.5 of 48 are rounded up
    small = bake(Weights(keep={"2": 0.5}, repair="obs", samples=8)(toy_mlp(), toy_task()))
    assert [int(small[index].weight.count_nonzero()) for index in (0, 2)] == [48, 9]
    with pytest.raises(SettingsError, match=r"keep must be of layers that are pruned \(0, 2\)\. Got '1'"):
        Weights(keep={"1": 0.5})(toy_mlp(), toy_task())
    with pytest.raises(SettingsError, match=r"keep\['0'\] must be a number at least 0 and at most 1\. Got 2"):
        Weights(keep={"0": 2})


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_zeros_stay_zero_in_the_real_training_loop(optimizer):
    plan = Train(epochs=2, optimizer=optimizer, learning_rate=0.05, weight_decay=0.01)
    model = toy_mlp()
    small = bake(Weights(keep=0.3, rounds=2, tune=plan)(model, toy_task()))
    assert sum(int(small[index].weight.count_nonzero()) for index in (0, 2)) == 20
    assert not torch.equal(small[2].bias, model[2].bias)


def test_masks_of_an_earlier_step_count_as_removed():
    first = Weights(keep=0.5, scope="layer")(toy_mlp(), toy_task())
    second = Weights(keep=0.25, scope="layer")(first, toy_task())
    was, now = bake(copy.deepcopy(first)), bake(second)
    for index, size in ((0, 48), (2, 18)):
        assert int(now[index].weight.count_nonzero()) == (size + 2) // 4
        assert bool(((was[index].weight != 0) | (now[index].weight == 0)).all())
    again = bake(Weights(keep=0.9)(first, toy_task()))
    assert torch.equal(again[0].weight, was[0].weight)


def test_a_layer_called_twice_and_tied_weights_count_once():
    layer = nn.Linear(4, 4)
    tied, embedding = nn.Linear(4, 6, bias=False), nn.Embedding(6, 4)
    tied.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "a": layer, "b": layer, "tied": tied})
    small = Weights(keep=0.5)(model, toy_task())
    assert len(compressible(model, (), "prune.weights")) == 2
    assert torch.equal(small["embedding"].weight, small["tied"].weight)
    assert int(small["a"].weight.count_nonzero() + small["tied"].weight.count_nonzero()) == 20
    baked = bake(small)
    assert baked["embedding"].weight is baked["tied"].weight
    assert baked["a"] is baked["b"]


def test_leave():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)), nn.Linear(6, 3))
    small = bake(Weights(keep=0, leave=("0",))(model, toy_task()))
    assert torch.equal(small[0][1].weight, model[0][1].weight)
    assert not small[1].weight.any()
    with pytest.raises(SettingsError, match=r"leave must be the path of a module of the model. Got 'head'"):
        Weights(leave=("head",))(model, toy_task())


def test_leaving_one_of_two_tied_layers_leaves_the_weight():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(3, 2))
    assert list(compressible(model, ("1",), "prune.weights")) == ["2"]


def test_weights_computed_from_others_are_refused():
    for layer in (parametrizations.weight_norm(nn.Linear(8, 3)), parametrizations.spectral_norm(nn.Linear(8, 3))):
        with pytest.raises(SettingsError, match=r"0\.weight is computed from other parameters"):
            Weights()(nn.Sequential(layer), toy_task())
        model = nn.Sequential(layer, nn.Linear(3, 3))
        assert list(compressible(model, ("0",), "prune.weights")) == ["1"]


def test_models_without_layers_and_nan_are_refused():
    with pytest.raises(SettingsError, match="Sequential has no convolution or linear layer"):
        Weights()(nn.Sequential(nn.ReLU()), toy_task())
    model = toy_mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"2\.weight contains NaN"):
        Weights()(model, toy_task())


def test_all_wrong_settings_are_named_together():
    with pytest.raises(SettingsError) as error:
        Weights(keep=1.5, scope="everywhere", rounds=0, schedule="linear", leave="0")  # type: ignore[arg-type]
    assert [problem.split(" must be ")[0] for problem in error.value.problems] == [
        f"prune.weights: {field}" for field in ("keep", "scope", "rounds", "schedule", "leave")
    ]
    with pytest.raises(SettingsError, match=r"importance must be an importance that scores weights, such as Magnitude"):
        Weights(importance=Activity())  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="epochs"):
        Weights(tune="soon")  # type: ignore[arg-type]


def test_random_importance_is_seeded_and_nested():
    pruned = [
        bake(Weights(keep=keep, importance=Random(seed))(toy_mlp(), toy_task())) for keep, seed in ((0.5, 1), (0.5, 1), (0.5, 2), (0.2, 1))
    ]
    masks = [torch.cat([net[index].weight.flatten() != 0 for index in (0, 2)]) for net in pruned]
    assert [int(mask.sum()) for mask in masks] == [33, 33, 33, 13]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert bool((masks[0] | ~masks[3]).all())
    again = bake(Weights(keep=0.2, rounds=3, importance=Random(1))(toy_mlp(), toy_task()))
    assert torch.equal(torch.cat([again[index].weight.flatten() != 0 for index in (0, 2)]), masks[3])


def test_frozen_weights_are_pruned_and_stay_frozen():
    model = toy_mlp()
    model[0].weight.requires_grad_(False)
    small = bake(Weights(keep=0.5, tune="1ep")(model, toy_task()))
    assert not small[0].weight.requires_grad
    assert sum(int(small[index].weight.count_nonzero()) for index in (0, 2)) == 33


def test_an_existing_mask_of_the_user_holds():
    model = toy_mlp()
    keep = torch.zeros(6, 8, dtype=torch.bool)
    keep[0] = True
    add_rule(model[0], "weight", Mask(keep))
    small = bake(Weights(keep=1.0)(model, toy_task()))
    assert torch.equal(small[0].weight != 0, keep)


# --- importances that score weights ---


@dataclass(frozen=True)
class Index:
    """The last weight matters most; scores by the names that the parameters have."""

    names: tuple[str, ...] = ()

    def weights(self, model, task):
        assert isinstance(task, Task)
        found = {name: parameter for name, parameter in model.named_parameters() if not self.names or name in self.names}
        return {name: torch.arange(float(value.numel())).view(value.shape) for name, value in found.items()}


@pytest.mark.parametrize("rounds", [1, 3])
def test_any_importance_that_scores_weights_will_do(rounds):
    small = bake(Weights(keep=0.5, scope="layer", rounds=rounds, importance=Index())(toy_mlp(), toy_task()))
    assert (small[0].weight.flatten() != 0).tolist() == [False] * 24 + [True] * 24
    assert (small[2].weight.flatten() != 0).tolist() == [False] * 9 + [True] * 9
    together = bake(Weights(keep=0.25, importance=Index())(toy_mlp(), toy_task()))
    assert [int(together[index].weight.count_nonzero()) for index in (0, 2)] == [17, 0]


def test_a_tied_weight_may_be_scored_by_either_name():
    embedding, tied = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    tied.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "tied": tied})
    small = bake(Weights(keep=0.5, importance=Index())(model, toy_task()))  # named_parameters says embedding.weight
    assert (small["tied"].weight.flatten() != 0).tolist() == [False] * 12 + [True] * 12


def test_importances_that_leave_out_or_misshape_a_weight_are_refused():
    @dataclass(frozen=True)
    class Wrong:
        tensor: torch.Tensor

        def weights(self, model, task):
            return {"0.weight": self.tensor, "2.weight": torch.ones(3, 6)}

    with pytest.raises(SettingsError, match=r"importance must be one that scores 0.weight of shape \(6, 8\). Got 'nothing'"):
        Weights(importance=Index(names=("2.weight",)))(toy_mlp(), toy_task())
    with pytest.raises(SettingsError, match=r"Got 'a tensor of shape \(8, 6\)'"):
        Weights(importance=Wrong(torch.ones(8, 6)))(toy_mlp(), toy_task())
    with pytest.raises(WeightsError, match=r"0\.weight contains NaN"):
        Weights(importance=Wrong(torch.full((6, 8), float("nan"))))(toy_mlp(), toy_task())
    for wrong in (Index, None, "magnitude"):
        with pytest.raises(SettingsError, match="importance must be an importance that scores weights"):
            Weights(importance=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", [Fisher(samples=12), MemoryAwareSynapses(samples=12), Taylor(samples=12)])
@pytest.mark.parametrize("repair", ["none", "obs"])
def test_importances_with_data(importance, repair):
    small = bake(Weights(keep=0.3, rounds=2, importance=importance, repair=repair)(toy_mlp(), toy_task()))
    assert sum(int(small[index].weight.count_nonzero()) for index in (0, 2)) == 20


def test_an_importance_may_move_the_model_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chosen(Exception):
        pass

    class Moving:
        def weights(self, model: nn.Module, task: Task) -> dict[str, torch.Tensor]:
            return {name: value.detach() for name, value in model.to("meta").named_parameters()}  # stands in for a GPU

    def choose_weights(layers, scores, alive, *_):
        assert {value.device.type for value in (*scores.values(), *alive.values())} == {"meta"}
        raise Chosen

    monkeypatch.setattr(weights, "choose_weights", choose_weights)
    with pytest.raises(Chosen):
        Weights(importance=Moving())(toy_mlp(), toy_task())  # type: ignore[arg-type]
