"""What experiments on small networks share: a network trained from a seed, and a verdict from several claims."""

from __future__ import annotations

import dataclasses
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pared import data
from pared.core.seeds import seed_everything
from pared.data.batches import Batches
from pared.data.transforms import Normalize
from pared.lab.experiment import Progress, Row, Verdict
from pared.training import Task, Train, evaluate


@dataclass(frozen=True)
class BySeed(ABC):
    """An experiment with one row for every seed.

    Args:
        seeds: of weights, samples, augmentation and chance.
    """

    seeds: tuple[int, ...] = (0, 1, 2)

    def keys(self) -> tuple[str, ...]:
        """A seed each."""
        return tuple(f"seed {seed}" for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Measure the seeds that aren't done."""
        for seed, key in zip(self.seeds, self.keys(), strict=True):
            if key not in done:
                yield {"key": key, "seed": seed, **self.measure(seed)}

    @abstractmethod
    def measure(self, seed: int) -> Row:
        """What is measured with one seed."""


def trained(build: Callable[[], nn.Module], plan: Train, seed: int) -> tuple[nn.Module, Task]:
    """A network and Fashion-MNIST, both from one seed: initial weights, order of the samples, augmentation."""
    seed_everything(seed)
    task = data.load("fashion-mnist", seed)
    network = build()
    task.tune(network, plan)
    return network, task


def undistorted(name: str, seed: int) -> Task:
    """A data set of drawings without augmentation, and scaled so that black stays zero: weights of pixels that never light up then
    change nothing but what weight decay takes from them.
    """
    task = data.load(name, seed)
    assert isinstance(task.normalize, Normalize)
    return dataclasses.replace(task, augment=None, normalize=Normalize([0.0], task.normalize.std.flatten().tolist()))


def fewer(task: Task, samples: int, seed: int) -> Task:
    """The same task with the first samples of its training split only, which must lie in memory."""
    train: Any = task.train
    order = {"shuffle": True, "seed": seed, "full_scale": train.full_scale}
    return dataclasses.replace(task, train=Batches(train.inputs[:samples], train.targets[:samples], train.batch_size, **order))


def error(model: nn.Module, task: Task) -> float:
    """Test error in percent."""
    return round(100 * (1 - evaluate(model, task, "test")), 2)


def mean(rows: Sequence[Row], column: str) -> float:
    """Over rows, to two digits."""
    return round(statistics.mean(row[column] for row in rows), 2)


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """A line for every column, given with its title: the mean over rows, then each row."""
    head = ("test error, %", "mean", *(f"seed {row['seed']}" for row in rows))
    return (head, *((title, f"{mean(rows, name):.2f}", *(f"{row[name]:.2f}" for row in rows)) for name, title in columns.items()))


def judged(claims: Mapping[str, bool], figures: tuple[tuple[str, ...], ...]) -> Verdict:
    """All claims hold: reproduced; some: partly; none: did not reproduce.

    >>> judged({"a < b (1, 2)": True}, ()).outcome
    'reproduced'
    """
    held = sum(claims.values())
    text = " ".join(f"{statement}: {'yes' if true else 'no'}." for statement, true in claims.items())
    if held == len(claims):
        return Verdict("reproduced", text, figures)
    return Verdict("partly reproduced" if held else "did not reproduce", text, figures)
