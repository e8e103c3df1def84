"""Decoupled distillation: what the teacher says of the right class, and of all others, weighed apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pared.core.problems import Problems
from pared.training.check import IGNORED_LABEL, check_labels, need_labels


def decoupled_losses(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of every sample, times T² (Zhao et al. 2022, 2203.08679, section 3).

    TCKD is KL(teacher || student) of the two events "the right class" and "any other"; NCKD is that of the softmax over the other classes
    alone. The right class is the label's, whatever the networks think. KL of all classes is TCKD + (1 - the teacher's p of it) · NCKD.

    Args:
        student, teacher: logits, shape (batch, classes); no gradient reaches the teacher.
        targets: class numbers, shape (batch,).
        temperature: greater than 0.

    Returns:
        Two tensors of shape (batch,).

    >>> ours, theirs = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, 0.0, 2.0]])
    >>> [round(loss.item(), 4) for loss in decoupled_losses(ours, theirs, torch.tensor([0]), 1.0)]
    [0.0, 1.5232]
    """
    precision = torch.promote_types(student.dtype, torch.float32)
    others = torch.ones(student.shape, dtype=torch.bool, device=student.device).scatter_(1, targets[:, None], False)
    binary, rest = [], []
    for logits in (student, teacher.detach()):
        scaled = logits.to(precision) / temperature
        left = scaled[others].reshape(len(scaled), -1)
        two = torch.stack([scaled.gather(1, targets[:, None]).squeeze(1), left.logsumexp(1)], 1)
        binary.append(two.log_softmax(1))
        rest.append(left.log_softmax(1))
    square = temperature**2
    target, other = (F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * square for ours, theirs in (binary, rest))
    return target, other


@dataclass(frozen=True)
class Decoupled:
    """A response for `Teach`: target · TCKD + others · NCKD (2203.08679). It needs labels.

    In plain soft targets the second part has the weight 1 - p of the right class, so it fades where the teacher is sure.

    Args:
        target: weight of what is said of the right class. 1 is the paper's.
        others: weight of what is said among the other classes. The paper takes 1 to 8, the more the surer the teacher; 8 for strong
            networks on CIFAR-100, the default here is the least that it recommends for ImageNet.

    Raises:
        SettingsError: for a wrong setting.
        DataError: when it is called without labels.

    >>> Decoupled()(torch.eye(3), torch.eye(3), torch.arange(3), 4.0).item()
    0.0
    """

    target: float = 1.0
    others: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems("distill.decoupled")
        problems.number("target", self.target, low=0, high=1e6)
        problems.number("others", self.others, low=0, high=1e6)
        problems.raise_if_any()

    def __call__(self, student: Tensor, teacher: Tensor, targets: Any, temperature: float) -> Tensor:
        """The loss of a batch: logits (batch, classes) or (batch, classes, …) and as many labels; ignored ones are passed over."""
        need_labels(targets, "train", "distill.decoupled")
        check_labels(student, targets, "train")
        ours, theirs = (logits.flatten(2).movedim(1, -1).flatten(0, -2) if logits.dim() > 2 else logits for logits in (student, teacher))
        labels = targets.flatten()
        counts = labels != IGNORED_LABEL
        if not bool(counts.all()):
            ours, theirs, labels = ours[counts], theirs[counts], labels[counts]
        if not len(labels):
            return student.sum() * 0
        target, others = decoupled_losses(ours, theirs, labels, temperature)
        return (self.target * target + self.others * others).mean()
