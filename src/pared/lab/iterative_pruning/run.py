"""Remove weights of a LeNet-300-100 at once, in rounds, and without retraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pared.architecture.nets import lenet300
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.lab.claims import BySeed, error, judged, mean, table, trained
from pared.lab.experiment import Row, Verdict
from pared.prune import Weights
from pared.training import Train

MARGIN = 0.375  # 0.15 points on MNIST; test noise on Fashion-MNIST is 2.5 times as large
COLUMNS = {
    "dense": "dense",
    "iterative": "in rounds",
    "one_shot": "at once",
    "untuned": "at once, not retrained",
}


@dataclass(frozen=True)
class IterativePruning(BySeed):
    """Equal training for all: `rounds` times `tune` epochs.

    Args:
        epochs: of the dense network.
        rounds: of pruning.
        tune: epochs after each round.
        keep: the share of every layer's weights that stays.
    """

    name: ClassVar[str] = "iterative_pruning"
    claim: ClassVar[str] = (
        "Removing weights in rounds with retraining loses less than removing as many at once, and nearly nothing at 8 % left."
    )

    epochs: int = 10
    rounds: int = 5
    tune: int = 5
    keep: float = 0.08

    def __post_init__(self) -> None:
        problems = Problems("lab.iterative_pruning")
        problems.number("epochs", self.epochs, low=0, integer=True)
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.number("tune", self.tune, low=0, integer=True)
        problems.number("keep", self.keep, low=0, high=1)
        problems.raise_if_any()

    def measure(self, seed: int) -> Row:
        """Four test errors by seed, and how many inputs of the border and of the centre the first layer still reads."""
        dense, task = trained(lenet300, Train(epochs=self.epochs), seed)
        plan = Train(epochs=self.tune, learning_rate=3e-4)
        row: Row = {"dense": error(dense, task)}
        row["untuned"] = error(Weights(keep=self.keep, scope="layer")(dense, task), task)
        in_rounds = Weights(keep=self.keep, scope="layer", rounds=self.rounds, tune=plan)
        for name, method in (("iterative", in_rounds), ("one_shot", dataclasses.replace(in_rounds, schedule="one-shot"))):
            small = bake(method(dense, task))
            row[name] = error(small, task)
            row[f"{name}_left"] = sum(int(layer.weight.count_nonzero()) for layer in linear_layers(small))
            row[f"{name}_border"], row[f"{name}_centre"] = reads(small)
        return row

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Four claims, on means over seeds."""
        dense, slow, fast, bare = (mean(rows, name) for name in ("dense", "iterative", "one_shot", "untuned"))
        border, centre = mean(rows, "iterative_border"), mean(rows, "iterative_centre")
        return judged(
            {
                f"in rounds ({slow:.2f} %) at most {MARGIN} points worse than dense ({dense:.2f} %)": slow <= dense + MARGIN,
                f"at once ({fast:.2f} %) worse than in rounds ({slow:.2f} %)": fast > slow,
                f"without retraining ({bare:.2f} %) at least 5 points worse": bare >= slow + 5,
                f"border pixels keep fewer weights ({border:.1f} each) than the centre ({centre:.1f})": border < centre,
            },
            table(rows, COLUMNS),
        )


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """In order."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def reads(model: nn.Module) -> tuple[float, float]:
    """Weights left per pixel of the outer two rows and columns, and of the others."""
    first = linear_layers(model)[0].weight.ne(0).sum(0).reshape(28, 28).double()
    centre = first[2:-2, 2:-2]
    border = (first.sum() - centre.sum()) / (first.numel() - centre.numel())
    return round(float(border), 2), round(float(centre.mean()), 2)


EXPERIMENT = IterativePruning()
