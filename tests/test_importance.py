"""Every importance on every kind of network, and those from weights and activations against numpy."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from importance_models import all_inputs, analysis_of, mlp, scores_of, task_of, vectors, zoo
from pared.core.errors import DataError, SettingsError, WeightsError
from pared.core.rules import Mask, add_rule
from pared.prune import Neurons, Weights
from pared.prune.importance import (
    FPGM,
    Activity,
    BatchNormScale,
    ElasticWeightConsolidation,
    Fisher,
    GeometricMedian,
    HessianDiagonal,
    Magnitude,
    MeanActivation,
    MemoryAwareSynapses,
    Random,
    Reconstruction,
    SynapticIntelligence,
    Taylor,
    WeightImportance,
    distances_to_median,
    distances_to_others,
    geometric_median,
)
from pared.prune.importance.readers import readers
from pared.recipe import loads
from pared.recipe.methods import settings
from pared.training import Train

EVERY = [
    Magnitude(), Random(), Taylor(), Taylor(absolute="mean"), Fisher(), Fisher(labels="model"), ElasticWeightConsolidation(),
    SynapticIntelligence(), MemoryAwareSynapses(), HessianDiagonal(draws=2), Activity(), MeanActivation(), BatchNormScale(),
    GeometricMedian(), FPGM(), Reconstruction(),
]  # fmt: skip
FROM_WEIGHTS = [importance for importance in EVERY if isinstance(importance, WeightImportance)]


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[nn.Module, object, object]]:
    return {name: (model, task, analysis_of(model, task)) for name, (model, task) in zoo().items()}


@pytest.mark.parametrize("importance", EVERY, ids=repr)
@pytest.mark.parametrize("name", ["residual", "mlp", "transformer"])
def test_every_importance_runs_on_every_network_and_twice_alike(importance, name, networks) -> None:
    model, task, analysis = networks[name]
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    first = importance(analysis, task)
    torch.manual_seed(0)
    assert np.array_equal(first, importance(analysis, task))
    assert first.shape == (analysis.first.count,)
    assert np.isfinite(first).all()
    assert (first >= 0).all()
    for found in analysis.classes:
        assert len(np.unique(first[list(found.neurons)])) > 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("importance", FROM_WEIGHTS, ids=repr)
def test_weight_importances_score_every_parameter_in_its_shape(importance, networks) -> None:
    model, task, _ = networks["residual"]
    scores = importance.weights(model, task)
    assert {name: value.shape for name, value in scores.items()} == {name: value.shape for name, value in model.named_parameters()}
    assert not any(value.requires_grad for value in scores.values())


@pytest.mark.parametrize("importance", FROM_WEIGHTS, ids=repr)
def test_weights_are_pruned_by_any_weight_importance_also_in_rounds(importance) -> None:
    small = Weights(keep=0.25, rounds=2, importance=importance)(mlp(), task_of(vectors()))
    assert sum(int(layer.weight.count_nonzero()) for layer in (small[0], small[2])) == 11  # of 42, a half rounded up


@pytest.mark.parametrize("importance", EVERY, ids=repr)
def test_neurons_are_pruned_by_any_importance(importance) -> None:
    small = Neurons(keep=0.5, round_to=1, importance=importance)(mlp(), task_of(vectors()))
    assert small[0].out_features == 3


@pytest.mark.parametrize("importance", EVERY, ids=repr)
def test_every_importance_can_be_written_in_a_recipe(importance) -> None:
    for method in ("neurons", "weights") if isinstance(importance, WeightImportance) else ("neurons",):
        kind = {"neurons": Neurons, "weights": Weights}[method]
        written = settings(kind(importance=importance))["importance"]
        step = loads(f"steps:\n  - prune.{method}: {{importance: {written}}}\n".replace("'", "").replace("True", "true")).steps[0]
        assert step.importance == importance  # type: ignore[attr-defined]


def test_a_name_alone_is_enough_in_a_recipe() -> None:
    text = "steps: [prune.neurons: {importance: mean_activation}, prune.weights: {importance: {synaptic_intelligence: {train: 2ep}}}]"
    neurons, weights = loads(text).steps
    assert neurons.importance == MeanActivation()  # type: ignore[attr-defined]
    assert weights.importance == SynapticIntelligence(train=Train(epochs=2))  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match="importance must be magnitude or random or taylor"):
        loads("steps: [prune.weights: {importance: activity}]")


def test_wrong_settings_are_reported_together() -> None:
    with pytest.raises(SettingsError) as caught:
        Fisher(samples=0, score="both", labels="none", seed=-1, normalize="all")  # type: ignore[arg-type]
    for field in ("samples", "score", "labels", "seed", "normalize"):
        assert any(problem.startswith(f"importance.fisher: {field} must be") for problem in caught.value.problems)
    for wrong in (
        lambda: Taylor(absolute="never"),  # type: ignore[arg-type]
        lambda: HessianDiagonal(draws=0),
        lambda: SynapticIntelligence(damping=0),
        lambda: SynapticIntelligence(train="soon"),  # type: ignore[arg-type]
        lambda: ElasticWeightConsolidation(strength=0),
        lambda: MemoryAwareSynapses(score=1),  # type: ignore[arg-type]
        lambda: Magnitude(order=0),
        lambda: Random(seed=1.5),  # type: ignore[arg-type]
        *(
            lambda kind=kind: kind(normalize="x")
            for kind in (Activity, MeanActivation, BatchNormScale, GeometricMedian, FPGM, Reconstruction)
        ),
    ):
        with pytest.raises(SettingsError, match="must be"):
            wrong()


@pytest.mark.parametrize("importance", [Activity(), MeanActivation(), Reconstruction()])
def test_importances_from_activations_need_data(importance) -> None:
    with pytest.raises(DataError, match="needs data"):
        importance(analysis_of(mlp(), task_of(vectors())), None)


def test_a_unit_that_is_dead_on_the_data_scores_nothing() -> None:
    model, task = mlp(), task_of(vectors())
    model[0].bias.data[2] = -100
    analysis = analysis_of(model, task)
    for importance in (MeanActivation(), Reconstruction(), Taylor(), Fisher(), MemoryAwareSynapses()):
        scores = scores_of(analysis, importance(analysis, task), "0")
        assert scores[2] == 0
        assert (np.delete(scores, 2) > 0).all()
    assert 0 <= scores_of(analysis, Activity()(analysis, task), "0")[2] <= 1e-6  # magnitude breaks ties


def test_mean_activation_and_reconstruction_equal_numpy() -> None:
    model, task = mlp(), task_of(vectors())
    analysis = analysis_of(model, task)
    w, b, v = (tensor.detach().numpy().astype(np.float64) for tensor in (model[0].weight, model[0].bias, model[2].weight))
    hidden = np.maximum(all_inputs(task) @ w.T + b, 0)
    mean = MeanActivation(normalize="none")(analysis, task)
    np.testing.assert_allclose(scores_of(analysis, mean, "0"), hidden.mean(0), rtol=1e-5)
    normalized = scores_of(analysis, MeanActivation()(analysis, task), "0")
    np.testing.assert_allclose(normalized, hidden.mean(0) / hidden.mean(), rtol=1e-5)
    lost = np.array([((hidden[:, [j]] * v[:, j]) ** 2).sum(1).mean() for j in range(6)])  # what the outputs lose with neuron j, squared
    np.testing.assert_allclose(scores_of(analysis, Reconstruction()(analysis, task), "0"), lost / lost.sum(), rtol=1e-5)


class Convolutions(nn.Module):
    """Channels that a grouped, a depthwise and a transposed convolution and a flattened linear layer read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1, groups=2)
        self.c, self.d = nn.Conv2d(4, 4, 1, groups=4), nn.ConvTranspose2d(4, 3, 2)
        self.e = nn.Linear(3 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(self.d(self.c(self.b(self.a(x).relu()).relu()).relu()).relu().flatten(1))


def test_weights_are_found_by_the_input_that_they_read() -> None:
    torch.manual_seed(0)
    model, task = Convolutions(), task_of(torch.rand(8, 1, 4, 4))
    analysis = analysis_of(model, task)
    found = {str(node.args[reader.weight].target): reader for node, reader in readers(analysis).items()}
    b, c, d, e = (layer.weight.detach().double() for layer in (model.b, model.c, model.d, model.e))
    assert sorted(found) == ["b.weight", "c.weight", "d.weight", "e.weight"]
    grouped = torch.stack([b[:2, 0].square().sum(), b[:2, 1].square().sum(), b[2:, 0].square().sum(), b[2:, 1].square().sum()])
    torch.testing.assert_close(found["b.weight"].energy(model.b.weight.detach()), grouped)
    torch.testing.assert_close(found["c.weight"].energy(model.c.weight.detach()), c.square().sum((1, 2, 3)))
    torch.testing.assert_close(found["d.weight"].energy(model.d.weight.detach()), d.square().sum((1, 2, 3)))
    torch.testing.assert_close(found["e.weight"].energy(model.e.weight.detach()), e.square().sum(0))
    with torch.no_grad():
        read = model.d(model.c(model.b(model.a(torch.cat([x for x, _ in task.train])).relu()).relu()).relu()).relu().double()
    energy = (read.square().mean(0).flatten() * e.square().sum(0)).reshape(3, 9).sum(1)
    np.testing.assert_allclose(scores_of(analysis, Reconstruction()(analysis, task), "d"), energy / energy.sum(), rtol=1e-4)


def test_batch_norm_scales_add_up_over_what_is_tied() -> None:
    model, task = zoo()["residual"]
    analysis = analysis_of(model, task)
    gamma = {name: module.weight.detach().abs().numpy() for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    scores = BatchNormScale()(analysis)
    np.testing.assert_allclose(scores_of(analysis, scores, "first.0"), gamma["between.0"], rtol=1e-6)
    np.testing.assert_allclose(scores_of(analysis, scores, "stem"), gamma["norm"] + gamma["after.0"] + gamma["after.1"], rtol=1e-6)
    assert scores_of(analysis, BatchNormScale(normalize="layer")(analysis), "first.0").mean() == pytest.approx(1)


@pytest.mark.parametrize("importance", [BatchNormScale(), Activity()])
def test_a_class_that_an_importance_says_nothing_of_is_ranked_by_magnitude(importance) -> None:
    task = task_of(vectors())
    analysis = analysis_of(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), task)
    assert np.array_equal(scores_of(analysis, importance(analysis, task), "0"), scores_of(analysis, Magnitude()(analysis), "0"))


def test_distances_equal_numpy() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    x = rows.numpy().astype(np.float64)
    others = np.array([sum(np.linalg.norm(a - b) for b in x) for a in x])
    np.testing.assert_allclose(distances_to_others(rows), others, rtol=1e-6)
    median = minimize(lambda point: np.linalg.norm(x - point, axis=1).sum(), x.mean(0), method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose(geometric_median(rows), median, atol=1e-5)
    np.testing.assert_allclose(distances_to_median(rows), np.linalg.norm(x - median, axis=1), atol=1e-5)


def test_the_geometric_median_may_be_one_of_the_rows_or_all_of_them() -> None:
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0]])
    assert geometric_median(cross).tolist() == [0, 0]
    most = torch.tensor([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0], [0.0, 0.0], [5.0, 1.0]])
    np.testing.assert_allclose(geometric_median(most), [2, 2], atol=1e-6)
    begins = torch.tensor([[0.0, 0.0], [3.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])  # the mean, where it begins, is a row
    np.testing.assert_allclose(geometric_median(begins), [4, 0], atol=1e-6)
    assert geometric_median(torch.ones(3, 2)).tolist() == [1, 1]
    assert geometric_median(torch.ones(1, 2)).tolist() == [1, 1]


def test_the_filter_nearest_to_the_others_goes_first_however_large() -> None:
    model, task = mlp(), task_of(vectors())
    model[0].weight.data = torch.tensor([[9.0, 9], [9, 10], [10, 9], [9.3, 9.3], [0, 0], [20, 1]]).repeat(1, 2)
    analysis = analysis_of(model, task)
    for importance in (FPGM(), GeometricMedian()):
        scores = scores_of(analysis, importance(analysis), "0")
        assert scores.argmin() == 3
        assert scores.mean() == pytest.approx(1)
    assert scores_of(analysis, Magnitude()(analysis), "0").argmin() == 4


def test_masked_weights_count_as_zero_and_keep_their_random_numbers() -> None:
    model, task = mlp(), task_of(vectors())
    plain = {importance: importance.weights(model) for importance in (Magnitude(), Random(3))}
    keep = torch.ones(6, 4, dtype=torch.bool)
    keep[1], keep[3, 0] = False, False
    add_rule(model[0], "weight", Mask(keep))
    model[0].parametrizations.weight.original.data.fill_(2)  # type: ignore[union-attr]
    assert torch.equal(Magnitude().weights(model)["0.weight"], 2.0 * keep)
    assert torch.equal(Random(3).weights(model)["0.weight"], plain[Random(3)]["0.weight"])
    analysis = analysis_of(model, task)
    stored = "0.parametrizations.weight.original"
    producer = next(found for found in analysis.producers if found.parameter == stored)
    norms = Magnitude(order=1, normalize="none")(analysis)[analysis.root[producer.atoms]]
    assert norms.tolist() == [8, 0, 8, 6, 8, 8]
    assert Taylor()(analysis, task)[analysis.root[producer.atoms]][1] == 0


def test_nan_is_named() -> None:
    model = mlp()
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"0\.weight: scores of its neurons aren't finite"):
        Magnitude()(analysis_of(model, task_of(vectors())))


TWO_PROCESSES = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[3])
from importance_models import analysis_of, mlp, task_of, vectors
from pared.prune.importance import Activity, Fisher, MeanActivation, Reconstruction, Taylor
model, task = mlp(), task_of(vectors(32))
analysis = analysis_of(model, task)
importances = (Activity(), Fisher(), MeanActivation(), Reconstruction(), Taylor(absolute="mean"))
alone = [importance(analysis, task) for importance in importances]
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
for importance, expected in zip(importances, alone):
    np.testing.assert_allclose(importance(analysis, task), expected, rtol=1e-5, atol=1e-9, err_msg=repr(importance))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_samples_and_agree_with_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    commands = [[sys.executable, str(script), str(tmp_path / "meet"), rank, str(Path(__file__).parent)] for rank in "01"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
