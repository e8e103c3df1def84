"""Importances from gradients, against gradients by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import optimizer as torch_optimizer

from importance_models import (
    Residual,
    Transformer,
    all_inputs,
    all_labels,
    analysis_of,
    loss_delta,
    mlp,
    mlp_gradients,
    scores_of,
    softmax,
    task_of,
    vectors,
    zoo,
)
from pared.core.errors import DataError, ModelError, SettingsError, WeightsError
from pared.prune.importance import (
    Activity,
    ElasticWeightConsolidation,
    Fisher,
    Given,
    HessianDiagonal,
    Magnitude,
    MemoryAwareSynapses,
    PathIntegral,
    SynapticIntelligence,
    Taylor,
    by_root,
    ewc_penalty,
    gradients,
    hutchinson,
    per_sample_gradients,
)
from pared.prune.importance.protocol import removal_or_guard
from pared.prune.importance.samples import Mean, fixed_batch, training_samples
from pared.training import Task, Train


@pytest.mark.parametrize("name", ["residual", "mlp", "transformer"])
@pytest.mark.parametrize("captured", [False, True])
def test_per_sample_gradients_are_those_of_each_sample_alone(name: str, captured: bool) -> None:
    model, task = zoo()[name]
    network = analysis_of(model, task).captured.module if captured else model
    batches = [((inputs[:3],), labels[:3]) for inputs, labels in task.train[:1]]  # type: ignore[index]
    parts = list(per_sample_gradients(network, batches, functional.cross_entropy))
    found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    model.eval()
    for at in range(3):
        loss = functional.cross_entropy(model(batches[0][0][0][at : at + 1]), batches[0][1][at : at + 1])
        for (key, _), expected in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(found[key][at], expected, rtol=1e-4, atol=1e-6)


class Branching(nn.Module):
    """Reads a value while it runs, which vmap can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (2.0 if x.sum().item() > 0 else 1.0)


def test_what_vmap_can_not_follow_is_done_sample_by_sample() -> None:
    model, x = Branching(), vectors(6)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    (found,) = per_sample_gradients(model, [((x,), y)], functional.cross_entropy)
    for at in range(6):
        loss = functional.cross_entropy(model(x[at : at + 1]), y[at : at + 1])
        (expected,) = torch.autograd.grad(loss, [model.net[0].weight])
        torch.testing.assert_close(found["net.0.weight"][at], expected)


def test_frozen_and_unused_parameters_have_gradients_too_and_the_model_is_left_alone() -> None:
    model = mlp().train()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential.forward(model[:3], x)  # type: ignore[method-assign]
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    (found,) = per_sample_gradients(model, [((vectors(2),), torch.tensor([0, 1]))], functional.cross_entropy)
    assert bool(found["0.weight"].any())
    assert not found["unused.weight"].any()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("absolute", ["sample", "mean"])
def test_taylor_equals_numpy(absolute: str) -> None:
    model, task = mlp(), task_of(vectors())
    gradients = mlp_gradients(model, all_inputs(task), loss_delta(model, task))[0]
    weight = model[0].weight.detach().numpy().astype(np.float64)

    def reduced(products: np.ndarray) -> np.ndarray:
        return np.abs(products).mean(0) if absolute == "sample" else np.abs(products.mean(0))

    importance = Taylor(absolute=absolute)  # type: ignore[arg-type]
    np.testing.assert_allclose(importance.weights(model, task)["0.weight"], reduced(gradients * weight), rtol=1e-4, atol=1e-8)
    analysis = analysis_of(model, task)
    expected = reduced((gradients * weight).sum(2))
    np.testing.assert_allclose(scores_of(analysis, importance(analysis, task), "0"), expected, rtol=1e-4, atol=1e-8)


def test_a_weight_that_pulls_samples_both_ways_matters_only_per_sample() -> None:
    model = nn.Linear(1, 1, bias=False)
    task = task_of(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]), loss=lambda outputs, _: outputs.mean())
    assert Taylor(absolute="mean").weights(model, task)["weight"].item() == 0
    assert Taylor().weights(model, task)["weight"].item() == pytest.approx(abs(model.weight.item()))


def test_empirical_fisher_of_a_linear_softmax_model_is_its_closed_form() -> None:
    model, task = nn.Linear(4, 3), task_of(vectors())
    x = all_inputs(task)
    delta = softmax(x @ model.weight.detach().numpy().T.astype(np.float64) + model.bias.detach().numpy()) - np.eye(3)[all_labels(task)]
    expected = (delta[:, :, None] ** 2 * x[:, None, :] ** 2).mean(0)
    guard = Fisher(score="guard").weights(model, task)["weight"].numpy()
    np.testing.assert_allclose(guard, expected, rtol=1e-4)
    removal = Fisher().weights(model, task)["weight"].numpy()
    np.testing.assert_allclose(removal, 0.5 * expected * model.weight.detach().numpy() ** 2, rtol=1e-4)
    batch_mean = (delta[:, :, None] * x[:, None, :]).mean(0) ** 2  # the common mistake: squares of the mean gradient
    assert guard.sum() > 5 * batch_mean.sum()


