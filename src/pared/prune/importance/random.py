"""Chance."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pared.core.problems import Problems
from pared.graph.analysis import Analysis
from pared.prune.importance.protocol import Normalize, Scores, WeightImportance, check_choice, effective_weights, plain_name
from pared.training import Task


@dataclass(frozen=True)
class Random(WeightImportance):
    """Chance: the baseline that every importance has to beat. Scores are uniform in [0, 1).

    Args:
        seed: same seed, same choice. A weight's score depends on the seed and its name only, so in rounds what stays was to stay before.
        normalize: has nothing to do here, as all layers have the same mean.

    Raises:
        SettingsError: if a setting is out of range.

    >>> model = nn.Linear(2, 2)
    >>> torch.equal(Random(1).weights(model)["weight"], Random(1).weights(model)["weight"])
    True
    """

    seed: int = 0
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = Problems("importance.random")
        problems.number("seed", self.seed, low=0, integer=True)
        check_choice(problems, "normalize", self.normalize, "layer", "none")
        problems.raise_if_any()

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """A number for every weight; needs no data."""
        return {name: self._draw(name, value).to(value.device) for name, value in effective_weights(model).items()}

    def _draw(self, name: str, value: Tensor) -> Tensor:
        generator = np.random.default_rng([self.seed, zlib.crc32(plain_name(name).encode())])
        return torch.from_numpy(generator.random(tuple(value.shape)))

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """A number for every root, not a sum of numbers; needs no data."""
        return np.random.default_rng(self.seed).random(analysis.first.count)
