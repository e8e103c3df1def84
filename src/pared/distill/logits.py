"""Regression on what the teacher says, before any softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pared.core.problems import Problems

_SAMPLES = 1024


def logit_loss(student: Tensor, teacher: Tensor, scale: Tensor | None = None) -> Tensor:
    """½ · ||(g - z) / scale||², summed over outputs, averaged over everything else (Ba & Caruana 2014, 1312.6184, section 2.2).

    Args:
        student, teacher: equal shapes, (batch, outputs) or (batch, outputs, …); no gradient reaches the teacher.
        scale: shape (outputs,), greater than 0. None: 1.

    >>> logit_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
    2.5
    """
    precision = torch.promote_types(student.dtype, torch.float32)
    difference = student.to(precision) - teacher.detach().to(precision)
    if difference.dim() == 1:
        difference = difference[:, None]
    if scale is not None:
        difference = difference / scale.to(difference).reshape(-1, *[1] * (difference.dim() - 2))
    return 0.5 * difference.square().sum(1).mean()


@dataclass(frozen=True)
class Logits:
    """A response for `Teach`: ½ · ||student - teacher||² of the outputs themselves, so it serves regressors too (1312.6184).

    It is also the limit of soft targets at a high temperature (1503.02531, section 2.1). The temperature isn't used.

    Args:
        standardize: divide the difference in every output by the standard deviation that the teacher's answers have there, so that outputs
            of a wide range don't drown the others; measured on 1024 training samples. False by default: logits have one range.

    Raises:
        SettingsError: for a wrong setting.

    >>> Logits()(torch.tensor([[3.0]]), torch.tensor([[1.0]]), None, 1.0).item()
    2.0
    """

    standardize: bool = False

    def __post_init__(self) -> None:
        problems = Problems("distill.logits")
        problems.check(isinstance(self.standardize, bool), "standardize", "true or false", self.standardize)
        problems.raise_if_any()

    def __call__(self, student: Tensor, teacher: Tensor, targets: Any, temperature: float) -> Tensor:
        """The loss of a batch."""
        return logit_loss(student, teacher)

    @property
    def samples(self) -> int:
        """How many of the teacher's answers have to be seen first."""
        return _SAMPLES if self.standardize else 0

    def fitted(self, answers: Tensor) -> Scaled:
        """The response for a teacher that gave these answers, shape (samples, outputs) or (samples, outputs, …)."""
        return Scaled(spread_of(answers))


@dataclass(frozen=True, eq=False)
class Scaled:
    """`logit_loss` with the scale that was measured."""

    scale: Tensor

    def __call__(self, student: Tensor, teacher: Tensor, targets: Any, temperature: float) -> Tensor:
        """The loss of a batch."""
        return logit_loss(student, teacher, self.scale)


def spread_of(answers: Tensor) -> Tensor:
    """The standard deviation of every output over samples (and places); 1 where an output never changes.

    >>> spread_of(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist()
    [1.0, 1.0]
    """
    rows = answers.float().flatten(2).movedim(1, -1).flatten(0, -2) if answers.dim() > 2 else answers.float().reshape(len(answers), -1)
    spread = rows.std(0, correction=0)
    return torch.where(spread > 0, spread, torch.ones_like(spread))
