"""The teacher's answer as a distribution, and the distance of a student's answer from it (Hinton et al. 2015, 1503.02531)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def _class_axis(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1
