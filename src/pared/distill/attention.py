"""Attention transfer: the student looks where its teacher looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pared.core.problems import Problems
from pared.distill.adapters import resized
from pared.distill.direction import unit
from pared.distill.pairs import check_feature


def attention_map(features: Tensor) -> Tensor:
    """The mean of squares over channels at every place: shape (batch, channels, …) to (batch, …).

    >>> attention_map(torch.tensor([[[3.0, 0.0], [1.0, 2.0]]])).tolist()
    [[5.0, 2.0]]
    """
    return features.square().mean(1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """½ · mean of (q_s - q_t)² over batch and places, with attention maps of length 1.

    Zagoruyko & Komodakis 2017 (1612.03928), section 3.1.
    A permutation of channels changes nothing, nor does a positive factor. Maps of different sizes: the larger is averaged down.
    The mean, not the sum, over places: else the weight of a layer would depend on its size.

    Args:
        student, teacher: shape (batch, channels, …); channels may differ; no gradient reaches the teacher.

    >>> attention_loss(torch.ones(2, 3, 4, 4), 7 * torch.ones(2, 5, 4, 4)).item()
    0.0
    """
    precision = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = attention_map(student.to(precision)), attention_map(teacher.detach().to(precision))
    if ours.shape != theirs.shape:
        size = tuple(min(a, b) for a, b in zip(ours.shape[1:], theirs.shape[1:], strict=True))
        ours, theirs = (resized(each[:, None], size) for each in (ours, theirs))
    ours, theirs = unit(ours.flatten(1)), unit(theirs.flatten(1))
    return 0.5 * torch.where((theirs != 0).any(1, keepdim=True), (ours - theirs).square(), 0.0).mean()


@dataclass(frozen=True)
class Attention:
    """A feature loss for `Teach`: where the activations of a layer are large (1612.03928). Layers must have places: (batch, channels, …).

    Args:
        layers: paths of the student's modules, each with that of the teacher's. None: pairs that `match_layers` finds.
        weight: of the loss. 1000 is what benchmarks use beside labels.

    Raises:
        SettingsError: for a wrong setting.

    >>> Attention().weight
    1000.0
    """

    layers: Mapping[str, str] | None = None
    weight: float = 1000.0
    adapts: ClassVar[bool] = False
    maps: ClassVar[bool] = True
    most: ClassVar[int] = 3

    def __post_init__(self) -> None:
        problems = Problems("distill.attention")
        check_feature(problems, self)
        problems.raise_if_any()

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair of layers."""
        return attention_loss(student, teacher)
