"""DIST: the student shall rank as its teacher does, not say the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pared.core.problems import Problems
from pared.training.soft_targets import soft_targets


def pearson_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Pearson's correlation of every row; 0 where the teacher's row has no variance, so that nothing can be learned from it.

    A positive affine map of a row of either changes nothing. It is computed as half the squared distance of the standardised rows, which is
    the same, and exactly 0 (with its gradient) where both are equal.

    Args:
        student, teacher: shape (rows, columns); no gradient reaches the teacher.

    Returns:
        Shape (rows,).

    >>> round(pearson_distance(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[30.0, 20.0, 10.0]])).item(), 5)
    2.0
    """
    ours, _ = _standardized(student)
    theirs, varies = _standardized(teacher.detach())
    return torch.where(varies, 0.5 * (ours - theirs).square().sum(1), 0.0)


@dataclass(frozen=True)
class Dist:
    """A response for `Teach`: inter · (1 - correlation over classes) + intra · (1 - correlation over the batch), of softened probabilities.

    Huang et al. 2022 (2205.10536), section 4. Correlations leave the student free in scale and shift, which helps where the teacher is much
    stronger. The paper takes temperature 1 for ImageNet and 4 for CIFAR-100.

    Args:
        inter: weight of the correlation over the classes of each sample. 2 is the paper's.
        intra: weight of the correlation over the samples of each class. 2 is the paper's.

    Raises:
        SettingsError: for a wrong setting.

    >>> Dist()(torch.eye(3), torch.eye(3), None, 1.0).item()
    0.0
    """

    inter: float = 2.0
    intra: float = 2.0

    def __post_init__(self) -> None:
        problems = Problems("distill.dist")
        problems.number("inter", self.inter, low=0, high=1e6)
        problems.number("intra", self.intra, low=0, high=1e6)
        problems.raise_if_any()

    def __call__(self, student: Tensor, teacher: Tensor, targets: Any, temperature: float) -> Tensor:
        """The loss of a batch: logits of shape (batch, classes) or (batch, classes, …)."""
        precision = torch.promote_types(student.dtype, torch.float32)
        ours, theirs = (
            soft_targets(logits.to(precision), temperature).movedim(1, -1).reshape(-1, logits.shape[1]) for logits in (student, teacher)
        )
        return self.inter * pearson_distance(ours, theirs).mean() + self.intra * pearson_distance(ours.T, theirs.T).mean()


def _standardized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of mean 0 and length 1 (of zeros where there is no variance), and which of them vary."""
    centred = rows - rows.mean(1, keepdim=True)
    squares = centred.square().sum(1, keepdim=True)
    # what rounding leaves of a constant row is no variance
    varies = squares > (rows.shape[1] * torch.finfo(rows.dtype).eps * rows.detach().abs().amax(1, keepdim=True)) ** 2
    return torch.where(varies, centred / torch.where(varies, squares, 1.0).sqrt(), 0.0), varies[:, 0]
