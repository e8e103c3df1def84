"""Relational distillation: the distances and angles between the samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pared.core.problems import Problems
from pared.distill.pairs import check_feature


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the distances of all pairs, divided by their mean, averaged over pairs (Park et al. 2019, 1904.05068, section 3.2.1).

    Rotation, translation and a uniform factor change nothing. Equal samples have the distance 0, with a gradient of 0.

    Args:
        student, teacher: shape (batch, …), each of its own width; no gradient reaches the teacher.

    >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    >>> distance_loss(10 * points + 1, points).item()
    0.0
    """
    ours, theirs = (_relative(_distances(rows)) for rows in _rows(student, teacher))
    count = len(ours)
    return F.smooth_l1_loss(ours, theirs, reduction="sum") / max(1, count * (count - 1))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles of all triples, averaged over triples (section 3.2.2).

    The angle of a triple (i, j, k) is that at j. Where two of its samples are equal there is none; its cosine counts as 0.

    Args:
        student, teacher: shape (batch, …), each of its own width; no gradient reaches the teacher.

    >>> right, straight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    >>> angle_loss(right, right).item(), angle_loss(right, straight).item() > 0
    (0.0, True)
    """
    ours, theirs = (_cosines(rows) for rows in _rows(student, teacher))
    count = len(ours)
    return F.smooth_l1_loss(ours, theirs, reduction="sum") / max(1, count * (count - 1) * (count - 2))


@dataclass(frozen=True)
class Relations:
    """A feature loss for `Teach`: distances and angles between samples (1904.05068). Widths may differ.

    It takes memory for the cube of the batch: 8 MB for each layer at 128 samples, 67 MB at 256.

    Args:
        layers: paths of the student's modules, each with that of the teacher's. None: the last pair that `match_layers` finds.
        weight: of both together.
        distance: weight of the distances. 25 is the paper's beside labels.
        angle: weight of the angles. 50 is the paper's.

    Raises:
        SettingsError: for a wrong setting.

    >>> Relations().angle
    50.0
    """

    layers: Mapping[str, str] | None = None
    weight: float = 1.0
    distance: float = 25.0
    angle: float = 50.0
    adapts: ClassVar[bool] = False
    maps: ClassVar[bool] = False
    most: ClassVar[int] = 1

    def __post_init__(self) -> None:
        problems = Problems("distill.relations")
        check_feature(problems, self)
        problems.number("distance", self.distance, low=0, high=1e6)
        problems.number("angle", self.angle, low=0, high=1e6)
        problems.raise_if_any()

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair of layers."""
        losses = [(self.distance, distance_loss), (self.angle, angle_loss)]
        return torch.stack([weight * loss(student, teacher) for weight, loss in losses if weight] or [student.sum() * 0]).sum()


def _rows(student: Tensor, teacher: Tensor) -> list[Tensor]:
    precision = torch.promote_types(student.dtype, torch.float32)
    return [each.to(precision).reshape(len(each), -1) for each in (student, teacher.detach())]


def _distances(rows: Tensor) -> Tensor:
    # by differences: products of samples would make something of nothing where two are equal
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _relative(distances: Tensor) -> Tensor:
    """Distances by their mean over pairs."""
    count = len(distances)
    mean = distances.sum() / max(1, count * (count - 1))
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines(rows: Tensor) -> Tensor:
    """cos of the angle at j between i and k, shape (batch i, batch j, batch k): from products of samples, without all differences."""
    centred = rows - rows.mean(0)  # what the products lose by cancelling is least here
    gram = centred @ centred.T
    distances = _distances(centred)
    apart = distances > 0
    inverse = torch.where(apart, 1 / torch.where(apart, distances, 1.0), 0.0)
    legs = gram[:, None, :] - gram[:, :, None] - gram[None, :, :] + gram.diagonal()[None, :, None]
    cosines = legs * inverse[:, :, None] * inverse[None, :, :]
    same = torch.eye(len(rows), dtype=torch.bool, device=rows.device)[:, None, :]
    return torch.where(same, 0.0, cosines)
