"""Inner layers: which belong together, adapters that go again, and students that were cut."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared import data
from pared.architecture.nets import resnet8
from pared.core.errors import ModelError, SettingsError
from pared.distill import Attention, Hint, Logits, Relations, Similarity, Teach, cka, match_layers
from pared.distill.adapters import Adapter, WithAdapters, resized
from pared.distill.pairs import Feature, listening
from pared.graph.rewritten import Rewritten
from pared.prune import Neurons, Random
from pared.recipe import dumps, loads
from pared.training import Journal, Objective, Task, Train


def net(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(18 * width, 3)),
    )


def toy_task(**settings: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 2, 6, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)) for _ in range(3)]
    return Task(batches, batches, batches, **settings)


# --- similarity and matching ---


def test_cka_is_that_of_numpy() -> None:
    """The estimator of Nguyen et al. 2021, equation 3, term by term."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 6))
    n, one = 9, np.ones(9)

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        inner = np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
        return float(inner / (n * (n - 3)))

    k, m = x @ x.T, y @ y.T
    assert cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))


def test_cka_doesn_t_see_rotation_scale_and_shift_and_is_small_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, width, generator=generator, dtype=torch.float64) for width in (8, 200))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert abs(cka(x, y)) < 0.1  # the biased estimate of so wide a layer would be large
    assert cka(x, torch.ones(64, 3)) == 0


def test_a_network_matches_itself() -> None:
    model, inputs = net(4), (torch.randn(64, 2, 6, 6),)
    flags = [module.training for module in model.modules()]
    pairs = match_layers(model, model, inputs)
    assert [pair.student for pair in pairs] == [pair.teacher for pair in pairs]
    assert len(pairs) == 3
    assert all(pair.similarity == pytest.approx(1) for pair in pairs)
    assert [module.training for module in model.modules()] == flags
    assert "7" not in {pair.student for pair in pairs}  # the outputs are compared anyway
    maps = match_layers(model, model, inputs, maps=True)
    assert "6" not in {pair.student for pair in maps}


def test_a_narrow_network_matches_the_blocks_of_a_wide_one() -> None:
    torch.manual_seed(0)
    teacher = resnet8(channels=2, size=8).eval()
    student = resnet8(channels=2, size=8).eval()
    task = Task(*[[(torch.randn(32, 2, 8, 8), torch.zeros(32, dtype=torch.long))]] * 3)
    student = Neurons(keep=0.6, round_to=1)(student, task)
    pairs = match_layers(teacher, student, (torch.randn(64, 2, 8, 8),), count=3, maps=True)
    order = [name for name, _ in teacher.named_modules()]
    assert len(pairs) == 3
    places = [order.index(pair.teacher) for pair in pairs]
    assert places == sorted(set(places))


def test_pairs_that_can_t_be() -> None:
    with pytest.raises(SettingsError, match="must be at least 4 samples"):
        match_layers(net(2), net(2), (torch.randn(3, 2, 6, 6),))
    with pytest.raises(SettingsError, match="must have inner layers of the same kind"):
        match_layers(nn.Linear(3, 2), nn.Linear(3, 2), (torch.randn(8, 3),))
    with pytest.raises(SettingsError, match="must have inner layers of the same kind"):
        match_layers(nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 2)), net(2), (torch.randn(8, 2, 6, 6),), maps=True)


def test_the_last_call_of_a_layer_and_the_first_tensor_count() -> None:
    lstm = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    with listening(nn.ModuleDict({"a": lstm}), ["a"]) as found:
        lstm(torch.zeros(2, 5, 3))
        expected = lstm(x)[0]
    assert torch.equal(found["a"], expected)
    assert not lstm._forward_hooks


# --- adapters ---


@pytest.mark.parametrize(
    ("student", "teacher", "parameters"),
    [
        ((8, 4), (8, 6), 30),
        ((8, 4), (8, 4), 0),
        ((8, 4, 5, 5), (8, 4, 9, 3), 0),
        ((8, 4, 3, 3), (8, 6, 7, 7), 30),
        ((8, 4, 7, 7), (8, 6), 30),
        ((8, 9, 4), (8, 9, 6), 30),  # tokens
        ((8, 4, 9), (8, 6, 12), 30),  # signals
        ((8, 4, 2, 2, 2), (8, 6, 3, 3, 3), 30),
    ],
)
def test_adapters_give_the_teachers_shape(student: tuple[int, ...], teacher: tuple[int, ...], parameters: int) -> None:
    adapter = Adapter(student, teacher)
    assert adapter(torch.randn(5, *student[1:])).shape == (5, *teacher[1:])
    assert sum(parameter.numel() for parameter in adapter.parameters()) == parameters


