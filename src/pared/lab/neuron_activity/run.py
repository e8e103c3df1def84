"""Remove hidden units that are mostly zero, and units that seldom are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pared.architecture.nets import lenet300
from pared.core.problems import Problems
from pared.core.seeds import seed_everything
from pared.graph.analysis import Analysis
from pared.lab.claims import BySeed, error, judged, mean, table, undistorted
from pared.lab.experiment import Row, Verdict
from pared.prune import Activity, Magnitude, Neurons, Random, cut
from pared.prune.chooser import Chooser
from pared.training import Task, Train

MARGIN = 2.5  # 1 point on MNIST; test noise is 2.5 times as large
COLUMNS = {
    "dense": "dense",
    "low": "most often zero removed",
    "high": "least often zero removed",
    "random": "chance",
    "magnitude": "smallest weights removed",
    "low_tuned": "most often zero removed in rounds, tuned",
    "high_tuned": "least often zero removed in rounds, tuned",
    "random_tuned": "chance in rounds, tuned",
}


@dataclass(frozen=True)
class Reversed:
    """Another importance upside down."""

    of: Activity

    def __call__(self, analysis: Analysis, task: Task | None) -> Any:
        """Negative scores."""
        return -self.of(analysis, task)


@dataclass(frozen=True)
class NeuronActivity(BySeed):
    """Half of the hidden units go, once by activity and once by its opposite.

    Args:
        data: a data set of drawings.
        epochs: of the dense network.
        decay: weight decay in all trainings.
        rounds: in which the units go where there is tuning.
        tune: epochs after each round.
        keep: the share of hidden units that stays.
        samples: that are counted.
    """

    name: ClassVar[str] = "neuron_activity"
    claim: ClassVar[str] = "Units that are most often zero can go for little, units that seldom are cost much."

    data: str = "fashion-mnist"
    epochs: int = 3
    decay: float = 1e-4
    rounds: int = 3
    tune: int = 5
    keep: float = 0.5
    samples: int = 5000

    def __post_init__(self) -> None:
        problems = Problems("lab.neuron_activity")
        problems.check(self.data in ("fashion-mnist", "mnist-10k"), "data", "fashion-mnist or mnist-10k", self.data)
        problems.number("epochs", self.epochs, low=0, integer=True)
        problems.number("decay", self.decay, low=0)
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.number("tune", self.tune, low=0, integer=True)
        problems.number("keep", self.keep, low=0, high=1)
        problems.number("samples", self.samples, low=1, integer=True)
        problems.raise_if_any()

    def measure(self, seed: int) -> Row:
        """Test errors before and after tuning; and what removing never active units changes on the data they were counted on."""
        seed_everything(seed)
        dense, task = lenet300(), undistorted(self.data, seed)
        task.tune(dense, Train(epochs=self.epochs, weight_decay=self.decay))
        plan = Train(epochs=self.tune, weight_decay=self.decay)
        activity = Activity(samples=self.samples)
        row: Row = {"dense": error(dense, task)}
        choices = {"low": activity, "high": Reversed(activity), "random": Random(seed), "magnitude": Magnitude()}
        for name, importance in choices.items():
            small = Chooser(self.keep, importance, task=task).cut(dense, task.example_inputs()).model
            row[name] = error(small, task)
            if f"{name}_tuned" in COLUMNS:
                tuned = Neurons(keep=self.keep, importance=importance, rounds=self.rounds, tune=plan, round_to=1)(dense, task)
                row[f"{name}_tuned"] = error(tuned, task)
        row["dead_units"], row["dead_change"] = dead_units(dense, task)
        return row

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Margins are 2.5 times those of MNIST."""
        dense, low, high, tuned = (mean(rows, name) for name in ("dense", "low", "high", "low_tuned"))
        change = max(row["dead_change"] for row in rows)
        units = sum(row["dead_units"] for row in rows)
        claims = {
            f"removing the half most often zero costs less than {MARGIN} points ({low - dense:.2f})": low - dense < MARGIN,
            f"removing the other half costs more than {5 * MARGIN} points ({high - dense:.2f})": high - dense > 5 * MARGIN,
            f"in rounds and tuned, the half most often zero costs less than {MARGIN} points ({tuned - dense:.2f})": tuned - dense < MARGIN,
        }
        if units:  # without any there is nothing to claim
            claims[f"{units} units that are zero on all training data can go without any change there ({change:.1e})"] = change <= 1e-5
        return judged(claims, table(rows, COLUMNS))


def dead_units(model: nn.Module, task: Task) -> tuple[int, float]:
    """How many units of the first hidden layer are zero on all training data, and what cutting them changes in outputs there."""
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    path = next(name for name, module in model.named_modules() if module is layers[0])
    batches = [task.prepare(inputs)[0] for inputs, _ in task.train]
    with torch.no_grad():
        alive = torch.stack([(layers[0](x.flatten(1)) > 0).sum(0) for x in batches]).sum(0)
        dead = int((alive == 0).sum())
        if dead in (0, len(alive)):
            return 0, 0.0
        small = cut(model, task.example_inputs(), {path: 1 - dead / len(alive)}, importance=Alive(path, tuple(alive.tolist())))
        change = max(float((small(x) - model(x)).abs().max()) for x in batches)
    return dead, change


@dataclass(frozen=True)
class Alive:
    """Given counts as scores of one layer."""

    path: str
    counts: tuple[int, ...]

    def __call__(self, analysis: Analysis, task: Task | None) -> Any:
        """The counts, by root."""
        scores = Magnitude()(analysis, task)
        for producer in analysis.producers:
            if producer.parameter == f"{self.path}.weight":
                scores[analysis.root[producer.atoms]] = self.counts
        return scores


EXPERIMENT = NeuronActivity()
