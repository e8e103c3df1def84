"""Elastic weight consolidation: a quadratic penalty on leaving the weights that an earlier task needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pared.prune.importance.fisher import Labels, fisher_diagonal
from pared.prune.importance.protocol import Normalize, Score, WeightImportance, check_choice, check_samples, effective_weights
from pared.training import Task


def ewc_penalty(weights: Mapping[str, Tensor], anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor], strength: float = 1.0) -> Tensor:
    """strength / 2 · Σ F · (weight − anchor)², a scalar to add to a loss (Kirkpatrick et al., 1612.00796, equation 3).

    Args:
        weights: by name, such as `dict(model.named_parameters())`; gradients flow into them.
        anchor: the weights that were good, by the same names.
        fisher: how much each matters, from `ElasticWeightConsolidation(score="guard").weights(model, task)`.
        strength: the paper's λ.

    >>> ewc_penalty({"w": torch.tensor([1.0, 2.0])}, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.5])}, strength=2.0)
    tensor(3.)
    """
    return sum((penalties(weights[name], anchor[name], fisher[name], strength).sum() for name in fisher), start=torch.zeros(()))


def penalties(weight: Tensor, anchor: Tensor, fisher: Tensor, strength: float) -> Tensor:
    """The penalty of each entry, of the shape of `weight`."""
    return strength / 2 * fisher.to(weight) * (weight - anchor).square()


@dataclass(frozen=True)
class ElasticWeightConsolidation(WeightImportance):
    """What the penalty of EWC would charge for setting a weight to zero (Kirkpatrick et al., 1612.00796).

    It is `Fisher` as the paper takes it, with labels drawn from the model; `ewc_penalty` puts the same numbers into a loss.

    Args:
        samples: training samples to average over.
        score: "removal" is the penalty at zero, λ / 2 · F · weight²; "guard" is F, the stiffness of each spring.
        strength: the paper's λ; it scales all scores alike.
        labels: "model" draws them from the model's softmax, as in the paper; "data" takes those of the data.
        seed: of the drawn labels.
        normalize: "none" by default: penalties compare over layers.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task, or if its training split is empty.
        ModelError: with labels "model", if the outputs aren't logits.

    >>> task = Task(*[[(torch.eye(2), torch.tensor([0, 1]))]] * 3)
    >>> ElasticWeightConsolidation(samples=2).weights(nn.Linear(2, 2), task)["weight"].shape
    torch.Size([2, 2])
    """

    samples: int = 512
    score: Score = "removal"
    strength: float = 1.0
    labels: Labels = "model"
    seed: int = 0
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = check_samples("importance.elastic_weight_consolidation", self.samples, self.normalize)
        check_choice(problems, "score", self.score, "removal", "guard")
        problems.number("strength", self.strength, above=0)
        check_choice(problems, "labels", self.labels, "model", "data")
        problems.number("seed", self.seed, low=0, integer=True)
        problems.raise_if_any()

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """The score of every weight."""
        found = fisher_diagonal(model, task, self.samples, self.labels, self.seed, "importance.elastic_weight_consolidation")
        if self.score == "guard":
            return found
        values = effective_weights(model)
        return {name: penalties(torch.zeros_like(value), values[name].double(), value, self.strength) for name, value in found.items()}
