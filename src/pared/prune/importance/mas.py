"""Memory aware synapses: how sensitive the outputs are to a weight, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.prune.importance.gradients import per_sample_gradients, unique_parameters, with_all_names
from pared.prune.importance.protocol import Normalize, Score, WeightImportance, check_choice, check_samples, removal_or_guard
from pared.prune.importance.samples import Mean, training_samples
from pared.training import Task


def squared_norm(outputs: Any, targets: Any = None) -> Tensor:
    """The squared L2 norm of the outputs (of all tensors, where there are several); targets are ignored.

    >>> squared_norm(torch.tensor([[3.0, 4.0]])).item()
    25.0
    """
    return torch.stack([leaf.square().sum() for leaf in pytree.tree_leaves(outputs)]).sum()


@dataclass(frozen=True)
class MemoryAwareSynapses(WeightImportance):
    """Ω = mean over samples of |∂‖f(x)‖² / ∂w| with the logits f(x), not their softmax (Aljundi et al., 1711.09601, section 4.1).

    Args:
        samples: training samples to average over; their labels aren't looked at.
        score: "removal" is Ω · weight², the paper's penalty at zero; "guard" is Ω alone, which says what must not move.
        normalize: "none" by default: changes of the output compare over layers.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task, or if its training split is empty.

    >>> task = Task(*[[(torch.eye(2), torch.tensor([0, 1]))]] * 3)
    >>> MemoryAwareSynapses(samples=2).weights(nn.Linear(2, 2), task)["weight"].shape
    torch.Size([2, 2])
    """

    samples: int = 512
    score: Score = "removal"
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = check_samples("importance.memory_aware_synapses", self.samples, self.normalize)
        check_choice(problems, "score", self.score, "removal", "guard")
        problems.raise_if_any()

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """The score of every weight."""
        where = "importance.memory_aware_synapses"
        mean = Mean(unique_parameters(model))
        batches = ((inputs, None) for inputs, _ in training_samples(task, self.samples, model, where))
        for part in per_sample_gradients(model, batches, squared_norm):
            mean.add({name: value.abs().sum(dim=0) for name, value in part.items()}, len(next(iter(part.values()))))
        return removal_or_guard(with_all_names(model, mean.result(where)), model, self.score)
