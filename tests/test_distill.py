"""Soft targets, the distillation loss, and a teacher that stays as it is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pared.core.errors import ModelError, SettingsError
from pared.core.rules import Mask, add_rule, bake
from pared.distill import Teach, distillation_loss, soft_targets
from pared.dynamic import EarlyExit
from pared.prune import Weights
from pared.training import Task, Train


def numpy_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def toy_task(**settings) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(2)]
    return Task(batches, batches, batches, **settings)


def small_net(seed: int = 0, dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 3))


# --- the functions ---


def test_soft_targets_are_the_lectures():
    logits = torch.tensor([100.0, 10.0, 1.0])
    assert soft_targets(logits, 100).numpy() == pytest.approx([0.562, 0.229, 0.209], abs=5e-4)
    assert soft_targets(logits, 1).numpy() == pytest.approx([1, 0, 0], abs=1e-6)
    assert soft_targets(logits[None], 100).numpy() == pytest.approx(numpy_softmax(logits[None].numpy(), 100), abs=1e-6)


def test_loss_and_gradient_equal_numpy():
    rng = np.random.default_rng(0)
    student, teacher, t = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), 3.0
    p, q = numpy_softmax(teacher, t), numpy_softmax(student, t)
    z = torch.tensor(student, requires_grad=True)
    loss = distillation_loss(z, torch.tensor(teacher), t)
    loss.backward()
    assert loss.item() == pytest.approx(t**2 * (p * np.log(p / q)).sum() / 5)
    assert z.grad is not None
    assert z.grad.numpy() == pytest.approx(t * (q - p) / 5)


def test_equal_logits_cost_nothing():
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = distillation_loss(z, z.detach().clone(), 7.0)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-6


def test_high_temperature_is_logit_regression():
    """Section 2.1: for T far above zero-mean logits the gradient is (student - teacher) / classes."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    teacher = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    student, teacher = (student - student.mean(1, keepdim=True)).requires_grad_(), teacher - teacher.mean(1, keepdim=True)
    distillation_loss(student, teacher, 1e3).backward()
    assert student.grad is not None
    expected = (student.detach() - teacher) / 5 / 3
    assert (student.grad - expected).norm() < 0.01 * expected.norm()


def test_gradient_keeps_its_size_over_temperatures():
    z, teacher = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True), torch.tensor([[0.0, 0.5, -0.5]])
    norms = [torch.autograd.grad(distillation_loss(z, teacher, t), z)[0].norm().item() for t in (5.0, 50.0)]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_loss_of_images_averages_over_places():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    rows = [each.permute(0, 2, 3, 1).reshape(-1, 3) for each in (student, teacher)]
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(distillation_loss(*rows, 2.0).item(), rel=1e-5)


