"""The direction of what the teacher says, for embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def direction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, averaged over the batch; lengths don't count, and a vector of length 0 has no direction to learn.

    Computed as half the squared distance of vectors of length 1, which is the same.

    Args:
        student, teacher: equal shapes, (batch, …); no gradient reaches the teacher.

    >>> direction_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])).item()
    1.0
    """
    precision = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (unit(each.to(precision).reshape(len(each), -1)) for each in (student, teacher.detach()))
    return 0.5 * torch.where((theirs != 0).any(1), (ours - theirs).square().sum(1), 0.0).mean()


@dataclass(frozen=True)
class Direction:
    """A response for `Teach`: 1 - cosine of the outputs, for networks whose outputs are compared by their angle (embeddings).

    The temperature isn't used.

    >>> Direction()(torch.eye(2), 5 * torch.eye(2), None, 1.0).item()
    0.0
    """

    def __call__(self, student: Tensor, teacher: Tensor, targets: Any, temperature: float) -> Tensor:
        """The loss of a batch."""
        return direction_loss(student, teacher)


def unit(rows: Tensor) -> Tensor:
    """Rows divided by their length; zeros stay zeros, with a gradient of zero.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    squares = rows.square().sum(1, keepdim=True)
    some = squares > 0
    return torch.where(some, rows / torch.where(some, squares, 1.0).sqrt(), 0.0)
