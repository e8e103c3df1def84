"""The teacher's answer as a distribution, and the distance of a student's answer from it (Hinton et al. 2015, 1503.02531)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.core.errors import ModelError

if TYPE_CHECKING:
    from pared.training.fit import Objective
    from pared.training.task import Task


def soft_targets(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of `logits / temperature`: the higher the temperature, the more the lesser classes show (section 2).

    Args:
        logits: shape (classes,), (batch, classes) or (batch, classes, …), as `torch.nn.functional.cross_entropy` takes them.
        temperature: greater than 0; 1 is the ordinary softmax.

    Returns:
        Probabilities of the shape of `logits`.

    >>> [round(p, 3) for p in soft_targets(torch.tensor([100.0, 10.0, 1.0]), 100).tolist()]
    [0.562, 0.229, 0.209]
    >>> [round(p, 3) for p in soft_targets(torch.tensor([100.0, 10.0, 1.0]), 1).tolist()]
    [1.0, 0.0, 0.0]
    """
    return F.softmax(logits / temperature, dim=_class_axis(logits))


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher || student) of the softened distributions, summed over classes and averaged over everything else.

    T² keeps the size of the gradient about constant when the temperature changes (section 2.1); KL differs from the paper's
    cross-entropy by the teacher's entropy, a constant, so that the loss is zero when both agree. No gradient reaches the teacher.
    Half-precision logits are computed in 32 bits.

    Args:
        student_logits, teacher_logits: equal shapes, (batch, classes) or (batch, classes, …).
        temperature: greater than 0.

    Raises:
        ValueError: if the shapes differ.

    >>> distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 4.0).item()
    0.0
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student and teacher differ in shape: {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    axis, precision = _class_axis(student_logits), torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(precision) / temperature, dim=axis)
    teacher = F.log_softmax(teacher_logits.detach().to(precision) / temperature, dim=axis)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(axis).mean() * temperature**2


def taught_by(teacher: nn.Module, task: Task, temperature: float, weight: float) -> Objective:
    """The objective (1 - weight) · task.loss(student, labels) + weight · T² · KL(teacher || student).

    The teacher is copied and answers each batch as it is given to the student (augmented alike), in eval mode and without gradients.
    Of a student that answers with a list (early exits), each answer is taught; the loss is their mean.

    Args:
        teacher: takes the same inputs as the student.
        task: gives the loss on labels, and the device.
        temperature: greater than 0.
        weight: share of the teacher; at 1 labels aren't used at all, so that data without labels will do.

    Raises (when it is called):
        ModelError: if teacher and student answer in different shapes.
    """
    teacher = copy.deepcopy(teacher).to(task.machine.device).eval().requires_grad_(False)

    def loss(logits: Tensor, answer: Tensor, targets: Tensor) -> Tensor:
        if logits.shape != answer.shape:
            raise ModelError(
                f"the teacher answers in shape {tuple(answer.shape)}, the student in {tuple(logits.shape)}. "
                "Both must have the same classes."
            )
        soft = distillation_loss(logits, answer, temperature)
        return soft if weight == 1 else (1 - weight) * task.loss(logits, targets) + weight * soft

    def objective(student: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        with torch.no_grad():
            answer = teacher(*inputs)
        outputs = student(*inputs)
        exits = outputs if isinstance(outputs, list) else [outputs]
        return torch.stack([loss(logits, answer, targets) for logits in exits]).mean()

    return objective


def _class_axis(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1
