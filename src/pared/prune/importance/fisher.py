"""The diagonal of the Fisher information: how far the model's predictions move when a weight does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.core.errors import ModelError
from pared.prune.importance.gradients import answers, loss_gradients, per_sample_gradients, unique_parameters, with_all_names
from pared.prune.importance.protocol import Normalize, Score, WeightImportance, check_choice, check_samples, removal_or_guard
from pared.prune.importance.samples import Mean, training_samples
from pared.training import Task
from pared.training.samples import Batch

Labels = Literal["data", "model"]


def fisher_diagonal(model: nn.Module, task: Task | None, samples: int, labels: Labels, seed: int, where: str) -> dict[str, Tensor]:
    """E[(∂ log p(y | x) / ∂w)²] for every weight: squares of the gradients of single samples, averaged.

    Args:
        model: a network; with labels "model", one whose outputs are logits (batch, classes, …).
        task: its training samples, and for labels "data" its loss.
        samples: how many.
        labels: "data" takes y from the data (the empirical Fisher), "model" draws y from the model's softmax (the true Fisher).
        seed: of the draws.
        where: for messages.

    Raises:
        DataError: if there is no task, no sample, or a label without an output.
        ModelError: with labels "model", if the outputs aren't logits.
    """
    if labels == "data":
        gradients = loss_gradients(model, task, samples, where)
    else:
        batches = training_samples(task, samples, model, where)
        drawn = drawn_labels(model, batches, torch.Generator().manual_seed(seed), where)
        gradients = per_sample_gradients(model, drawn, functional.cross_entropy)
    mean = Mean(unique_parameters(model))
    for part in gradients:
        mean.add({name: value.square().sum(dim=0) for name, value in part.items()}, len(next(iter(part.values()))))
    return with_all_names(model, mean.result(where))


def drawn_labels(model: nn.Module, batches: Iterable[Batch], generator: torch.Generator, where: str) -> Iterator[Batch]:
    """The batches with labels drawn from the softmax over the second axis of the model's outputs."""
    for inputs, _ in batches:
        logits = answers(model, inputs)
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            raise ModelError(f"{where}: labels can be drawn only from outputs of shape (batch, classes). Set labels to data.")
        shares = logits.double().softmax(dim=1).movedim(1, -1).cpu()
        drawn = torch.multinomial(shares.reshape(-1, shares.shape[-1]), 1, generator=generator)
        yield inputs, drawn.reshape(shares.shape[:-1]).to(logits.device)


@dataclass(frozen=True)
class Fisher(WeightImportance):
    """½ · F · weight² with the diagonal F of the Fisher information: the rise of the loss to second order at an optimum.

    Optimal Brain Damage (LeCun et al. 1989) with the Fisher in the Hessian's place, as in Theis et al. (1801.05787, section 2.1).

    Args:
        samples: training samples to average over.
        score: "removal" is ½ · F · weight²; "guard" is F alone, which says what must not move rather than what can go.
        labels: "data" takes the labels of the data (the empirical Fisher), "model" draws them from the model's own softmax (the true
            Fisher, which needs no labels and doesn't fade where every training sample is fitted).
        seed: of the drawn labels.
        normalize: "none" by default: rises of the loss compare over layers.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task, or if its training split is empty.
        ModelError: with labels "model", if the outputs aren't logits.

    >>> task = Task(*[[(torch.eye(2), torch.tensor([0, 1]))]] * 3)
    >>> Fisher(samples=2, labels="model").weights(nn.Linear(2, 2), task)["weight"].shape
    torch.Size([2, 2])
    """

    samples: int = 512
    score: Score = "removal"
    labels: Labels = "data"
    seed: int = 0
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = check_samples("importance.fisher", self.samples, self.normalize)
        check_choice(problems, "score", self.score, "removal", "guard")
        check_choice(problems, "labels", self.labels, "data", "model")
        problems.number("seed", self.seed, low=0, integer=True)
        problems.raise_if_any()

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """The score of every weight."""
        found = fisher_diagonal(model, task, self.samples, self.labels, self.seed, "importance.fisher")
        return removal_or_guard(found, model, self.score, 0.5)
