"""The training loop, its checks, and evaluation."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pared.core.errors import DataError, ModelError, SettingsError, TrainingError, WeightsError
from pared.core.rules import Mask, add_rule
from pared.training import Machine, Task, Train, evaluate, evaluating, fit
from pared.training.teaching import taught_by

CPU = Machine(accelerator="cpu")


def batches(count: int = 4, size: int = 8, features: int = 5, classes: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(features, classes, generator=generator)
    inputs = torch.randn(count, size, features, generator=generator)
    return [(part, (part @ teacher).argmax(1)) for part in inputs]


def task(**changes: Any) -> Task:
    data = batches()
    return Task(**{"train": data, "valid": data, "test": data, "machine": CPU, **changes})


def test_one_sgd_step_is_what_numpy_says() -> None:
    inputs, targets = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([0, 1])
    model = nn.Linear(2, 2)
    weight, bias = model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()
    data = [(inputs, targets)]
    plan = Train(epochs=1, optimizer="sgd", learning_rate=0.5, momentum=0.9, weight_decay=0.1, schedule="constant")
    fit(model, task(train=data, valid=data, test=data), plan)
    scores = inputs.numpy() @ weight.T + bias
    probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    slope = (probability - np.eye(2)[targets.numpy()]) / 2
    weight_slope = slope.T @ inputs.numpy() + 0.1 * weight  # the bias is not decayed
    # Nesterov's first step goes (1 + momentum) as far
    np.testing.assert_allclose(model.weight.detach().numpy(), weight - 0.5 * 1.9 * weight_slope, atol=1e-6)
    np.testing.assert_allclose(model.bias.detach().numpy(), bias - 0.5 * 1.9 * slope.sum(0), atol=1e-6)


def test_many_steps_are_what_numpy_says() -> None:
    data = batches(3)
    model = nn.Linear(5, 3)
    model.weight.grad = torch.full((3, 5), 7.0)  # what another loop left behind must not count
    weights = [model.weight.detach().numpy().astype(np.float64), model.bias.detach().numpy().astype(np.float64)]
    speed = [np.zeros((3, 5)), np.zeros(3)]
    plan = Train(epochs=2, optimizer="sgd", learning_rate=0.5, momentum=0.8, weight_decay=0.01, warmup=1 / 3, schedule="linear")
    fit(model, task(train=data), plan)
    for step, (inputs, targets) in enumerate(data * 2):
        rate = 0.5 * (1.0 if step == 0 else 1 - (step - 1) / 5)
        scores = inputs.numpy() @ weights[0].T + weights[1]
        probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        slope = (probability - np.eye(3)[targets.numpy()]) / 8
        slopes = [slope.T @ inputs.numpy() + 0.01 * weights[0], slope.sum(0)]
        for number in (0, 1):
            speed[number] = 0.8 * speed[number] + slopes[number]
            weights[number] = weights[number] - rate * (slopes[number] + 0.8 * speed[number])
    np.testing.assert_allclose(model.weight.detach().numpy(), weights[0], atol=1e-5)
    np.testing.assert_allclose(model.bias.detach().numpy(), weights[1], atol=1e-5)


def test_it_learns_and_ends_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    before = evaluate(model, task())
    fit(model, task(), Train(epochs=20, learning_rate=0.05))
    assert evaluate(model, task()) > max(0.9, before)
    assert not any(module.training for module in model.modules())


def test_nothing_of_the_loop_stays_on_the_model() -> None:
    model = nn.Linear(5, 3)
    attributes = set(vars(model))
    fit(model, task(), Train(epochs=1))
    assert set(vars(model)) == attributes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert model.weight.grad is None
    assert list(model.state_dict()) == ["weight", "bias"]


def test_frozen_parameters_stay_and_masked_weights_stay_zero() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    keep = torch.zeros(3, 4, dtype=torch.bool)
    keep[:, 0] = True
    add_rule(model[1], "weight", Mask(keep))
    before = model[1].weight.detach().clone()
    fit(model, task(), Train(epochs=2, optimizer="adamw", weight_decay=0.1))
    assert all(torch.equal(frozen[name], value) for name, value in model[0].state_dict().items())
    assert torch.equal(model[1].weight[:, 1:], torch.zeros(3, 3))
    assert not torch.equal(model[1].weight[:, 0], before[:, 0])


def test_train_called_on_a_model_trains_a_copy_with_the_tasks_fit() -> None:
    calls: list[tuple[int, bool]] = []

    def own(model: nn.Module, task: Task, train: Train, objective: Any = None) -> None:
        calls.append((train.epochs, objective is None))
        nn.init.zeros_(model.weight)  # type: ignore[arg-type]

    model = nn.Linear(5, 3)
    before = copy.deepcopy(model.state_dict())
    trained = Train(epochs=3)(model, task(fit=own))
    assert calls == [(3, True)]
    assert trained.weight.abs().sum() == 0  # type: ignore[operator]
    assert torch.equal(model.weight, before["weight"])


def test_objective_gets_the_model_and_prepared_inputs() -> None:
    model = nn.Linear(5, 3)
    seen: list[Any] = []

    class Double(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * inputs

    def objective(given: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        seen.append((given is model, given.training, inputs[0]))
        return given(*inputs).square().mean()

    work = task(normalize=Double(), augment=lambda inputs, generator: inputs + 1)
    fit(model, work, Train(epochs=1), objective)
    assert all(same and training for same, training, _ in seen)
    assert torch.equal(seen[0][2], 2 * (batches()[0][0] + 1))
    fit(model, work, Train(epochs=1, augment=False), objective)
    assert torch.equal(seen[4][2], 2 * batches()[0][0])


def test_events() -> None:
    events: list[dict[str, Any]] = []
    fit(nn.Linear(5, 3), task(report=events.append), Train(epochs=2))
    assert [event["event"] for event in events] == [*["batch"] * 4, "epoch", *["batch"] * 4, "epoch"]
    assert [(event["epoch"], event["done"], event["total"]) for event in events[5:9]] == [(2, done, 4) for done in (1, 2, 3, 4)]
    assert events[4]["loss"] == pytest.approx(events[3]["loss"])
    assert events[4]["metric"] == "accuracy"
    assert 0 <= events[4]["value"] <= 1


def test_early_stop_keeps_the_best_weights() -> None:
    values = iter([0.5, 0.7, 0.6, 0.7, 0.1])
    snapshots: list[Tensor] = []
    model = nn.Linear(5, 3)

    @dataclasses.dataclass(frozen=True)
    class Scripted:
        name: str = "scripted"
        higher_is_better: bool = True

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            if not snapshots or not torch.equal(snapshots[-1], model.weight):
                snapshots.append(model.weight.detach().clone())
                self.current.append(next(values))  # type: ignore[attr-defined]
            return torch.full(targets.shape, self.current[-1])  # type: ignore[attr-defined]

    metric = Scripted()
    object.__setattr__(metric, "current", [])
    fit(model, task(metric=metric), Train(epochs=50, early_stop=2))
    assert len(snapshots) == 4  # 0.7 a second time is no improvement
    assert torch.equal(model.weight, snapshots[1])


def test_a_lower_is_better_metric_stops_the_other_way() -> None:
    @dataclasses.dataclass(frozen=True)
    class Loss:
        name: str = "loss"
        higher_is_better: bool = False

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs, targets, reduction="none")

    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    events: list[dict[str, Any]] = []
    fit(model, task(metric=Loss(), report=events.append), Train(epochs=12, early_stop=3, learning_rate=0.05))
    epochs = [event["value"] for event in events if event["event"] == "epoch"]
    assert len(epochs) == 12
    assert evaluate(model, task(metric=Loss())) == pytest.approx(min(epochs))


def test_zero_epochs_change_nothing() -> None:
    model = nn.Linear(5, 3).train()
    before = copy.deepcopy(model.state_dict())
    fit(model, task(), Train(epochs=0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training


def test_label_smoothing_is_that_of_torch() -> None:
    losses: list[float] = []
    model = nn.Linear(5, 3)
    inputs, targets = batches()[0]
    expected = nn.functional.cross_entropy(model(inputs), targets, label_smoothing=0.2).item()
    data = [(inputs, targets)]
    work = task(train=data, report=lambda event: losses.append(event["loss"]))
    fit(model, work, Train(epochs=1, label_smoothing=0.2))
    assert losses[0] == pytest.approx(expected)
    with pytest.raises(SettingsError, match="label_smoothing must be 0 where the task has a loss of its own"):
        fit(model, task(loss=lambda outputs, targets: outputs.sum()), Train(epochs=1, label_smoothing=0.2))
    with pytest.raises(SettingsError, match="label_smoothing must be 0 where a method brings its own loss"):
        fit(model, task(), Train(epochs=1, label_smoothing=0.2), lambda model, inputs, targets: model(*inputs).sum())


def test_a_loss_that_is_not_finite_names_epoch_and_batch() -> None:
    data = batches()
    data[2] = (torch.full((8, 5), float("inf")), data[2][1])
    with pytest.raises(TrainingError, match=r"epoch 1, batch 3: the loss is nan\. Lower the learning rate"):
        fit(nn.Linear(5, 3), task(train=data), Train(epochs=1))
    with pytest.raises(TrainingError, match=r"the loss must be one number\. Got a tensor of shape \(8, 3\)"):
        fit(nn.Linear(5, 3), task(), Train(epochs=1), lambda model, inputs, targets: model(*inputs))


def test_bad_models_are_refused() -> None:
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="NaN or infinity in weight"):
        fit(model, task(), Train(epochs=1))
    with pytest.raises(TrainingError, match="every parameter of the model is frozen"):
        fit(nn.Linear(5, 3).requires_grad_(False), task(), Train(epochs=1))
    with pytest.raises(ModelError, match=r"the model fails on inputs of shape \(8, 5\)"):
        fit(nn.Linear(6, 3), task(), Train(epochs=1))
    with pytest.raises(ModelError, match=r"the model fails on inputs of shape \(8, 5\)"):
        evaluate(nn.Linear(6, 3), task())


@pytest.mark.parametrize("objective", [None, lambda model, inputs, targets: nn.functional.cross_entropy(model(*inputs), targets)])
def test_labels_without_an_output(objective: Any) -> None:
    with pytest.raises(DataError, match="train split"):
        fit(nn.Linear(5, 2), task(), Train(epochs=1), objective)


def test_label_messages_name_label_and_classes() -> None:
    with pytest.raises(DataError, match="label 2 in the valid split: the model has 2 outputs, so labels must be 0 to 1"):
        evaluate(nn.Linear(5, 2), task())
    inputs, targets = batches()[0]
    with pytest.raises(DataError, match="label -1 in the train split"):
        fit(nn.Linear(5, 3), task(train=[(inputs, torch.full_like(targets, -1))]), Train(epochs=1))
    ignored = torch.where(torch.arange(8) < 4, targets, -100)
    fit(nn.Linear(5, 3), task(train=[(inputs, ignored)]), Train(epochs=1))


def test_evaluate_weighs_samples_not_batches_and_restores_modes() -> None:
    inputs = torch.eye(3)
    data = [(inputs, torch.tensor([0, 1, 2])), (inputs[:1], torch.tensor([1]))]
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    model[1].eval()
    assert evaluate(model, task(valid=data)) == 0.75
    assert model.training
    assert not model[1].training


def test_evaluating_restores_modes_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1))
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training
    assert model[0].training
    assert not model[1].training


def test_data_loaders_and_tuples_of_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.linear(first + second)

    inputs, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=10, shuffle=True)
    fit(nn.Linear(5, 3), task(train=loader), Train(epochs=2))
    pairs = [((part, part), target) for part, target in batches()]
    work = task(train=pairs, valid=pairs, test=[([part, part], target) for part, target in batches()])
    model = Sum()
    fit(model, work, Train(epochs=1))
    assert [part.shape for part in work.example_inputs()] == [(2, 5), (2, 5)]
    assert evaluate(model, work, "test") == evaluate(model, work, "valid")


def test_examples_span_batches_and_start_over() -> None:
    data = [(torch.tensor([[1.0], [2.0]]), torch.zeros(2)), (torch.tensor([[3.0]]), torch.zeros(1))]
    work = task(valid=data)
    assert work.example_inputs(3)[0].flatten().tolist() == [1, 2, 3]
    assert work.example_inputs(5)[0].flatten().tolist() == [1, 2, 3, 1, 2]


def test_tasks_that_cannot_be() -> None:
    data = batches()
    with pytest.raises(DataError, match=r"the valid split is empty\.\nthe test split can be read only once"):
        Task(data, [], iter(data))
    with pytest.raises(DataError, match="the train split must be something to iterate over"):
        Task(3, data, data)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="task: metric must be an object with name and higher_is_better") as caught:
        Task(data, data, data, loss=3, metric=lambda outputs, targets: outputs)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match="the train split must give pairs"):
        fit(nn.Linear(5, 3), task(train=[(torch.zeros(3),) * 3]), Train(epochs=1))
    with pytest.raises(DataError, match=r"the valid split must give inputs that are tensors\. Got ndarray"):
        evaluate(nn.Linear(5, 3), task(valid=[(np.zeros((2, 5)), torch.zeros(2))]))


def test_lengths_that_lie_are_noticed() -> None:
    class Short(list[Any]):
        def __len__(self) -> int:
            return 9

    with pytest.raises(DataError, match="gave 4 batches in epoch 1, but its length is 9"):
        fit(nn.Linear(5, 3), task(train=Short(batches())), Train(epochs=1))


def test_mixed_precision_leaves_weights_in_32_bits() -> None:
    model = nn.Linear(5, 3)
    seen: list[torch.dtype] = []

    def objective(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        outputs = model(*inputs)
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs.float(), targets)

    fit(model, task(machine=Machine(accelerator="cpu", precision="bf16-mixed")), Train(epochs=1), objective)
    assert set(seen) == {torch.bfloat16}
    assert model.weight.dtype == torch.float32


TWO_PROCESSES = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from pared.data import Batches
from pared.training import Journal, Machine, Task, Train, evaluate, fit

torch.manual_seed(0)
inputs = torch.randn(40, 4)
targets = (inputs[:, 0] > 0).long()
whole = [(inputs, targets)]
seen = []
kind, out = sys.argv[1:]
if kind == "loader":
    train = DataLoader(TensorDataset(inputs, targets), batch_size=5, shuffle=True)
else:
    train = Batches(inputs, targets, 5, shuffle=True)
valid = Batches(inputs, targets, 7)
machine = Machine(accelerator="cpu", devices=2, strategy="ddp")
task = Task(train, valid, valid, machine=machine, journal=Journal(out))
model = nn.Linear(4, 2)
def objective(model, inputs, targets):
    seen.append(inputs[0])
    return task.loss(model(*inputs), targets)
fit(model, task, Train(epochs=2, learning_rate=0.05), objective)
value = evaluate(model, task)
alone = (model(inputs).argmax(1) == targets).double().mean().item()
assert abs(value - alone) < 1e-9, (value, alone)
rows = torch.cat(seen[: len(seen) // 2])
gathered = [torch.empty_like(rows) for _ in range(2)]
torch.distributed.all_gather(gathered, rows)
assert len({tuple(row.tolist()) for part in gathered for row in part}) == 40, "every sample once an epoch"
weights = [torch.empty_like(model.weight) for _ in range(2)]
torch.distributed.all_gather(weights, model.weight.detach())
assert torch.equal(*weights)
print("fine")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loader", "batches"])
def test_two_processes_share_the_data_and_agree(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, str(script), kind, str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("fine") == 2
    assert (tmp_path / "out" / "fit-1" / "checkpoint.pt").exists()


def test_a_plan_with_a_teacher_is_distillation() -> None:
    seen: dict[str, list[float]] = {"plan": [], "method": []}
    teacher, start = nn.Linear(5, 3), nn.Linear(5, 3)
    for name, plan in (("plan", Train(epochs=2, teach=0.7, temperature=2.0)), ("method", Train(epochs=2))):
        work = task(teacher=teacher, report=lambda event, name=name: seen[name].append(event["loss"]))
        objective = None if name == "plan" else taught_by(teacher, work, 2.0, 0.7)
        fit(copy.deepcopy(start), work, plan, objective)
    assert seen["plan"] == seen["method"] != []
    with pytest.raises(SettingsError, match="teach must be 0 where there is no teacher"):
        fit(start, task(), Train(epochs=1, teach=0.5))
    with pytest.raises(SettingsError, match="teach must be 0 where a method brings its own loss"):
        fit(start, task(teacher=teacher), Train(epochs=1, teach=0.5), lambda model, inputs, targets: model(*inputs).sum())
