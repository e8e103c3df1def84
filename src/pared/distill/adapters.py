"""What stands between layers of different shapes while a student learns, and is gone afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pared.core.errors import ModelError

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Adapter(nn.Module):
    """Give a student's layer the shape of its teacher's: a linear map over channels (a 1x1 convolution), then a resize where sizes differ.

    Where channels agree nothing is mapped, where sizes agree nothing is resized. Maps that are too large are averaged down, smaller ones
    interpolated; a vector and a map are compared after global average pooling. Of three axes the last one is that of channels if the
    middle ones agree (tokens), else the middle one (signals).

    Args:
        student, teacher: shapes (batch, …); the batch may differ.

    Raises:
        ModelError: if the numbers of axes don't fit.

    >>> import torch
    >>> Adapter((8, 16, 4, 4), (8, 32, 8, 8))(torch.zeros(5, 16, 4, 4)).shape
    torch.Size([5, 32, 8, 8])
    >>> len(list(Adapter((8, 16), (8, 16)).parameters()))
    0
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        self.pooled = len(teacher) == 2 and len(student) > 2
        ours, theirs = tuple(student[:2] if self.pooled else student), tuple(teacher)
        if len(ours) != len(theirs) or not 2 <= len(theirs) <= 5:
            raise ModelError(
                f"distill.hint: no adapter leads from outputs of shape {tuple(student)} to {tuple(teacher)}. Name other layers."
            )
        tokens = len(theirs) == 3 and ours[1] == theirs[1]
        self.size = None if tokens or ours[2:] == theirs[2:] else theirs[2:]
        axis = -1 if tokens else 1
        self.map = self._map(ours[axis], theirs[axis], linear=tokens or len(theirs) == 2, places=len(theirs) - 2)

    @staticmethod
    def _map(inputs: int, outputs: int, *, linear: bool, places: int) -> nn.Module:
        if inputs == outputs:
            return nn.Identity()
        return nn.Linear(inputs, outputs) if linear else _CONVOLUTIONS[places](inputs, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        """The student's output in the teacher's shape."""
        if self.pooled:
            features = features.flatten(2).mean(2)
        return resized(self.map(features), self.size)


class WithAdapters(nn.Module):
    """A student and its adapters as one module, so that whatever trains it trains both; it answers as the student alone."""

    def __init__(self, student: nn.Module, adapters: Sequence[nn.Module]) -> None:
        super().__init__()
        self.student = student
        self.adapters = nn.ModuleList(adapters)

    def forward(self, *inputs: Tensor) -> Any:
        """What the student says."""
        return self.student(*inputs)


def resized(maps: Tensor, size: Sequence[int] | None) -> Tensor:
    """Maps of shape (batch, channels, …) with places of `size`: averaged down, or interpolated where one axis has to grow.

    >>> import torch
    >>> resized(torch.ones(1, 2, 4, 4), (2, 8)).shape
    torch.Size([1, 2, 2, 8])
    """
    if size is None:
        return maps
    least = [min(have, want) for have, want in zip(maps.shape[2:], size, strict=True)]
    if math.prod(least) < math.prod(maps.shape[2:]):
        pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(least)]
        maps = pool(maps, least)  # type: ignore[arg-type]
    if list(size) == least:
        return maps
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(least)]
    return F.interpolate(maps, size=list(size), mode=mode, align_corners=False)
