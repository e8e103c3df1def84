"""Remove weights of a LeNet-300-100 at once, in rounds, and without retraining."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from pared.architecture.nets import lenet300
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.core.seeds import seed_everything
from pared.lab.claims import error, judged, mean, undistorted
from pared.lab.experiment import Progress, Row, Verdict
from pared.prune import Weights
from pared.training import Train

MARGIN = 0.375  # 0.15 points on the 10,000 test digits of MNIST; noise here is 2.5 times as large
KEEP = {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26}  # the paper's table 3
COLUMNS = {"dense": "dense", "iterative": "in rounds", "one_shot": "at once", "untuned": "same mask, not retrained"}


@dataclass(frozen=True)
class IterativePruning:
    """A row for each data set and seed. In rounds or at once, retraining is the same: `rounds` times `tune` epochs.

    Args:
        seeds: of weights and samples.
        epochs: of the dense network, by data set.
        tune: epochs after each round, by data set.
        rounds: of pruning.
        learning_rate: of retraining.
        decay: weight decay in all trainings.
    """

    name: ClassVar[str] = "iterative_pruning"
    claim: ClassVar[str] = (
        "Removing weights in rounds with retraining loses less than removing as many at once, and nearly nothing at 8 % left."
    )

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: Mapping[str, int] = field(default_factory=lambda: {"fashion-mnist": 10, "mnist-10k": 30})
    tune: Mapping[str, int] = field(default_factory=lambda: {"fashion-mnist": 5, "mnist-10k": 6})
    rounds: int = 5
    learning_rate: float = 1e-3
    decay: float = 1e-4

    def __post_init__(self) -> None:
        problems = Problems("lab.iterative_pruning")
        problems.check(self.epochs.keys() == self.tune.keys(), "tune", f"given for {', '.join(self.epochs)}", list(self.tune))
        for name, by_data in (("epochs", self.epochs), ("tune", self.tune)):
            for epochs in by_data.values():
                problems.number(name, epochs, low=0, integer=True)
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.number("learning_rate", self.learning_rate, above=0)
        problems.number("decay", self.decay, low=0)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """A data set and a seed."""
        return tuple(f"{data} seed {seed}" for data in self.epochs for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Four test errors, and how many inputs of the border and of the centre the first layer still reads."""
        for key in self.keys():
            if key not in done:
                data, _, seed = key.partition(" seed ")
                yield {"key": key, "data": data, "seed": int(seed), **self._measure(data, int(seed))}

    def _measure(self, data: str, seed: int) -> Row:
        task = undistorted(data, seed)
        seed_everything(seed)
        dense = lenet300()
        task.tune(dense, Train(epochs=self.epochs[data], weight_decay=self.decay))
        row: Row = {"dense": error(dense, task)}
        plan = Train(epochs=self.tune[data], learning_rate=self.learning_rate, weight_decay=self.decay)
        in_rounds = Weights(keep=KEEP, rounds=self.rounds, tune=plan)
        for name, method in (("iterative", in_rounds), ("one_shot", dataclasses.replace(in_rounds, schedule="one-shot"))):
            small = bake(method(dense, task))
            row[name] = error(small, task)
            row[f"{name}_left"] = sum(int(layer.weight.count_nonzero()) for layer in linear_layers(small))
            row[f"{name}_border"], row[f"{name}_centre"] = reads(small)
            if name == "iterative":
                row["untuned"] = error(masked(dense, small), task)
        return row

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Four claims for each data set, on means over seeds."""
        claims: dict[str, bool] = {}
        lines: list[tuple[str, ...]] = [("mean test error, %", *COLUMNS.values(), "weights per pixel: border", "centre")]
        for data in dict.fromkeys(row["data"] for row in rows):
            own = [row for row in rows if row["data"] == data]
            dense, slow, fast, bare = (mean(own, name) for name in COLUMNS)
            border, centre = mean(own, "iterative_border"), mean(own, "iterative_centre")
            claims |= {
                f"{data}: in rounds ({slow:.2f} %) at most {MARGIN} points worse than dense ({dense:.2f} %)": slow <= dense + MARGIN,
                f"{data}: at once ({fast:.2f} %) worse than in rounds": fast > slow,
                f"{data}: the same mask without retraining ({bare:.2f} %) at least 5 points worse": bare >= slow + 5,
                f"{data}: border pixels keep fewer weights ({border:.1f} each) than the centre ({centre:.1f})": border < centre,
            }
            lines.append((data, *(f"{mean(own, name):.2f}" for name in COLUMNS), f"{border:.1f}", f"{centre:.1f}"))
            for row in own:
                counts = (f"{row[f'iterative_{part}']:.1f}" for part in ("border", "centre"))
                lines.append((f"seed {row['seed']}", *(f"{row[name]:.2f}" for name in COLUMNS), *counts))
        return judged(claims, tuple(lines))


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """In order."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def masked(dense: nn.Module, small: nn.Module) -> nn.Module:
    """The dense network with zeros where the small one has them."""
    result = copy.deepcopy(dense)
    with torch.no_grad():
        for layer, pruned in zip(linear_layers(result), linear_layers(small), strict=True):
            layer.weight.mul_(pruned.weight != 0)
    return result


def reads(model: nn.Module) -> tuple[float, float]:
    """Weights left per pixel of the outer two rows and columns, and of the others."""
    first = linear_layers(model)[0].weight.ne(0).sum(0).reshape(28, 28).double()
    centre = first[2:-2, 2:-2]
    border = (first.sum() - centre.sum()) / (first.numel() - centre.numel())
    return round(float(border), 2), round(float(centre.mean()), 2)


EXPERIMENT = IterativePruning()
