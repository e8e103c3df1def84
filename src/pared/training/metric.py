"""What a network is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pared.core.problems import Problems


class Metric(Protocol):
    """A measure of quality, computed sample by sample so that means over batches of any size are right."""

    @property
    def name(self) -> str:
        """What tables and result.json call it."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """False for an error or a distance."""
        ...

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one value for each sample, shape (batch,)."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """1 where the right class is among the `top` highest outputs, else 0; of several equal outputs the first counts as higher.

    Args:
        top: how many guesses are allowed.

    >>> Accuracy()(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor([1., 0.])
    """

    top: int = 1

    def __post_init__(self) -> None:
        problems = Problems("accuracy")
        problems.number("top", self.top, low=1, integer=True)
        problems.raise_if_any()

    @property
    def name(self) -> str:
        """ "accuracy", or "top-5 accuracy" with `top=5`."""
        return "accuracy" if self.top == 1 else f"top-{self.top} accuracy"

    @property
    def higher_is_better(self) -> bool:
        """Always True."""
        return True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compare.

        Args:
            outputs: shape (batch, classes) or (batch, classes, …), any scores.
            targets: class numbers, shape (batch,) or (batch, …).

        Returns:
            Shape (batch,); where there are several places a sample, the share of right places.
        """
        # argsort rather than topk: its order of equal values is fixed
        ranked = outputs.argmax(1, keepdim=True) if self.top == 1 else outputs.argsort(dim=1, descending=True, stable=True)[:, : self.top]
        right = (ranked == targets.unsqueeze(1)).any(1)
        return right.to(torch.float32).flatten(1).mean(1) if right.dim() > 1 else right.to(torch.float32)
