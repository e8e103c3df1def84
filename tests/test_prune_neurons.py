"""Importance scores against numpy, and the loop of pruning neurons."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.core.errors import DataError, SettingsError
from pared.graph.analysis import Analysis, analyse
from pared.graph.capture import capture
from pared.graph.classes import kept_count, lowest
from pared.prune import Activity, Magnitude, Neurons, Random
from pared.prune.importance import active_fractions, row_norms
from pared.quantize import Clusters
from pared.training import Task, Train


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3))


def task(**settings: object) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    batches = [(part, (part[:, 0] > 0).long()) for part in x.split(16)]
    return Task(batches, batches, batches, **settings)  # type: ignore[arg-type]


def scores_of(analysis: Analysis, scores: np.ndarray, layer: str) -> np.ndarray:
    producer = next(found for found in analysis.producers if found.parameter == f"{layer}.weight")
    return scores[analysis.root[producer.atoms]]


@pytest.mark.parametrize("order", [1, 2, 3.5])
def test_magnitude_equals_numpy(order: float) -> None:
    model = mlp()
    analysis = analyse(capture(model, torch.zeros(2, 4)))
    scores = scores_of(analysis, Magnitude(order)(analysis), "0")
    weight = model[0].weight.detach().numpy().astype(np.float64)
    norms = (np.abs(weight) ** order).sum(1) ** (1 / order)
    np.testing.assert_allclose(scores, norms / norms.mean(), rtol=1e-6)


def test_magnitude_sums_over_tied_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + 100 * self.b(x))

    model = Tied()
    analysis = analyse(capture(model, torch.zeros(2, 4)))
    scores = scores_of(analysis, Magnitude()(analysis), "a")
    norms = [np.linalg.norm(layer.weight.detach().numpy(), axis=1) for layer in (model.a, model.b)]
    np.testing.assert_allclose(scores, sum(norm / norm.mean() for norm in norms), rtol=1e-5)


def test_all_zero_rows_have_no_mean_to_be_divided_by() -> None:
    assert row_norms(torch.zeros(3, 2), 2).tolist() == [0, 0, 0]


def test_activity_counts_values_that_are_not_zero_over_samples_and_positions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].weight.data = torch.tensor([1.0, -1.0, 0.0, 1.0]).reshape(4, 1, 1, 1)
    model[0].bias.data = torch.tensor([0.0, 0.0, 0.0, 10.0])
    x = torch.tensor([1.0, 2.0, 3.0, -4.0]).reshape(2, 1, 1, 2)
    analysis = analyse(capture(model, x))
    fractions, counted = active_fractions(analysis, [(x,)])
    assert scores_of(analysis, fractions, "0").tolist() == [0.75, 0.25, 0.0, 1.0]
    assert scores_of(analysis, counted, "0").all()
    assert not scores_of(analysis, counted, "2").any()


def test_never_active_neurons_go_first_and_change_nothing_on_that_data() -> None:
    model = mlp()
    model[0].bias.data[::2] = -100
    data = task()
    small = Neurons(keep=0.5, importance=Activity(samples=64))(model, data)
    assert small[0].out_features == 16
    x = torch.cat([inputs for inputs, _ in data.train])
    kept = nn.Sequential(*model[:2])(x).abs().sum(0) > 0
    assert int(kept.sum()) <= 16
    only_first = Neurons(keep={"0": 0.5}, importance=Activity(samples=64))(model, data)
    assert torch.allclose(only_first(x), model(x), atol=1e-6)


def test_a_class_without_rectifier_is_ranked_by_magnitude() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    analysis = analyse(capture(model, torch.zeros(2, 4)))
    magnitude, activity = (scores_of(analysis, importance(analysis, task()), "0") for importance in (Magnitude(), Activity()))
    assert np.array_equal(magnitude, activity)


def test_activity_without_data_says_so() -> None:
    analysis = analyse(capture(mlp(), torch.zeros(2, 4)))
    with pytest.raises(DataError, match="needs data"):
        Activity()(analysis, None)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_end_at_the_share_and_never_round_below_it(rounds: int) -> None:
    small = Neurons(keep=0.25, rounds=rounds, round_to=1, tune=Train(epochs=1, learning_rate=1e-3))(mlp(), task())
    assert (small[0].out_features, small[2].out_features) == (8, 6)


def test_every_round_is_tuned_through_the_users_own_fit() -> None:
    calls: list[int] = []

    def fit(model: nn.Module, task: Task, train: Train, objective: object = None) -> None:
        calls.append(model[0].out_features)

    Neurons(keep=0.25, rounds=2, round_to=1, tune="3ep")(mlp(), task(fit=fit))
    assert calls == [16, 8]


def test_counts_are_rounded_to_what_the_engine_computes_in() -> None:
    small = Neurons(keep=0.4)(mlp(), task())
    assert (small[0].out_features, small[2].out_features) == (16, 8)  # 12.8 and 9.6 of 32 and 24


def test_the_same_seed_gives_the_same_cut_and_the_input_is_unchanged() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    first, second = (Neurons(keep=0.5, importance=Random(seed=3))(model, task()) for _ in range(2))
    other = Neurons(keep=0.5, importance=Random(seed=4))(model, task())
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("count", "keep", "multiple", "kept"),
    [(10, 0, 1, 1), (10, 1, 1, 10), (10, 0.3, 1, 3), (5, 0.5, 1, 3), (16, 0.5, 8, 8), (20, 0.5, 8, 8), (50, 0.5, 8, 24), (8, 0.5, 8, 4)],
)
def test_how_many_stay(count: int, keep: float, multiple: int, kept: int) -> None:
    assert kept_count(count, keep, multiple) == kept


def test_among_equals_the_later_ones_go() -> None:
    assert lowest((1, 2, 3, 4), np.zeros(5), 2) == [4, 3]


def test_wrong_settings_are_reported_together() -> None:
    with pytest.raises(SettingsError) as caught:
        Neurons(keep=2, rounds=0, round_to=1.5, importance="magnitude")  # type: ignore[arg-type]
    for name in ("keep", "rounds", "round_to", "importance"):
        assert any(f"prune.neurons: {name} must be" in problem for problem in caught.value.problems)


def test_clustered_layers_are_named_and_none_at_all_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    some = Clusters(bits=3, leave=("2", "4"))(mlp(), task())
    small = Neurons(keep=0.5)(some, task())
    assert [small[index].weight.shape for index in (0, 2, 4)] == [(32, 4), (16, 32), (3, 16)]  # 12 is rounded up to a block of 8
    assert "no neuron can leave 0, whose weights are clustered" in caplog.text
    with pytest.raises(SettingsError, match=r"Prune before quantize\.clusters"):
        Neurons(keep=0.5)(Clusters(bits=3)(mlp(), task()), task())
