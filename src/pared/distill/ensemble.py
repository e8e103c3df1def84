"""Several networks that answer as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.core.errors import ModelError
from pared.core.problems import Problems

Mean = Literal["arithmetic", "geometric", "logits"]


def mean_scores(scores: Sequence[Tensor], mean: Mean, temperature: float = 1.0) -> Tensor:
    """Logits of the mean distribution of several networks: softmax(result / T) is the mean of softmax(scores / T).

    Hinton et al. 2015 (1503.02531), section 3: distributions are averaged as they are softened, so an arithmetic mean depends on the
    temperature of the loss; a geometric mean (made to sum to 1) doesn't.

    Args:
        scores: of each network, shape (batch, classes) or (batch, classes, …).
        mean: "arithmetic" or "geometric" mean of probabilities, or "logits": the plain mean of the numbers, which as a distribution is the
            geometric mean, and serves regressors and embeddings too.
        temperature: T, greater than 0.

    >>> sure, unsure = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> mean_scores([sure, unsure], "arithmetic").softmax(1) - (sure.softmax(1) + 0.5) / 2
    tensor([[0., 0.]])
    """
    stacked = torch.stack(list(scores))
    if mean == "logits":
        return stacked.mean(0)
    logs = (stacked / temperature).log_softmax(2 if stacked.dim() > 2 else 1)
    averaged = logs.logsumexp(0) - math.log(len(scores)) if mean == "arithmetic" else logs.mean(0)
    return averaged * temperature


class Ensemble(nn.Module):
    """Networks whose answers are averaged: a teacher (`Task(…, teacher=Ensemble(…))`), or an ordinary network to evaluate and export.

    Args:
        networks: at least one; all take the same inputs and answer alike. They are used as they are, not copied.
        mean: see `mean_scores`. "arithmetic" by default, as Hinton et al. write it; "logits" for regression (Ba & Caruana average logits).
        temperature: at which an arithmetic mean is taken. As a teacher it gets that of the loss. 1: that of ordinary probabilities.

    Raises:
        SettingsError: for a wrong setting.
        ModelError: when it is called, if the networks answer in different shapes.

    >>> ensemble = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], mean="logits")
    >>> ensemble(torch.zeros(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, networks: Sequence[nn.Module], mean: Mean = "arithmetic", temperature: float = 1.0) -> None:
        super().__init__()
        problems = Problems("distill.ensemble")
        networks = list(networks) if isinstance(networks, Sequence | nn.ModuleList) else [networks]
        fine = bool(networks) and all(isinstance(network, nn.Module) for network in networks)
        problems.check(fine, "networks", "a list of at least one nn.Module", networks)
        problems.check(mean in ("arithmetic", "geometric", "logits"), "mean", "arithmetic, geometric or logits", mean)
        problems.number("temperature", temperature, above=0, high=1e6)
        problems.raise_if_any()
        self.networks = nn.ModuleList(networks)
        self.mean: Mean = mean
        self.temperature = float(temperature)

    def soften(self, temperature: float) -> None:
        """Take the mean of distributions that are softened by `temperature`, and answer with their logits times it."""
        self.temperature = float(temperature)

    def extra_repr(self) -> str:
        """What isn't a module."""
        return f"mean={self.mean}, temperature={self.temperature:g}"

    def forward(self, *inputs: Tensor) -> Any:
        """The mean of all answers: a tensor, or a tuple or dict where the networks give that."""
        answers = [network(*inputs) for network in self.networks]
        leaves, specs = zip(*(pytree.tree_flatten(answer) for answer in answers), strict=True)
        outputs = list(zip(*leaves, strict=True)) if all(spec == specs[0] for spec in specs) else []
        if not outputs or not all(leaf.shape == each[0].shape for each in outputs for leaf in each):
            shapes = ", ".join(str([tuple(leaf.shape) for leaf in each]) for each in leaves)
            raise ModelError(f"distill.ensemble: the networks must answer in one shape. Got {shapes}.")
        return pytree.tree_unflatten([mean_scores(each, self.mean, self.temperature) for each in outputs], specs[0])
