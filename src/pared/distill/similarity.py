"""Similarity-preserving distillation: samples that are alike to the teacher are alike to the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pared.core.problems import Problems
from pared.distill.direction import unit
from pared.distill.pairs import check_feature


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of (G_s - G_t)² over pairs of samples, with rows of the Gram matrix of length 1 (Tung & Mori 2019, 1907.09682, section 3).

    Args:
        student, teacher: shape (batch, …), each of its own width; no gradient reaches the teacher.

    >>> similarity_loss(torch.eye(4), 3 * torch.eye(4)).item()
    0.0
    """
    precision = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (each.to(precision).reshape(len(each), -1) for each in (student, teacher.detach()))
    return (unit(ours @ ours.T) - unit(theirs @ theirs.T)).square().mean()


@dataclass(frozen=True)
class Similarity:
    """A feature loss for `Teach`: which samples of a batch a layer finds alike (1907.09682). Widths may differ.

    Args:
        layers: paths of the student's modules, each with that of the teacher's. None: the last pair that `match_layers` finds.
        weight: of the loss. 3000 is the paper's γ.

    Raises:
        SettingsError: for a wrong setting.

    >>> Similarity().weight
    3000.0
    """

    layers: Mapping[str, str] | None = None
    weight: float = 3000.0
    adapts: ClassVar[bool] = False
    maps: ClassVar[bool] = False
    most: ClassVar[int] = 1

    def __post_init__(self) -> None:
        problems = Problems("distill.similarity")
        check_feature(problems, self)
        problems.raise_if_any()

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair of layers."""
        return similarity_loss(student, teacher)