def test_no_adapter_makes_places_of_none() -> None:
    with pytest.raises(ModelError, match=r"no adapter leads from outputs of shape \(8, 4\) to \(8, 6, 7, 7\)"):
        Adapter((8, 4), (8, 6, 7, 7))


def test_maps_are_averaged_down_and_interpolated_up() -> None:
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resized(maps, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resized(maps, (8, 2)).shape == (1, 1, 8, 2)
    assert resized(maps, None) is maps


# --- the method ---


def spy(seen: dict[str, Any]) -> Any:
    def fit(model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
        assert objective is not None
        inputs, targets = task.train[0]  # type: ignore[index]
        model.eval()
        seen.setdefault("loss", []).append(objective(model, task.prepare(inputs), targets).item())
        seen["model"] = model

    return fit


def said(model: nn.Module, path: str, x: Tensor) -> Tensor:
    with listening(model, [path]) as found:
        model(x)
    return found[path]


@pytest.mark.parametrize("feature", [Hint({"5": "5"}), Attention({"5": "5"}), Similarity({"5": "5"}), Relations({"5": "5"})])
def test_the_loss_is_that_of_the_outputs_and_the_features(feature: Feature) -> None:
    teacher, student, seen = net(4).eval(), net(4, 1).eval(), {}
    task = toy_task(teacher=teacher, fit=spy(seen))
    Teach(weight=0.5, loss=Logits())(student, task)
    plain = seen["loss"].pop()
    Teach(weight=0.5, loss=Logits(), features=(feature,))(student, task)
    x = task.train[0][0]  # type: ignore[index]
    extra = feature.weight * feature(said(student, "5", x), said(teacher, "5", x)).item()
    assert seen["loss"] == [pytest.approx(plain + extra, rel=1e-4)]
    Teach(weight=1.0, features=(feature,))(teacher, task)
    assert seen["loss"][1] == pytest.approx(0, abs=1e-6)


def test_adapters_are_trained_along_and_aren_t_left_in_the_student() -> None:
    teacher, student, seen = net(8).eval(), net(3, 1), {}
    method = Teach(train=Train(epochs=2, learning_rate=0.01), features=(Hint({"2": "2", "5": "5"}),))
    Teach(features=method.features)(student, toy_task(teacher=teacher, fit=spy(seen)))
    whole = seen["model"]
    assert isinstance(whole, WithAdapters)
    assert [sum(parameter.numel() for parameter in adapter.parameters()) for adapter in whole.adapters] == [3 * 8 + 8, 6 * 16 + 16]
    tuned: list[WithAdapters] = []

    def fit(model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
        assert isinstance(model, WithAdapters)
        before = copy.deepcopy(model.adapters.state_dict())
        toy_task().fit(model, task, train, objective)
        assert all(not torch.equal(value, before[name]) for name, value in model.adapters.state_dict().items())
        tuned.append(model)

    taught = method(student, toy_task(teacher=teacher, fit=fit))
    assert len(tuned) == 1
    assert type(taught) is type(student)
    assert list(taught.state_dict()) == list(student.state_dict())
    assert not any(module._forward_hooks for module in [*taught.modules(), *teacher.modules(), *student.modules()])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_hints_bring_inner_layers_together() -> None:
    teacher, student = net(6).eval(), net(3, 1)
    method = Teach(weight=1.0, train=Train(epochs=40, learning_rate=0.01), features=(Hint({"5": "5"}, weight=10.0),))
    seen: list[float] = []
    task = toy_task(teacher=teacher, report=lambda event: seen.append(event["loss"]) if event["event"] == "epoch" else None)
    method(student, task)
    assert seen[-1] < 0.3 * seen[0]


def test_layers_are_found_where_none_are_named() -> None:
    teacher, student, seen = net(6).eval(), net(3, 1), {}
    Teach(features=(Hint(), Attention(), Similarity(), Relations()))(student, toy_task(teacher=teacher, fit=spy(seen)))
    assert len(seen["model"].adapters) == 3
    assert np.isfinite(seen["loss"][0])


def test_the_first_stage_trains_on_features_alone() -> None:
    teacher, student, seen = net(4).eval(), net(4, 1).eval(), {}
    feature = Hint({"2": "2"})
    Teach(features=(feature,), first=Train(epochs=1))(student, toy_task(teacher=teacher, fit=spy(seen)))
    x = toy_task().train[0][0]  # type: ignore[index]
    alone, both = seen["loss"]
    assert alone == pytest.approx(100 * feature(said(student, "2", x), said(teacher, "2", x)).item(), rel=1e-4)
    assert both > alone
    # the layers behind the hint have no gradient and stay
    taught = Teach(features=(feature,), first=Train(epochs=2), epochs=0)(student, toy_task(teacher=teacher))
    assert torch.equal(taught[7].weight, student[7].weight)
    assert not torch.equal(taught[0].weight, student[0].weight)


@pytest.mark.parametrize("own_class", [True, False])
def test_students_that_were_cut_learn_from_features(own_class: bool) -> None:
    few = data.load("digits")
    torch.manual_seed(0)
    teacher = resnet8(channels=1, size=8)
    some = [next(iter(few.train))]
    task = Task(some, some, some, teacher=teacher)
    cut = Neurons(keep=0.6, importance=Random(1), round_to=1, only=("stage3.0.conv1",) if own_class else ())(teacher, task)
    assert isinstance(cut, Rewritten) is not own_class
    features = (Hint({"stage2.0.bn2": "stage2.0.bn2"}), Attention(), Relations())
    taught = Teach(features=features, train=Train(epochs=1))(cut, task)
    assert list(taught.state_dict()) == list(cut.state_dict())
    assert not torch.equal(taught.get_parameter("stage1.0.conv1.weight"), cut.get_parameter("stage1.0.conv1.weight"))
    if not own_class:  # of a rewritten network only layers with weights are called
        with pytest.raises(SettingsError, match=r"must name layers that are called\. Got stage2\.0\. Those that are: conv1, bn1"):
            Teach(features=(Hint({"stage2.0": "stage2.0"}),))(cut, task)


def test_a_killed_training_with_adapters_goes_on(tmp_path: Any) -> None:
    teacher, student = net(6).eval(), net(3, 1)
    method = Teach(train=Train(epochs=3), features=(Hint({"5": "5"}),))

    def taught(journal: Journal | None, stop_at: int = 99) -> nn.Module:
        def report(event: dict[str, Any]) -> None:
            if event["event"] == "epoch" and event["epoch"] == stop_at:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        return method(student, toy_task(teacher=teacher, journal=journal, report=report))

    whole = taught(Journal(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        taught(Journal(tmp_path / "b"), stop_at=2)
    resumed = taught(Journal(tmp_path / "b"))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_mistakes_in_layers_are_named_together() -> None:
    task = toy_task(teacher=net(4))
    with pytest.raises(SettingsError) as error:
        Teach(features=(Hint({"2": "there"}), Attention({"here": "2"})))(net(4), task)
    assert list(error.value.problems) == [
        "distill.teach: features must be layers with the path of a module of the student. Got 'here'.",
        "distill.teach: features must be layers with the path of a module of the teacher. Got 'there'.",
    ]
    with pytest.raises(ModelError, match=r"7 and 7 must have places to be compared by them"):
        Teach(features=(Attention({"7": "7"}),))(net(4), task)
    with pytest.raises(SettingsError) as error:
        Teach(loss=Logits, features=Hint(), train=Train(teach=0.5))  # type: ignore[arg-type]
    assert [problem.split(" must be ")[0] for problem in error.value.problems] == [
        f"distill.teach: {field}" for field in ("loss", "features", "train")
    ]
    with pytest.raises(SettingsError, match=r"first must be None where there are no features"):
        Teach(first=Train(epochs=1))


def test_features_stand_in_recipe_files() -> None:
    recipe = loads("""
steps:
  - distill.teach:
      loss: {decoupled: {others: 4}}
      features: [hint, {attention: {layers: {"0.conv": "2.conv"}, weight: 500}}]
      first: 2ep
      epochs: 3
""")
    method = Teach(loss=recipe.steps[0].loss, features=(Hint(), Attention({"0.conv": "2.conv"}, 500.0)), first=Train(epochs=2), epochs=3)  # type: ignore[attr-defined]
    assert recipe.steps == (method,)
    assert method.loss.others == 4  # type: ignore[union-attr]
    assert loads(dumps(recipe)) == recipe
