"""Every loss against an independent numpy twin, value and gradient, and the facts that hold exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pared.core.errors import DataError, SettingsError
from pared.distill import (
    Attention,
    Decoupled,
    Direction,
    Dist,
    Hint,
    Logits,
    Relations,
    Similarity,
    angle_loss,
    attention_loss,
    decoupled_losses,
    direction_loss,
    distance_loss,
    distillation_loss,
    hint_loss,
    logit_loss,
    pearson_distance,
    similarity_loss,
)

LABELS = np.array([0, 3, 1, 2, 2])
T = 3.0


# --- the twins ---


def softmax(z: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(z - z.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def np_logits(s: np.ndarray, t: np.ndarray) -> float:
    return sum(0.5 * np.linalg.norm(a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def np_parts(s: np.ndarray, t: np.ndarray) -> tuple[list[float], list[float]]:
    target, others = [], []
    for a, b, label in zip(s / T, t / T, LABELS, strict=True):
        q, p = softmax(a), softmax(b)
        target.append(T**2 * (p[label] * math.log(p[label] / q[label]) + (1 - p[label]) * math.log((1 - p[label]) / (1 - q[label]))))
        q, p = softmax(np.delete(a, label)), softmax(np.delete(b, label))
        others.append(T**2 * float((p * np.log(p / q)).sum()))
    return target, others


def np_decoupled(s: np.ndarray, t: np.ndarray) -> float:
    target, others = np_parts(s, t)
    return float(np.mean(target) + 2 * np.mean(others))


def np_dist(s: np.ndarray, t: np.ndarray) -> float:
    q, p = softmax(s / T), softmax(t / T)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return float(inter + 3 * intra)


def np_direction(s: np.ndarray, t: np.ndarray) -> float:
    return float(np.mean([1 - a @ b / math.sqrt(a @ a) / math.sqrt(b @ b) for a, b in zip(s, t, strict=True)]))


def np_hint(s: np.ndarray, t: np.ndarray) -> float:
    return float(((s - t) ** 2).sum() / 2 / s.size)


def np_attention(s: np.ndarray, t: np.ndarray) -> float:
    q, p = (np.einsum("bc...,bc...->b...", x, x).reshape(len(x), -1) for x in (s, t))
    q, p = (x / np.linalg.norm(x, axis=1)[:, None] for x in (q, p))
    return float(((q - p) ** 2).mean() / 2)


def np_similarity(s: np.ndarray, t: np.ndarray) -> float:
    grams = []
    for x in (s, t):
        gram = np.array([[a.ravel() @ b.ravel() for b in x] for a in x])
        grams.append(gram / np.sqrt((gram**2).sum(1))[:, None])
    return float(((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def np_distance(s: np.ndarray, t: np.ndarray) -> float:
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]
    d = [np.array([np.linalg.norm((x[i] - x[j]).ravel()) for i, j in pairs]) for x in (s, t)]
    return float(np.mean([huber(a - b) for a, b in zip(d[0] / d[0].mean(), d[1] / d[1].mean(), strict=True)]))


def np_angle(s: np.ndarray, t: np.ndarray) -> float:
    found = []
    for i in range(len(s)):
        for j in range(len(s)):
            for k in range(len(s)):
                if len({i, j, k}) == 3:
                    cosines = []
                    for x in (s, t):
                        a, b = (x[i] - x[j]).ravel(), (x[k] - x[j]).ravel()
                        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
                    found.append(huber(cosines[0] - cosines[1]))
    return float(np.mean(found))


Loss = Callable[[Tensor, Tensor], Tensor]
labels = torch.from_numpy(LABELS)
TWINS: dict[str, tuple[Loss, Callable[[np.ndarray, np.ndarray], float], tuple[int, ...], tuple[int, ...]]] = {
    "logits": (lambda s, t: Logits()(s, t, None, T), np_logits, (5, 4), (5, 4)),
    "decoupled": (lambda s, t: Decoupled(others=2.0)(s, t, labels, T), np_decoupled, (5, 4), (5, 4)),
    "dist": (lambda s, t: Dist(inter=1.0, intra=3.0)(s, t, None, T), np_dist, (5, 4), (5, 4)),
    "direction": (lambda s, t: Direction()(s, t, None, T), np_direction, (5, 4), (5, 4)),
    "hint": (Hint(), np_hint, (5, 3, 2, 2), (5, 3, 2, 2)),
    "attention": (Attention(), np_attention, (5, 3, 4, 4), (5, 2, 4, 4)),
    "similarity": (Similarity(), np_similarity, (5, 3, 2), (5, 7)),
    "distance": (distance_loss, np_distance, (5, 3, 2), (5, 7)),
    "angle": (angle_loss, np_angle, (5, 6), (5, 4)),
    "relations": (Relations(), lambda s, t: 25 * np_distance(s, t) + 50 * np_angle(s, t), (4, 3), (4, 6)),
}
SOFT: Loss = lambda s, t: distillation_loss(s, t, T)  # noqa: E731
ALL: dict[str, tuple[Loss, tuple[int, ...]]] = {name: (loss, shape) for name, (loss, _, shape, _) in TWINS.items()} | {
    "soft": (SOFT, (5, 4))
}


def numeric_gradient(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    found = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        found[at] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return found


@pytest.mark.parametrize("name", TWINS)
def test_value_and_gradient_are_those_of_numpy(name: str) -> None:
    loss, twin, ours, theirs = TWINS[name]
    rng = np.random.default_rng(0)
    student, teacher = 2 * rng.normal(size=ours), 2 * rng.normal(size=theirs)
    leaf = torch.tensor(student, requires_grad=True)
    value = loss(leaf, torch.tensor(teacher))
    value.backward()
    assert value.item() == pytest.approx(twin(student, teacher), rel=1e-9)
    assert leaf.grad is not None
    assert leaf.grad.numpy() == pytest.approx(numeric_gradient(lambda x: twin(x, teacher), student), rel=1e-5, abs=1e-7)


# --- exact facts ---


@pytest.mark.parametrize("name", ALL)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(name: str) -> None:
    loss, shape = ALL[name]
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = loss(z, z.detach().clone())
    value.backward()
    assert value.item() == 0
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    loss, shape = ALL[name]
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("same", ["student", "teacher", "both", "two samples"])
def test_nothing_is_nan_where_there_is_no_distance_and_no_variance(name: str, same: str) -> None:
    loss, shape = ALL[name]
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if same == "two samples":
        student[1] = student[0]
        teacher[3] = teacher[2]
    for who, each in (("student", student), ("teacher", teacher)):
        if same in (who, "both"):
            each.zero_()
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert student.grad is not None
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("name", [name for name in ALL if name != "decoupled"])  # which has five labels
@pytest.mark.parametrize("samples", [1, 2])
def test_small_batches_have_a_loss(name: str, samples: int) -> None:
    loss, shape = ALL[name]
    student = torch.randn(samples, *shape[1:], requires_grad=True)
    loss(student, torch.randn(samples, *shape[1:])).backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("name", [name for name in ALL if name != "soft"])
def test_half_precision_is_computed_in_32_bits(name: str) -> None:
    loss, shape = ALL[name]
    assert loss(torch.randn(shape).half(), torch.randn(shape).half()).dtype == torch.float32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_classes_are_the_target_and_the_others() -> None:
    student, teacher = 3 * random(6, 7), 3 * random(6, 7, seed=1)
    targets = torch.tensor([0, 6, 3, 3, 1, 5])
    target, others = decoupled_losses(student, teacher, targets, T)
    right = (teacher / T).softmax(1).gather(1, targets[:, None])[:, 0]
    assert distillation_loss(student, teacher, T).item() == pytest.approx((target + (1 - right) * others).mean().item(), rel=1e-12)


def test_the_right_class_is_the_labels() -> None:
    student, teacher = random(4, 5), random(4, 5, seed=1)
    targets = (student.argmax(1) + 1) % 5
    by_label = Decoupled()(student, teacher, targets, T).item()
    assert by_label != pytest.approx(Decoupled()(student, teacher, student.argmax(1), T).item())
    target, _ = decoupled_losses(student, teacher, targets, T)
    q, p = ((z / T).softmax(1).gather(1, targets[:, None])[:, 0] for z in (student, teacher))
    expected = T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    assert target.numpy() == pytest.approx(expected.numpy())


def test_decoupled_takes_maps_and_passes_over_ignored_labels() -> None:
    student, teacher = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    targets = torch.randint(0, 4, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    rows = [z.permute(0, 2, 3, 1).reshape(-1, 4) for z in (student, teacher)]
    assert Decoupled()(student, teacher, targets, T).item() == pytest.approx(Decoupled()(*rows, targets.flatten(), T).item())
    targets[0] = -100
    assert Decoupled()(student, teacher, targets, T).item() == pytest.approx(Decoupled()(student[1:], teacher[1:], targets[1:], T).item())
    assert Decoupled()(student, teacher, torch.full_like(targets, -100), T).item() == 0
    with pytest.raises(DataError, match=r"label 9 in the train split"):
        Decoupled()(student, teacher, targets * 0 + 9, T)
    with pytest.raises(DataError, match=r"no labels, which distill\.decoupled needs"):
        Decoupled()(student, teacher, None, T)


def test_of_two_classes_there_are_no_others_to_tell_apart() -> None:
    assert decoupled_losses(random(3, 2), random(3, 2, seed=1), torch.tensor([0, 1, 0]), T)[1].abs().max() == 0


def test_correlations_don_t_see_positive_affine_maps() -> None:
    student, teacher = random(6, 5), random(6, 5, seed=1)
    scale, shift = random(6, 1, seed=2).exp(), random(6, 1, seed=3)
    plain = pearson_distance(student, teacher).numpy()
    assert pearson_distance(scale * student + shift, teacher).numpy() == pytest.approx(plain, rel=1e-9)
    assert pearson_distance(student, scale * teacher + shift).numpy() == pytest.approx(plain, rel=1e-9)
    # the term over the batch: columns instead of rows
    scale, shift = random(1, 5, seed=2).exp(), random(1, 5, seed=3)
    columns = pearson_distance(student.T, teacher.T).numpy()
    assert pearson_distance((scale * student + shift).T, teacher.T).numpy() == pytest.approx(columns, rel=1e-9)
    assert pearson_distance(-student, teacher).numpy() == pytest.approx(2 - plain)


def test_relations_don_t_see_rotation_translation_and_scale() -> None:
    student, teacher = random(6, 4), random(6, 5, seed=1)
    rotation = torch.linalg.qr(random(4, 4, seed=2)).Q
    moved = 7 * student @ rotation + random(1, 4, seed=3)
    for loss in (distance_loss, angle_loss):
        assert loss(moved, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)
        assert loss(moved, student).item() == pytest.approx(0, abs=1e-12)


def test_attention_doesn_t_see_the_order_of_channels_and_a_factor() -> None:
    student, teacher = random(3, 6, 4, 4), random(3, 2, 4, 4, seed=1)
    plain = attention_loss(student, teacher).item()
    assert attention_loss(5 * student[:, [3, 1, 5, 0, 2, 4]], teacher).item() == pytest.approx(plain, rel=1e-9)
    assert attention_loss(-student, 0.1 * teacher).item() == pytest.approx(plain, rel=1e-9)


def test_attention_is_averaged_and_not_summed() -> None:
    """A map twice as large in both directions, each value four times: the vectors of length 1 are half as long everywhere."""
    student, teacher = random(3, 6, 4, 4), random(3, 2, 4, 4, seed=1)
    large = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (student, teacher)]
    assert attention_loss(large[0], large[1]).item() == pytest.approx(attention_loss(student, teacher).item() / 4)
    # sizes that differ: the larger is averaged down
    assert attention_loss(large[0], teacher).item() == pytest.approx(attention_loss(student, teacher).item())


def test_soft_targets_at_a_high_temperature_are_logit_regression() -> None:
    """Of zero-mean logits: the gradient, scaled by T², is that of ½·||g - z||² over the number of classes, to 1 %."""
    student, teacher = ((z - z.mean(1, keepdim=True)).requires_grad_() for z in (random(3, 5), random(3, 5, seed=1)))
    distillation_loss(student, teacher, 1e3).backward()
    other = student.detach().clone().requires_grad_()
    logit_loss(other, teacher).backward()
    assert student.grad is not None
    assert other.grad is not None
    assert (student.grad - other.grad / 5).norm() < 0.01 * (other.grad / 5).norm()


def test_logits_by_their_spread() -> None:
    answers = torch.tensor([[1.0, 10.0, 5.0], [3.0, 30.0, 5.0]])
    scaled = Logits(standardize=True).fitted(answers)
    student, teacher = torch.tensor([[2.0, 20.0, 4.0]]), torch.zeros(1, 3)
    assert scaled(student, teacher, None, 1.0).item() == pytest.approx(0.5 * (2**2 + 2**2 + 4**2))
    maps = Logits(standardize=True).fitted(answers.T.reshape(1, 3, 2, 1))
    assert maps.scale.tolist() == scaled.scale.tolist()
    assert Logits().samples == 0


def test_regressors_of_one_number_have_a_loss() -> None:
    assert logit_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).item() == 1
    assert direction_loss(torch.tensor([[2.0]]), torch.tensor([[-1.0]])).item() == 2


def test_hints_and_similarities_don_t_grow_with_the_layer() -> None:
    student, teacher = random(4, 3, 2, 2), random(4, 3, 2, 2, seed=1)
    wide = [torch.cat([x, x], 1) for x in (student, teacher)]
    assert hint_loss(*wide).item() == pytest.approx(hint_loss(student, teacher).item())
    assert similarity_loss(*wide).item() == pytest.approx(similarity_loss(student, teacher).item())


@pytest.mark.parametrize(
    ("kind", "settings", "fields"),
    [
        (Logits, {"standardize": 1}, ["standardize"]),
        (Decoupled, {"target": -1, "others": float("nan")}, ["target", "others"]),
        (Dist, {"inter": -1, "intra": "2"}, ["inter", "intra"]),
        (Hint, {"layers": "conv1", "weight": -1}, ["layers", "weight"]),
        (Attention, {"layers": {}, "weight": None}, ["layers", "weight"]),
        (Similarity, {"layers": {"a": 1}}, ["layers"]),
        (Relations, {"weight": -1, "distance": -1, "angle": True}, ["weight", "distance", "angle"]),
    ],
)
def test_all_mistakes_are_named_together(kind: Any, settings: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        kind(**settings)
    assert [problem.split(" must be ")[0].split(": ")[1] for problem in error.value.problems] == fields
