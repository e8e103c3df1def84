"""Data without labels: the teacher takes their place in training, in metrics, in every family, and in a whole run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pared
from pared.architecture import LowRank
from pared.core.errors import DataError, ModelError
from pared.core.method import Method, Recipe
from pared.core.rules import bake
from pared.distill import (
    Agreement,
    Cosine,
    Decoupled,
    Direction,
    Dist,
    Divergence,
    Ensemble,
    Generations,
    Hint,
    Logits,
    Mutual,
    SquaredError,
    Teach,
)
from pared.dynamic import EarlyExit, Exits
from pared.measure import file_metric
from pared.prune import Fisher, GroupLasso, Movement, Neurons, Regrow, Taylor, Weights
from pared.quantize import Bits, Clusters, Int8, Rate
from pared.runtime import export
from pared.training import Task, Train, evaluate, fit

ONE = Train(epochs=1, learning_rate=0.01)


def net(width: int = 8, seed: int = 0, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def inputs(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 4, generator=generator) for _ in range(count)]


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "bare": lambda x: x,
    "none": lambda x: (x, None),
    "one": lambda x: (x,),
    "list": lambda x: [x],
}


def toy_task(form: str = "bare", **settings: Any) -> Task:
    batches = [FORMS[form](x) for x in inputs()]
    return Task(batches, batches, batches, **{"metric": Agreement(), **settings})


# --- training ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_teacher_alone_teaches(form: str, weight: float) -> None:
    teacher = net(seed=1).eval()
    expected = Teach(weight=1.0, train=ONE)(net(), toy_task("none", teacher=teacher))
    found = Teach(weight=weight, train=ONE)(net(), toy_task(form, teacher=teacher))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert not torch.equal(found[0].weight, net()[0].weight)  # type: ignore[index,operator]


def test_an_ordinary_plan_is_taught_too() -> None:
    teacher = net(seed=1).eval()
    work = toy_task(teacher=teacher)
    plain = Train(epochs=30, learning_rate=0.02)(net(), work)
    assert evaluate(plain, work) > evaluate(net(), work)
    same = Train(epochs=30, learning_rate=0.02, teach=0.5)(net(), work)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))


FAMILIES: dict[str, Method] = {
    "neurons": Neurons(keep=0.5, round_to=1, tune=ONE, rounds=2, guard=1.0),
    "neurons, taught": Neurons(keep=0.5, round_to=1, tune=ONE, teacher=True, repair="least-squares"),
    "weights": Weights(keep=0.5, tune=ONE),
    "movement": Movement(keep=0.5, train=ONE),
    "regrow": Regrow(keep=0.5, train=ONE),
    "group lasso": GroupLasso(train=ONE, tune=ONE),
    "int8": Int8(calibration=16, tune=ONE),
    "bits": Bits(weights=3, method="lsq", tune=ONE),
    "clusters": Clusters(bits=2, tune=ONE),
    "rate": Rate(price=0.01, train=ONE),
    "low rank": LowRank(rank=2, tune=ONE),
    "exits": Exits(count=1, train=ONE),
    "generations": Generations(count=1, teach=Teach(train=ONE)),
    "mutual": Mutual(train=ONE),
    "features": Teach(train=ONE, features=(Hint({"1": "1"}),)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_works_without_labels(name: str) -> None:
    recipe = Recipe(FAMILIES[name])
    model = net()
    small = recipe(model, toy_task())
    assert 0 <= evaluate(small, toy_task(teacher=model)) <= 1
    small = recipe(model, toy_task(teacher=Ensemble([net(), net(seed=1)])))
    assert small.eval()(inputs()[0]).shape == (16, 3)


TAUGHT: dict[str, Method] = {
    "movement": Movement(keep=0.5, train=Train(epochs=1, teach=1.0)),
    "exits": Exits(count=1, train=Train(epochs=1, teach=1.0)),
    "group lasso": GroupLasso(train=Train(epochs=1, teach=1.0)),
    "weights": Weights(keep=0.5, tune=Train(epochs=1, teach=1.0)),
    "mutual": Mutual(train=Train(epochs=1, teach=1.0)),
    "int8": Int8(calibration=16, tune=Train(epochs=1, teach=1.0)),
}


@pytest.mark.parametrize("name", TAUGHT)
def test_every_familys_plan_can_be_taught_by_an_ensemble(name: str) -> None:
    """At the weight 1 labels don't matter, so labels that no network has do no harm."""
    batches = [(x, torch.full((16,), 99)) for x in inputs()]
    valid = [(x, torch.zeros(16, dtype=torch.long)) for x in inputs()]
    task = Task(batches, valid, valid, teacher=Ensemble([net(seed=1), net(seed=2)]))
    if name in ("int8", "group lasso"):
        task = Task(valid, valid, valid, teacher=task.teacher)
    torch.manual_seed(0)
    result = TAUGHT[name](net(), task)
    assert isinstance(result, nn.Module)


# --- regressors, embeddings, several outputs ---


class Two(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.body(x))
        return {"a": self.a(x), "b": self.b(x)}


