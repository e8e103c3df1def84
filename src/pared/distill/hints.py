"""Hints: an inner layer of the student says what an inner layer of the teacher says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pared.core.problems import Problems
from pared.distill.pairs import check_feature


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """½ · (student - teacher)², averaged over all numbers, so that it doesn't grow with the layer (FitNets, 1412.6550, section 2.2).

    Args:
        student, teacher: equal shapes, (batch, …); no gradient reaches the teacher.

    >>> hint_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).item()
    1.0
    """
    precision = torch.promote_types(student.dtype, torch.float32)
    return 0.5 * (student.to(precision) - teacher.detach().to(precision)).square().mean()


@dataclass(frozen=True)
class Hint:
    """A feature loss for `Teach`: regress layers of the teacher from layers of the student (Romero et al. 2015, 1412.6550).

    Where shapes differ a small adapter stands between them: a linear map or 1x1 convolution, and a resize. It is trained along and isn't
    part of the student.

    Args:
        layers: paths of the student's modules, each with that of the teacher's. None: pairs that `match_layers` finds.
        weight: of the loss. 100 is what benchmarks use beside soft targets.

    Raises:
        SettingsError: for a wrong setting.

    >>> Hint({"features.3": "features.6"}).weight
    100.0
    """

    layers: Mapping[str, str] | None = None
    weight: float = 100.0
    adapts: ClassVar[bool] = True
    maps: ClassVar[bool] = False
    most: ClassVar[int] = 3

    def __post_init__(self) -> None:
        problems = Problems("distill.hint")
        check_feature(problems, self)
        problems.raise_if_any()

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair of layers."""
        return hint_loss(student, teacher)
