"""One-shot pruning of a LeNet-300-100 by different importances, without retraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pared.architecture.nets import lenet300
from pared.core.problems import Problems
from pared.lab.claims import BySeed, error, judged, mean, table, trained
from pared.lab.experiment import Row, Verdict
from pared.prune import Fisher, HessianDiagonal, Magnitude, MemoryAwareSynapses, Random, Taylor, Weights
from pared.training import Train

MARGIN = 2.5  # 1 point on MNIST; test noise on Fashion-MNIST is 2.5 times as large


@dataclass(frozen=True)
class WeightImportance(BySeed):
    """Every importance removes as many weights, ranked over all layers.

    Args:
        epochs: of the dense network.
        keep: the share of all weights that stays.
        samples: that importances look at.
    """

    name: ClassVar[str] = "weight_importance"
    claim: ClassVar[str] = (
        "Half the Fisher information times the squared weight removes weights at least as well as magnitude, the Fisher information "
        "alone clearly worse, and chance is far worse than both."
    )

    epochs: int = 5
    keep: float = 0.1
    samples: int = 2048

    def __post_init__(self) -> None:
        problems = Problems("lab.weight_importance")
        problems.number("epochs", self.epochs, low=0, integer=True)
        problems.number("keep", self.keep, low=0, high=1)
        problems.number("samples", self.samples, low=1, integer=True)
        problems.raise_if_any()

    def measure(self, seed: int) -> Row:
        """Test errors after removal by each importance."""
        dense, task = trained(lenet300, Train(epochs=self.epochs), seed)
        importances = {
            "random": Random(seed),
            "magnitude": Magnitude(),
            "removal": Fisher(samples=self.samples),
            "guard": Fisher(samples=self.samples, score="guard"),
            "taylor": Taylor(samples=self.samples),
            "mas": MemoryAwareSynapses(samples=self.samples),
            "hessian": HessianDiagonal(samples=self.samples),
        }
        row: Row = {"dense": error(dense, task)}
        for name, importance in importances.items():
            row[name] = error(Weights(keep=self.keep, importance=importance)(dense, task), task)
        return row

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Three claims on means, and whether the order is the same for every seed."""
        chance, size, removal, guard = (mean(rows, name) for name in ("random", "magnitude", "removal", "guard"))
        same = {tuple(sorted(("random", "magnitude", "removal", "guard"), key=row.__getitem__)) for row in rows}
        return judged(
            {
                f"½Fw² ({removal:.2f} %) at most {MARGIN} points worse than magnitude ({size:.2f} %)": removal <= size + MARGIN,
                f"F alone ({guard:.2f} %) at least {MARGIN} points worse than ½Fw²": guard >= removal + MARGIN,
                f"chance ({chance:.2f} %) at least 10 points worse than magnitude": chance >= size + 10,
                "the order of these four is the same for every seed": len(same) == 1,
            },
            table(
                rows,
                {
                    "dense": "dense",
                    "removal": "Fisher, ½Fw²",
                    "guard": "Fisher, F alone",
                    "magnitude": "magnitude",
                    "taylor": "Taylor",
                    "hessian": "Hessian diagonal, ½Hw²",
                    "mas": "memory aware synapses",
                    "random": "chance",
                },
            ),
        )


EXPERIMENT = WeightImportance()