def test_true_fisher_of_a_linear_softmax_model_is_its_closed_form() -> None:
    model = nn.Linear(2, 3)
    x = torch.tensor([[1.0, -2.0]]).repeat(8192, 1)
    task = task_of(x, torch.zeros(8192, dtype=torch.long), batch=2048)
    p = model(x[:1]).softmax(1).detach()[0].double()
    expected = (p * (1 - p))[:, None] * x[0].double().square()
    importance = Fisher(samples=8192, labels="model", score="guard")
    found = importance.weights(model, task)["weight"]
    torch.testing.assert_close(found, expected, rtol=0.06, atol=0)  # three standard errors of a share of 8192 draws
    assert torch.equal(found, importance.weights(model, task)["weight"])
    assert not torch.equal(found, Fisher(samples=8192, labels="model", score="guard", seed=1).weights(model, task)["weight"])


def test_ewc_is_the_fisher_and_its_penalty_at_zero() -> None:
    model, task = mlp(), task_of(vectors())
    guard = ElasticWeightConsolidation(score="guard", seed=3).weights(model, task)
    fisher = Fisher(score="guard", labels="model", seed=3).weights(model, task)
    assert all(torch.equal(guard[name], fisher[name]) for name in fisher)
    removal = ElasticWeightConsolidation(strength=4.0, seed=3).weights(model, task)
    weights = dict(model.named_parameters())
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    penalty = ewc_penalty(zeros, {name: value.detach() for name, value in weights.items()}, guard, strength=4.0)
    assert penalty.item() == pytest.approx(sum(value.sum().item() for value in removal.values()), rel=1e-5)
    moved = {name: value.detach() + 1 for name, value in weights.items()}
    ewc_penalty(weights, moved, guard, strength=2.0).backward()
    torch.testing.assert_close(model[0].weight.grad, -2.0 * guard["0.weight"].float())


def test_labels_can_be_drawn_from_logits_only() -> None:
    with pytest.raises(ModelError, match="labels can be drawn only"):
        Fisher(labels="model").weights(nn.Flatten(0), task_of(vectors()))


