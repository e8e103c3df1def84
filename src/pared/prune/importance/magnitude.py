"""The size of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pared.core.problems import Problems
from pared.graph.analysis import Analysis
from pared.prune.importance.protocol import Normalize, Scores, WeightImportance, add_rows, check_choice, effective_weights
from pared.training import Task


def row_norms(rows: Tensor, order: float) -> Tensor:
    """The norm of every row: of shape (n,) for rows of shape (n, m).

    >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 2).tolist()
    [5.0, 0.0]
    """
    wide = torch.promote_types(rows.dtype, torch.float32)  # a cast to float64 would take longer than the norms of a network
    return torch.linalg.vector_norm(rows.to(wide), ord=order, dim=1).double()


@dataclass(frozen=True)
class Magnitude(WeightImportance):
    """The absolute value of a weight (Han et al., 1506.02626); for a neuron, the norm of the weights that compute it.

    Norms of tied layers add up (Li et al., 1608.08710: order 1 is theirs). Single weights are ranked alike by any order.

    Args:
        order: of the norm. 2 by default: with tied layers and attention it ranks as DepGraph's group norm does (Fang et al., 2301.12900).
        normalize: "layer" by default, since the size of weights depends on the fan-in and says nothing between layers.

    Raises:
        SettingsError: if a setting is out of range.

    >>> Magnitude().weights(nn.Linear(1, 1, bias=False).requires_grad_(False))["weight"].shape
    torch.Size([1, 1])
    """

    order: float = 2
    normalize: Normalize = "layer"

    def __post_init__(self) -> None:
        problems = Problems("importance.magnitude")
        problems.number("order", self.order, above=0)
        check_choice(problems, "normalize", self.normalize, "layer", "none")
        problems.raise_if_any()

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """Absolute values; needs no data."""
        return {name: value.abs() for name, value in effective_weights(model).items()}

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """The norm of each row, not the sum; needs no data."""
        values = effective_weights(analysis.captured.module)
        rows = [row_norms(producer.view(values[producer.parameter]), self.order) for producer in analysis.producers]
        return add_rows(analysis, rows, self.normalize)
