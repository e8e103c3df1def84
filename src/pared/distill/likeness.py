"""Metrics that compare a network with its teacher, for data without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Agreement:
    """1 where network and teacher choose the same class, else 0; of several places or outputs the share.

    >>> Agreement()(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 9.0], [0.0, 9.0]]))
    tensor([1., 0.])
    """

    name = "agreement"
    higher_is_better = True

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Of every sample: scores of shape (batch, classes) or (batch, classes, …), twice, to (batch,)."""
        return _each(outputs, targets, lambda ours, theirs: (ours.argmax(1) == theirs.argmax(1)).to(torch.float32))


@dataclass(frozen=True)
class Divergence:
    """KL(teacher ‖ network) of the class probabilities, in nats; of several places or outputs the mean.

    >>> scores = torch.tensor([[1.0, 2.0]])
    >>> Divergence()(scores, scores), bool(Divergence()(-scores, scores) > 0)
    (tensor([0.]), True)
    """

    name = "divergence"
    higher_is_better = False

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Of every sample: scores of shape (batch, classes) or (batch, classes, …), twice, to (batch,)."""

        def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
            ours, theirs = ours.log_softmax(1), theirs.log_softmax(1)
            return (theirs.exp() * (theirs - ours)).sum(1)

        return _each(outputs, targets, divergence)


@dataclass(frozen=True)
class Cosine:
    """The cosine of the network's outputs and its teacher's; of several outputs the mean.

    >>> Cosine()(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([0.])
    """

    name = "cosine"
    higher_is_better = True

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Of every sample: shape (batch, …), twice, to (batch,)."""
        return _each(outputs, targets, lambda ours, theirs: F.cosine_similarity(ours.flatten(1), theirs.flatten(1)))


@dataclass(frozen=True)
class SquaredError:
    """The squared difference of outputs, averaged over all numbers of a sample; for regressors. With labels they are the targets.

    >>> SquaredError()(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """

    name = "squared error"
    higher_is_better = False

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Of every sample: shape (batch,) or (batch, …), twice, to (batch,)."""
        return _each(outputs, targets, lambda ours, theirs: (ours - theirs).square())


def _each(outputs: Any, targets: Any, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compare tensor by tensor (a deployed file gives a tuple where a network may give a dict); the mean of all for every sample."""
    found = []
    for ours, theirs in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(targets), strict=True):
        value = compare(ours.to(torch.float32), theirs.to(torch.float32))
        found.append(value.flatten(1).mean(1) if value.dim() > 1 else value)
    return torch.stack(found).mean(0)