def test_half_precision_is_computed_in_32_bits():
    loss = distillation_loss(
        torch.tensor([[300.0, -300.0]], dtype=torch.float16), torch.tensor([[-300.0, 300.0]], dtype=torch.float16), 1.0
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(600, rel=1e-3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)


def test_no_gradient_reaches_the_teacher():
    teacher = torch.zeros(2, 3, requires_grad=True)
    distillation_loss(torch.ones(2, 3, requires_grad=True), teacher, 1.0).backward()
    assert teacher.grad is None


# --- the method ---


class Counting(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        Counting.calls += 1
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.net(x)


def test_teacher_answers_each_batch_once_and_stays_as_it_is():
    teacher = Counting().train()
    before = copy.deepcopy(teacher.state_dict())
    Counting.calls = 0
    Teach(epochs=3)(small_net(1), toy_task(teacher=teacher))
    assert Counting.calls == 2  # the answers to data that don't change are kept
    Teach(epochs=3)(small_net(1), toy_task(teacher=teacher, augment=lambda inputs, generator: inputs))
    assert Counting.calls == 2 + 3 * 2
    assert all(module.training for module in teacher.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_student_comes_closer_to_its_teacher():
    teacher, student = small_net(0, 0.0).eval(), small_net(1, 0.0).eval()
    task = toy_task(teacher=teacher)
    taught = Teach(weight=1.0, train=Train(epochs=60, learning_rate=0.02))(student, task).eval()
    x = torch.cat([inputs for inputs, _ in task.train])
    far, near = (distillation_loss(each(x), teacher(x), 4.0).item() for each in (student, taught))
    assert near < 0.2 * far


def objective_value(method: Teach, task: Task, student: nn.Module) -> tuple[float, torch.Tensor, torch.Tensor]:
    found = {}

    def fit(model, task, train, objective=None):
        inputs, targets = task.train[0]
        model.eval() if not isinstance(model, EarlyExit) else model.train()
        found["loss"] = objective(model, task.prepare(inputs), targets).item()

    method(student, Task(task.train, task.valid, task.test, fit=fit, teacher=task.teacher))
    return found["loss"], *task.train[0]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_objective_is_the_papers(weight):
    teacher, student = small_net(0).eval(), small_net(1).eval()
    loss, x, y = objective_value(Teach(temperature=2.0, weight=weight), toy_task(teacher=teacher), student)
    hard = nn.functional.cross_entropy(student(x), y).item()
    soft = distillation_loss(student(x), teacher(x), 2.0).item()
    assert loss == pytest.approx((1 - weight) * hard + weight * soft, rel=1e-5)


def test_with_all_weight_on_the_teacher_no_label_is_needed():
    batches = [(torch.randn(8, 4), torch.full((8,), 99))]
    Teach(weight=1.0, epochs=0)(small_net(1), Task(batches, batches, batches, teacher=small_net()))
    loss, *_ = objective_value(Teach(weight=1.0), Task(batches, batches, batches, teacher=small_net().eval()), small_net(1))
    assert np.isfinite(loss)


def test_each_exit_is_taught_and_the_mean_taken():
    teacher = small_net(0).eval()
    torch.manual_seed(3)
    student = EarlyExit([nn.Linear(4, 6), nn.Linear(6, 3)], [nn.Linear(6, 3), nn.Identity()])
    loss, x, y = objective_value(Teach(temperature=2.0, weight=0.5), toy_task(teacher=teacher), student)
    each = [0.5 * nn.functional.cross_entropy(z, y) + 0.5 * distillation_loss(z, teacher(x), 2.0) for z in student.all_logits(x)]
    assert loss == pytest.approx(sum(each).item() / 2, rel=1e-5)  # type: ignore[union-attr]
    taught = Teach(epochs=1)(student, toy_task(teacher=teacher))
    assert not torch.equal(taught.heads[0].weight, student.heads[0].weight)


def test_masks_of_the_student_hold():
    student = small_net(1)
    keep = torch.zeros(6, 4, dtype=torch.bool)
    keep[::2] = True
    add_rule(student[0], "weight", Mask(keep))
    taught = Teach(epochs=1)(student, toy_task(teacher=small_net()))
    assert torch.equal(bake(taught)[0].weight != 0, keep)


def test_epochs_is_short_for_a_plan():
    assert Teach(epochs=3) == Teach(train=Train(epochs=3)) == Teach(train="3ep")  # type: ignore[arg-type]
    assert Teach(epochs=2, train=Train(learning_rate=0.1)).train == Train(epochs=2, learning_rate=0.1)


def test_mistakes_are_named():
    with pytest.raises(SettingsError, match="there is no teacher"):
        Teach()(small_net(), toy_task())
    with pytest.raises(SettingsError) as error:
        Teach(temperature=0, weight=2, epochs=-1)
    assert [problem.split(" must be ")[0] for problem in error.value.problems] == [
        f"distill.teach: {field}" for field in ("temperature", "weight", "epochs")
    ]
    with pytest.raises(ModelError, match=r"teacher answers in shape \(8, 2\), the student in \(8, 3\)"):
        Teach(epochs=1)(small_net(), toy_task(teacher=nn.Linear(4, 2)))


def test_a_method_that_trains_is_taught_by_its_plan() -> None:
    start, work = small_net(dropout=0.0), toy_task(teacher=small_net(1, 0.0))
    labels, teacher = (Weights(keep=0.5, tune=Train(epochs=3, teach=share))(start, work) for share in (0.0, 1.0))
    inputs = torch.randn(200, 4)
    wanted = work.teacher(inputs).softmax(1)  # type: ignore[misc]
    near, far = ((model(inputs).softmax(1) - wanted).abs().mean() for model in (teacher, labels))
    assert near < far
