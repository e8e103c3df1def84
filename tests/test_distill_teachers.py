"""Several teachers, chains of them, generations, and peers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.core.errors import ModelError, SettingsError
from pared.core.method import Recipe
from pared.distill import Assistants, Ensemble, Generations, Logits, Mutual, Teach, distillation_loss, mean_scores, soft_targets
from pared.distill.mutual import Peers
from pared.prune import Neurons
from pared.runtime import Engine, export
from pared.training import Objective, Task, Train, evaluate


def net(width: int = 6, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def toy_task(**settings: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator)) for _ in range(2)]
    return Task(batches, batches, batches, **settings)


def first_batch(task: Task) -> tuple[Tensor, Tensor]:
    return task.train[0]  # type: ignore[index]


def spy(losses: list[float]) -> Any:
    def fit(model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
        assert objective is not None
        inputs, targets = first_batch(task)
        losses.append(objective(model.eval(), task.prepare(inputs), targets).item())

    return fit


# --- ensembles ---


@pytest.mark.parametrize("t", [1.0, 5.0])
def test_means_are_those_of_numpy(t: float) -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=(4, 3)) * 3 for _ in range(3)]
    powers = [np.exp(z / t) for z in scores]
    p = [each / each.sum(1, keepdims=True) for each in powers]
    product = np.prod(p, 0) ** (1 / 3)
    expected = {"arithmetic": np.mean(p, 0), "geometric": product / product.sum(1, keepdims=True)}
    expected["logits"] = expected["geometric"]
    for mean, wanted in expected.items():
        found = mean_scores([torch.tensor(z) for z in scores], mean, t)  # type: ignore[arg-type]
        assert soft_targets(found, t).numpy() == pytest.approx(wanted)
    assert mean_scores([torch.tensor(z) for z in scores], "logits", t).numpy() == pytest.approx(np.mean(scores, 0))


def test_only_the_arithmetic_mean_depends_on_the_temperature() -> None:
    scores = [torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])]
    found = {mean: [soft_targets(mean_scores(scores, mean, t), 5.0) for t in (1.0, 5.0)] for mean in ("arithmetic", "geometric")}  # type: ignore[arg-type]
    assert not torch.allclose(*found["arithmetic"], atol=1e-2)
    assert torch.allclose(*found["geometric"])


def test_a_teacher_is_averaged_at_the_temperature_of_the_loss() -> None:
    losses: list[float] = []
    several = [net(seed=1).eval(), net(seed=2).eval()]
    ensemble, student = Ensemble(several), net(seed=3).eval()
    task = toy_task(teacher=ensemble, fit=spy(losses))
    Teach(temperature=7.0, weight=1.0)(student, task)
    Train(teach=1.0, temperature=7.0)(student, task)
    x, _ = first_batch(task)
    p = torch.stack([(each(x) / 7.0).softmax(1) for each in several]).mean(0)
    expected = 49.0 * (p * (p.log() - (student(x) / 7.0).log_softmax(1))).sum(1).mean()
    assert losses == [pytest.approx(expected.item(), rel=1e-4)] * 2
    assert ensemble.temperature == 1.0  # the teacher stays as it is


def test_logit_regression_on_the_mean_of_logits() -> None:
    losses: list[float] = []
    several = [net(seed=1).eval(), net(seed=2).eval()]
    task = toy_task(teacher=Ensemble(several, "logits"), fit=spy(losses))
    student = net(seed=3).eval()
    Teach(weight=1.0, loss=Logits())(student, task)
    x, _ = first_batch(task)
    target = (several[0](x) + several[1](x)) / 2
    assert losses[0] == pytest.approx((0.5 * (student(x) - target).square().sum(1).mean()).item(), rel=1e-5)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric", "logits"])
def test_an_ensemble_is_an_ordinary_network(mean: Any, tmp_path: Path) -> None:
    ensemble = Ensemble([net(seed=1), net(8, seed=2)], mean).eval()
    assert 0 <= evaluate(ensemble, toy_task()) <= 1
    x = torch.randn(5, 4)
    engine = Engine(export(ensemble, x[:2], tmp_path / "ensemble.onnx"))
    assert engine.run(x.numpy())[0] == pytest.approx(ensemble(x).detach().numpy(), abs=1e-5)
    small = Train(epochs=1)(ensemble, toy_task())
    assert not torch.equal(small.networks[0][0].weight, ensemble.networks[0][0].weight)  # type: ignore[index,union-attr]


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": self.a(x), "rest": (self.b(x),)}


def test_an_ensemble_of_several_outputs() -> None:
    parts = [Several(), Several()]
    x = torch.randn(5, 4)
    found = Ensemble(parts, "logits")(x)
    assert torch.allclose(found["rest"][0], (parts[0](x)["rest"][0] + parts[1](x)["rest"][0]) / 2)


def test_ensembles_that_can_t_be() -> None:
    with pytest.raises(SettingsError) as error:
        Ensemble([], mean="median", temperature=0)  # type: ignore[arg-type]
    assert [problem.split(" must be ")[0] for problem in error.value.problems] == [
        f"distill.ensemble: {field}" for field in ("networks", "mean", "temperature")
    ]
    with pytest.raises(ModelError, match=r"must answer in one shape\. Got \[\(2, 3\)\], \[\(2, 2\)\]"):
        Ensemble([net(), nn.Linear(4, 2)])(torch.zeros(2, 4))


# --- chains ---


def test_each_assistant_is_taught_by_the_one_before() -> None:
    taught: list[int] = []
    losses: list[float] = []

    def fit(model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
        assert task.teacher is not None
        taught.append(task.teacher[0].out_features)  # type: ignore[index]
        spy(losses)(model, task, train, objective)
        with torch.no_grad():
            model[0].bias += 1  # type: ignore[index]

    teacher, student, middle = net(32), net(4, 3), net(8, 2)
    before = copy.deepcopy([each.state_dict() for each in (teacher, student, middle)])
    chain = Assistants((Neurons(keep=0.5), middle), Teach(temperature=2.0, weight=1.0))
    result = chain(student, toy_task(teacher=teacher, fit=fit))
    assert taught == [32, 16, 8]
    x, _ = first_batch(toy_task())
    last = copy.deepcopy(middle)
    with torch.no_grad():
        last[0].bias += 1
    assert losses[-1] == pytest.approx(distillation_loss(student(x), last(x), 2.0).item(), rel=1e-5)
    assert result[0].out_features == 4  # type: ignore[index]
    for model, state in zip((teacher, student, middle), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_chain_in_a_recipe() -> None:
    recipe = Recipe(Neurons(keep=0.25, round_to=1), Assistants((net(12),), Teach(epochs=1)))
    assert recipe(net(16), toy_task())[0].out_features == 4  # type: ignore[index]


def test_chains_that_can_t_be() -> None:
    with pytest.raises(SettingsError, match=r"distill\.assistants: there is no teacher"):
        Assistants((net(),))(net(), toy_task())
    with pytest.raises(SettingsError) as error:
        Assistants((), teach=3)  # type: ignore[arg-type]
    assert len(error.value.problems) == 2


# --- generations ---


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_each_generation_is_taught_by_those_before(ensemble: bool, fresh: bool) -> None:
    seen: list[tuple[nn.Module, nn.Module]] = []

    def fit(model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
        assert task.teacher is not None
        seen.append((task.teacher, copy.deepcopy(model)))

    model = net()
    result = Generations(count=3, teach=Teach(epochs=1), fresh=fresh, ensemble=ensemble)(model, toy_task(fit=fit))
    teachers, students = zip(*seen, strict=True)
    assert teachers[0] is model
    if ensemble:
        assert [len(each.networks) for each in teachers[1:]] == [2, 3]  # type: ignore[arg-type]
        assert teachers[2].networks[0] is model  # type: ignore[index]
    else:
        assert torch.equal(teachers[1][0].weight, students[0][0].weight)  # type: ignore[index]
    assert all(torch.equal(each[0].weight, model[0].weight) is not fresh for each in students)  # type: ignore[index]
    if fresh:
        assert not torch.equal(students[0][0].weight, students[1][0].weight)  # type: ignore[index]
    assert torch.equal(result[0].weight, students[2][0].weight)  # type: ignore[index]


def test_the_first_generation_is_taught_by_the_tasks_teacher() -> None:
    seen: list[nn.Module | None] = []
    teacher = net(12)
    task = toy_task(teacher=teacher, fit=lambda model, task, train, objective=None: seen.append(task.teacher))
    Generations(count=1)(net(), task)
    assert seen == [teacher]


# --- peers ---


def test_peers_learn_from_labels_and_from_each_other() -> None:
    losses: list[float] = []
    model, others = net(seed=1).eval(), (net(8, 2).eval(), net(5, 3).eval())
    task = toy_task(fit=spy(losses))
    Mutual(weight=0.25, temperature=2.0, others=others)(model, task)
    x, y = first_batch(task)
    said = [each(x) for each in (model, *others)]
    expected = 0.0
    for at, z in enumerate(said):
        kl = [distillation_loss(z, other, 2.0).item() for number, other in enumerate(said) if number != at]
        expected += 0.75 * nn.functional.cross_entropy(z, y).item() + 0.25 * sum(kl) / 2
    assert losses == [pytest.approx(expected, rel=1e-5)]


def test_peers_don_t_teach_by_changing_themselves() -> None:
    """The gradient of a network is that of its own part of the loss alone."""
    found: dict[str, Tensor] = {}

    def fit(model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
        assert objective is not None
        assert isinstance(model, Peers)
        x, y = first_batch(task)
        objective(model.eval(), (x,), y).backward()
        found["ours"] = model.peers[0][0].weight.grad  # type: ignore[index,union-attr]
        first, second = model.peers
        z = first(x)
        loss = 0.5 * nn.functional.cross_entropy(z, y) + 0.5 * distillation_loss(z, second(x).detach(), 1.0)
        found["expected"] = torch.autograd.grad(loss, first[0].weight)[0]  # type: ignore[index,union-attr,arg-type]

    Mutual()(net(), toy_task(fit=fit))
    assert torch.allclose(found["ours"], found["expected"])


def test_the_network_comes_back_alone_and_better() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    batches = [(x, (x @ torch.randn(4, 3)).argmax(1))]
    task, model = Task(batches, batches, batches), net(8)
    result = Mutual(peers=2, train=Train(epochs=60, learning_rate=0.02))(model, task)
    assert type(result) is nn.Sequential
    assert list(result.state_dict()) == list(model.state_dict())
    assert evaluate(result, task) > 0.9 > evaluate(model, task)


def test_mistakes_of_peers_and_generations() -> None:
    with pytest.raises(SettingsError) as error:
        Mutual(peers=0, weight=2, temperature=0, others=net(), train=Train(label_smoothing=0.1))  # type: ignore[arg-type]
    assert len(error.value.problems) == 5
    with pytest.raises(SettingsError) as error:
        Generations(count=0, teach=None, fresh=1, ensemble="yes")  # type: ignore[arg-type]
    assert len(error.value.problems) == 4
