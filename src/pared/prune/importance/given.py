"""Scores that were made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.prune.importance.protocol import Normalize, WeightImportance, all_names, check_choice, plain_name
from pared.training import Task


@dataclass(frozen=True, eq=False)
class Given(WeightImportance):
    """Scores that you have already, such as those of a `PathIntegral` around your own training.

    They are those of one network, so they serve one round: after a cut the shapes are others.

    Args:
        scores: by name of parameter, of its shape; parameters that aren't named score 0.
        normalize: "none" by default: the numbers are taken as they are.

    Raises:
        SettingsError: if a setting is out of range, or a score doesn't fit the model.

    >>> Given({"weight": torch.ones(2, 2)}).weights(nn.Linear(2, 2))["bias"].tolist()
    [0.0, 0.0]
    """

    scores: Mapping[str, Tensor] = field(repr=False)
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = Problems("importance.given")
        tensors = isinstance(self.scores, Mapping) and all(isinstance(value, Tensor) for value in self.scores.values())
        problems.check(tensors, "scores", "a mapping from names of parameters to tensors", type(self.scores).__name__)
        check_choice(problems, "normalize", self.normalize, "layer", "none")
        problems.raise_if_any()

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """The scores, checked against the model."""
        parameters = all_names(model)
        wrong = [name for name, value in self.scores.items() if name not in parameters or parameters[name].shape != value.shape]
        if wrong:
            shapes = {name: tuple(self.scores[name].shape) for name in wrong}
            raise SettingsError([f"importance.given: the model has no parameter {name} of shape {shapes[name]}." for name in wrong])
        given = {plain_name(name): value for name, value in self.scores.items()}
        return {
            name: given[plain_name(name)].to(value.device) if plain_name(name) in given else torch.zeros_like(value, requires_grad=False)
            for name, value in parameters.items()
        }