def test_mas_equals_numpy_and_needs_no_labels() -> None:
    model, task = mlp(), task_of(vectors(), torch.full((24,), 99))
    x = all_inputs(task)
    logits = model(torch.from_numpy(x).float()).detach().numpy().astype(np.float64)
    first, second = (np.abs(gradients).mean(0) for gradients in mlp_gradients(model, x, 2 * logits))
    guard = MemoryAwareSynapses(score="guard").weights(model, task)
    np.testing.assert_allclose(guard["0.weight"], first, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(guard["2.weight"], second, rtol=1e-4, atol=1e-7)
    removal = MemoryAwareSynapses().weights(model, task)["0.weight"]
    np.testing.assert_allclose(removal, first * model[0].weight.detach().numpy() ** 2, rtol=1e-4, atol=1e-7)


def test_hutchinson_is_exact_on_a_diagonal_and_unbiased_on_any_hessian() -> None:
    matrix = np.array([[2.0, 0.5], [0.5, 3.0]])
    x = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    (diagonal,) = hutchinson((torch.tensor([2.0, 5.0]) * x**2 / 2).sum(), [x], 1, torch.Generator())
    assert diagonal.tolist() == [2.0, 5.0]
    (found,) = hutchinson(x @ torch.from_numpy(matrix) @ x / 2, [x], 2000, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found, np.diag(matrix), atol=0.05)  # noise of ±0.5 / √2000, four times over
    (flat,) = hutchinson((3 * x).sum(), [x], 1, torch.Generator())
    assert flat.tolist() == [0, 0]


def test_hessian_of_a_linear_softmax_model_is_its_closed_form() -> None:
    model, task = nn.Linear(4, 3), task_of(vectors())
    x = all_inputs(task)
    p = softmax(x @ model.weight.detach().numpy().T.astype(np.float64) + model.bias.detach().numpy())
    expected = ((p * (1 - p))[:, :, None] * x[:, None, :] ** 2).mean(0)
    guard = HessianDiagonal(draws=400, score="guard").weights(model, task)["weight"].numpy()
    np.testing.assert_allclose(guard, expected, atol=0.06)
    assert np.corrcoef(guard.ravel(), expected.ravel())[0, 1] > 0.98
    assert bool((HessianDiagonal().weights(mlp(), task_of(vectors()))["0.weight"] >= 0).all())


def quadratic(weight: Tensor) -> Tensor:
    return (torch.tensor([1.0, 4.0, 0.25]) * (weight - torch.tensor([1.0, -2.0, 3.0])) ** 2).sum()


def test_synaptic_intelligence_sums_to_the_fall_of_the_loss() -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = quadratic(model.weight).item()
    with PathIntegral(model) as path:
        for _ in range(300):
            optimizer.zero_grad()
            quadratic(model.weight).backward()
            optimizer.step()
    fall = before - quadratic(model.weight).item()
    assert path.omega["weight"].sum().item() == pytest.approx(fall, rel=0.02)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_path_integral_takes_the_gradient_of_the_loss_without_weight_decay(kind: str) -> None:
    model = nn.Linear(3, 1, bias=False)
    options = {"lr": 0.01, "weight_decay": 0.5}
    optimizer = (
        torch.optim.SGD(model.parameters(), momentum=0.9, **options) if kind == "sgd" else torch.optim.Adam(model.parameters(), **options)
    )
    start = model.weight.detach().numpy().astype(np.float64).copy()
    expected = np.zeros((1, 3))
    with PathIntegral(model) as path:
        for _ in range(20):
            w = model.weight.detach().numpy().astype(np.float64).copy()
            optimizer.zero_grad()
            quadratic(model.weight).backward()
            optimizer.step()
            expected -= 2 * np.array([1, 4, 0.25]) * (w - [1, -2, 3]) * (model.weight.detach().numpy() - w)
    np.testing.assert_allclose(path.omega["weight"], expected, rtol=1e-4)
    moved = model.weight.detach().numpy() - start
    np.testing.assert_allclose(path.importance(0.3)["weight"], np.maximum(expected, 0) / (moved**2 + 0.3), rtol=1e-4)


def test_path_integral_leaves_no_hook_and_sees_only_its_model() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    hooks = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    path = PathIntegral(model)

    def train() -> None:
        with path:
            assert [len(found) for found in hooks] == [1, 1]
            optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
            other(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train()
    assert [len(found) for found in hooks] == [0, 0]
    assert not path.omega["weight"].any()


def test_synaptic_intelligence_trains_a_copy_by_the_tasks_own_fit() -> None:
    model, task = mlp(), task_of(vectors())
    before = copy.deepcopy(model.state_dict())
    scores = SynapticIntelligence(train=Train(epochs=2, learning_rate=1e-2), score="guard").weights(model, task)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert bool((scores["0.weight"] >= 0).all())
    assert bool(scores["0.weight"].any())
    assert not SynapticIntelligence(train=0).weights(model, task)["0.weight"].any()  # type: ignore[arg-type]


def test_scores_of_a_users_own_training_can_be_given() -> None:
    model, task = mlp(), task_of(vectors())
    with PathIntegral(model) as path:
        task.tune(model, Train(epochs=1))
    analysis = analysis_of(model, task)
    given = Given(path.importance())
    assert np.array_equal(given(analysis, task), by_root(analysis, path.importance()))
    with pytest.raises(SettingsError, match=r"no parameter 0\.weight of shape \(6, 4\)"):
        given.weights(nn.Sequential(nn.Linear(4, 5)))
    with pytest.raises(SettingsError, match="scores must be a mapping"):
        Given([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", [Taylor(), Fisher(), HessianDiagonal(), MemoryAwareSynapses(), SynapticIntelligence()])
def test_without_data_or_with_bad_data_it_says_so(importance: Taylor) -> None:
    with pytest.raises(DataError, match="needs data"):
        importance.weights(mlp(), None)
    if not isinstance(importance, MemoryAwareSynapses):
        with pytest.raises(DataError, match="label 7 in the train split"):
            importance.weights(mlp(), task_of(vectors(), torch.full((24,), 7)))
    broken = mlp()
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"aren't finite|NaN"):
        importance.weights(broken, task_of(vectors()))


def test_only_the_first_samples_are_read_and_a_mean_needs_one() -> None:
    parts = list(training_samples(task_of(vectors()), 11, mlp(), "here"))
    assert [len(inputs[0]) for inputs, _ in parts] == [8, 3]
    assert [len(labels) for _, labels in parts] == [8, 3]
    with pytest.raises(DataError, match="here: the training split has no samples"):
        Mean({"w": torch.zeros(1)}).result("here")


class FixedBatch(nn.Module):
    """A forward that knows its batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("shift", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.shift)


def test_a_graph_with_a_fixed_batch_gives_the_scores_of_one_without() -> None:
    fixed = FixedBatch()
    task = task_of(vectors())
    analysis = analysis_of(fixed, task)
    assert fixed_batch(analysis.captured.module) == 2
    free = analysis_of(fixed.net, task)
    assert fixed_batch(free.captured.module) is None
    for importance in (Taylor(), Fisher(), MemoryAwareSynapses()):
        factor = 2 if isinstance(importance, MemoryAwareSynapses) else 1  # a sum over outputs, each of which stands there twice
        found = scores_of(analysis, importance(analysis, task), "net.0")
        np.testing.assert_allclose(found, factor * scores_of(free, importance(free, task), "0"), rtol=1e-4)
    with pytest.raises(ModelError, match="batch size is fixed"):
        SynapticIntelligence()(analysis, task)


def test_shared_weights_have_scores_under_every_name() -> None:
    model = Transformer()
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.embed.weight
    task = task_of(torch.randint(0, 11, (8, 5)))
    scores = Fisher().weights(model, task)
    assert torch.equal(scores["head.weight"], scores["embed.weight"])
    assert np.isfinite(Fisher()(analysis_of(model, task), task)).all()


def test_residual_layers_that_are_tied_add_up() -> None:
    model, task = zoo()["residual"]
    assert isinstance(model, Residual)
    analysis = analysis_of(model, task)
    weights = Fisher().weights(model, task)
    tied = ("stem", "second.0", "second.1")
    expected = sum(weights[f"{name}.weight"].flatten(1).sum(1).numpy() for name in tied)
    np.testing.assert_allclose(scores_of(analysis, Fisher()(analysis, task), "stem"), expected, rtol=1e-3)
    normalized = Fisher(normalize="layer")(analysis, task)
    assert scores_of(analysis, normalized, "stem").mean() == pytest.approx(3)
    assert scores_of(analysis, normalized, "first.0").mean() == pytest.approx(1)


@pytest.mark.parametrize("targets", [None, torch.tensor(1.0)])
def test_without_labels_samples_are_still_done_together(targets: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("one by one")

    monkeypatch.setattr(gradients, "_one_by_one", refuse)
    batches = [(vectors(8), targets)]
    found = MemoryAwareSynapses().weights(mlp(), Task(batches, batches, batches))
    labelled = MemoryAwareSynapses().weights(mlp(), task_of(vectors(8)))
    assert all(torch.equal(found[name], value) for name, value in labelled.items())


def test_labels_that_are_drawn_need_none_in_the_data() -> None:
    found = Fisher(labels="model").weights(mlp(), task_of(vectors(), torch.full((24,), -1)))
    assert torch.equal(found["0.weight"], Fisher(labels="model").weights(mlp(), task_of(vectors()))["0.weight"])


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


@pytest.mark.parametrize("importance", [Activity(), Taylor(), Fisher(labels="model"), HessianDiagonal(), MemoryAwareSynapses()])
def test_scoring_leaves_no_trace_in_a_model_that_writes_to_its_buffers(importance: Taylor) -> None:
    model, task = Counting(), task_of(vectors())
    analysis = analysis_of(model, task)
    before = model.calls.item()
    importance(analysis, task)
    assert model.calls.item() == before


def test_whole_numbers_among_the_parameters_are_not_trained() -> None:
    model = mlp()
    model.register_parameter("places", nn.Parameter(torch.arange(3), requires_grad=False))
    assert "places" not in SynapticIntelligence().weights(model, task_of(vectors()))


def test_scores_are_wanted_where_the_model_was_trained() -> None:
    # a device without memory stands in for a GPU
    found = removal_or_guard({"weight": torch.ones(2, 2, device="meta")}, nn.Linear(2, 2), "removal")
    assert found["weight"].device.type == "meta"


class Recurring(nn.Module):
    """A layer that is used twice, between two others; its neurons are tied to those of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(4, 5, bias=False), nn.Linear(5, 5, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(self.first(x).relu()).relu()).relu())


def test_a_weight_that_is_read_twice_counts_once() -> None:
    model, task = Recurring(), task_of(vectors())
    analysis = analysis_of(model, task)
    (found,) = analysis.classes
    rows = {name: value.detach().abs().sum(dim=1).numpy() for name, value in model.named_parameters()}
    scores = Magnitude(order=1, normalize="none")(analysis)[list(found.neurons)]
    np.testing.assert_allclose(scores, rows["first.weight"] + rows["twice.weight"], rtol=1e-6)
    single = Taylor().weights(model, task)
    sums = by_root(analysis, single)[list(found.neurons)]
    np.testing.assert_allclose(sums, (single["first.weight"].sum(dim=1) + single["twice.weight"].sum(dim=1)).numpy(), rtol=1e-6)


def test_a_fixed_batch_is_filled_with_what_has_a_batch_axis() -> None:
    batches = [(vectors(3), torch.tensor(1.0))]
    analysis = analysis_of(FixedBatch(), task_of(vectors()))
    parts = list(training_samples(Task(batches, batches, batches), 1, analysis.captured.module, "here"))
    assert [(len(inputs[0]), targets.item()) for inputs, targets in parts] == [(2, 1.0)]