KINDS: dict[str, tuple[Callable[[int], nn.Module], dict[str, Any], Teach]] = {
    "regressor by the task's loss": (
        lambda seed: net(seed=seed, outputs=1), {"loss": F.mse_loss, "metric": SquaredError()}, Teach(),
    ),
    "regressor": (lambda seed: net(seed=seed, outputs=2), {"metric": SquaredError()}, Teach(loss=Logits(standardize=True))),
    "embedding": (lambda seed: net(seed=seed, outputs=6), {"metric": Cosine()}, Teach(loss=Direction())),
    "classifier": (lambda seed: net(seed=seed), {"metric": Divergence()}, Teach()),
    "classifier by ranks": (lambda seed: net(seed=seed), {"metric": Agreement()}, Teach(loss=Dist(), temperature=1.0)),
    "several outputs": (Two, {"metric": SquaredError()}, Teach(loss=Logits())),
    "several distributions": (Two, {"metric": Agreement()}, Teach()),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_students_come_nearer_to_their_teacher(kind: str, tmp_path: Path) -> None:
    make, settings, method = KINDS[kind]
    teacher, student = make(1), make(2)
    task = toy_task(teacher=teacher, **settings)
    taught = Teach(method.temperature, train=Train(epochs=60, learning_rate=0.02), loss=method.loss)(student, task)
    before, after = evaluate(student, task), evaluate(taught, task)
    assert after > before if task.metric.higher_is_better else after < before
    same = evaluate(teacher, task)
    assert same == pytest.approx(1.0 if task.metric.higher_is_better else 0.0, abs=1e-6)
    file = export(taught, task.example_inputs(), tmp_path / "small.onnx")
    assert file_metric(file, task) == pytest.approx(after, abs=1e-4)


def test_metrics_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    ours, theirs = torch.tensor(s), torch.tensor(t)
    q, p = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (s, t))
    assert Agreement()(ours, theirs).numpy() == pytest.approx((s.argmax(1) == t.argmax(1)).astype(float))
    assert Divergence()(ours, theirs).numpy() == pytest.approx((p * np.log(p / q)).sum(1), rel=1e-5)
    assert Cosine()(ours, theirs).numpy() == pytest.approx((s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1), rel=1e-5)
    assert SquaredError()(ours, theirs).numpy() == pytest.approx(((s - t) ** 2).mean(1), rel=1e-5)
    maps = ours.T.reshape(1, 4, 5), theirs.T.reshape(1, 4, 5)
    assert float(Agreement()(*maps)) == pytest.approx(float(Agreement()(ours, theirs).mean()))
    assert float(Divergence()((ours, theirs), {"a": theirs, "b": theirs}).mean()) == pytest.approx(
        float(Divergence()(ours, theirs).mean()) / 2
    )


# --- the teacher isn't touched, and errors ---


def test_the_reference_stays_as_it_is() -> None:
    teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    before = copy.deepcopy(teacher.state_dict())
    evaluate(net(), toy_task(teacher=teacher))
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        call()


def test_what_needs_labels_says_so() -> None:
    teacher = net(seed=1)
    missing = r"the train split has no labels, and there is no teacher\. Give the task one"
    refused(lambda: fit(net(), toy_task(), ONE), missing)
    refused(lambda: Exits(count=1, train=ONE)(net(), toy_task()), missing)
    refused(lambda: evaluate(net(), toy_task()), "the valid split has no labels, and there is no teacher")
    refused(
        lambda: evaluate(net(), toy_task(metric=pared.Accuracy(), teacher=teacher), "test"), "the test split has no labels, which accuracy"
    )
    refused(lambda: Teach(loss=Decoupled())(net(), toy_task(teacher=teacher)), r"which distill\.decoupled needs")
    for importance in (Taylor(), Fisher()):
        method = Neurons(keep=0.5, importance=importance)
        refused(lambda method=method: method(net(), toy_task(teacher=teacher)), "which an importance by gradients of the loss needs")
    with pytest.raises(ModelError, match="the teacher answers with 2 tensors of numbers, the student with 1"):
        Teach(epochs=1)(net(), toy_task(teacher=Two(0)))


# --- a whole run ---


def test_a_run_without_labels(tmp_path: Path) -> None:
    recipe = Recipe(Neurons(keep=0.5, round_to=1), Teach(train=Train(epochs=3, learning_rate=0.02)), Int8(calibration=16))
    result = pared.compress(net(), toy_task(), recipe, tmp_path / "run", baselines=False, quick=True)
    assert result.original.metric.name == "agreement"
    assert result.original.metric.value == 1.0
    assert 0 < result.compressed.metric.value <= 1
    assert result.drop == pytest.approx(1 - result.compressed.metric.value)
    assert list((tmp_path / "run" / "checkpoints").rglob("answers/*.pt"))


def test_exits_are_taught_each() -> None:
    teacher = net(seed=1)
    small = Exits(count=1, train=Train(epochs=20, learning_rate=0.02))(net(), toy_task(teacher=teacher))
    assert isinstance(small, EarlyExit)
    assert evaluate(small, toy_task(teacher=teacher)) > evaluate(net(), toy_task(teacher=teacher))
    taught = bake(Teach(train=ONE)(small, toy_task(teacher=teacher)))
    assert isinstance(taught, EarlyExit)
