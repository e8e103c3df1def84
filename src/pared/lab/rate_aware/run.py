"""Train LeNets with a price on the bits of their packed files, and read errors and bytes off these files."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from pared.architecture.nets import lenet5, lenet300
from pared.core.problems import Problems
from pared.core.seeds import seed_everything
from pared.lab.claims import judged
from pared.lab.experiment import Progress, Row, Verdict
from pared.lab.packed import dark_task, packed_row
from pared.quantize import Rate
from pared.training import Train, evaluate

DECAY = 3e-5  # of the dense networks


@dataclass(frozen=True)
class Setup:
    """A network, its data, and how it is trained.

    Attributes:
        network: builds it.
        data: the name of the data set.
        dense: epochs of the dense network.
        stages: prices and epochs of rate-aware training, one after the other.
        goals: bytes of weights that are to be reached: solid and stretch at a loss of 0.3 points, solid and stretch at 1 point.
    """

    network: str
    data: str
    dense: int
    rate: float
    stages: tuple[tuple[float, int], ...]
    goals: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """As it stands in keys and tables."""
        return f"{self.network} {self.data}"


SETUPS = (
    Setup(
        "lenet300", "mnist-10k", 20, 1e-3, ((4e-6, 400), (1.2e-5, 200), (3e-5, 150), (6e-5, 150), (1.2e-4, 100)),
        (3500, 2200, 2000, 1200),
    ),
    Setup("lenet300", "fashion-mnist", 12, 1e-3, ((1.5e-6, 80), (3e-6, 50), (6e-6, 30), (1.2e-5, 30)), (10_000, 6000, 5000, 3200)),
    Setup("lenet5", "mnist-10k", 10, 1e-3, ((1e-5, 8), (3e-5, 10), (6e-5, 10), (1.2e-4, 10), (2.4e-4, 10)), (4000, 2000, 1300, 900)),
    Setup("lenet5", "fashion-mnist", 4, 1e-3, ((4e-6, 3), (8e-6, 3), (1.6e-5, 3), (3.2e-5, 3)), (16_000, 8000, 6500, 4000)),
)  # fmt: skip
TOLERANCES = (0.3, 1.0)
NETWORKS = {"lenet300": lenet300, "lenet5": lenet5}


@dataclass(frozen=True)
class RateAware:
    """The curve of error against bytes of four networks, each from several seeds.

    Args:
        seeds: of weights and samples.
        only: names of setups; empty: all.
        jobs: how many rows are measured at a time, each in a process of one thread; they come in the order in which they end.
    """

    name: ClassVar[str] = "rate_aware"
    claim: ClassVar[str] = (
        "Trained with a price on the bits of their packed files, LeNet-300-100 and LeNet-5 lose at most 0.3 points against a dense network "
        "trained as long at 10 and 16 kB of weights on Fashion-MNIST, at 3.5 and 4 kB on MNIST-10k, and at most 1 point at 5, 6.5, 2 and "
        "1.3 kB."
    )

    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()
    jobs: int = 1

    def __post_init__(self) -> None:
        problems = Problems("lab.rate_aware")
        known = [setup.name for setup in SETUPS]
        problems.check(set(self.only) <= set(known), "only", f"some of {', '.join(known)}", self.only)
        problems.number("jobs", self.jobs, low=1, integer=True)
        problems.raise_if_any()

    def setups(self) -> tuple[Setup, ...]:
        """Those that are run."""
        return tuple(setup for setup in SETUPS if not self.only or setup.name in self.only)

    def keys(self) -> tuple[str, ...]:
        """All seeds of a network, then those of the next."""
        return tuple(f"{setup.name} seed {seed}" for setup in self.setups() for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Measure what isn't done."""
        pairs = [(setup, seed) for setup in self.setups() for seed in self.seeds]
        left = [pair for pair, key in zip(pairs, self.keys(), strict=True) if key not in done]
        with ProcessPoolExecutor(self.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            for future in as_completed([pool.submit(measure, *pair) for pair in left]):
                yield future.result()

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Two claims for each network, and a table of all that validation chooses."""
        claims: dict[str, bool] = {}
        lines: list[tuple[str, ...]] = []
        for setup in self.setups():
            own = [row for row in rows if row["setup"] == setup.name]
            if not own:
                continue
            for tolerance, solid, stretch in zip(TOLERANCES, setup.goals[::2], setup.goals[1::2], strict=True):
                chosen = [choose(row, tolerance) for row in own]
                size = round(statistics.mean(point["weights"] for point in chosen))
                loss = round(statistics.mean(row["baseline"]["test"] - point["test"] for row, point in zip(own, chosen, strict=True)), 2)
                met = size <= solid and loss <= tolerance
                claims[f"{setup.name}: at most {tolerance} points lost ({loss:.2f}) at no more than {solid:,} bytes ({size:,})"] = met
                whole = round(statistics.mean(point["bytes"] for point in chosen))
                dense = statistics.mean(row["baseline"]["test"] for row in own)
                original = statistics.mean(row["float_bytes"] for row in own)
                reached = "stretch" if met and size <= stretch else "solid" if met else "missed"
                lines.append((
                    setup.name, f"{tolerance}", f"{dense:.2f}", f"{dense - loss:.2f}", f"{loss:.2f}", f"{size:,}", f"{whole:,}",
                    f"{original / whole:.0f}", f"{solid:,} / {stretch:,}", reached, str(len(own)),
                ))  # fmt: skip
        head = (
            "network",
            "tolerance",
            "dense test",
            "test",
            "lost",
            "weights, bytes",
            "file, bytes",
            "× smaller than float32",
            "goal",
            "",
            "seeds",
        )
        return judged(claims, (head, *lines, *curves(rows)))


def choose(row: Row, tolerance: float) -> Row:
    """The smallest point that loses at most `tolerance` points on validation; the most accurate one where none does."""
    good = [point for point in row["points"] if point["valid"] >= round(row["baseline"]["valid"] - tolerance, 2)]
    return min(good, key=lambda point: point["weights"]) if good else max(row["points"], key=lambda point: point["valid"])


def curves(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """All points, means over seeds, as further lines of the table."""
    names = list(dict.fromkeys(row["setup"] for row in rows))
    for name in names:
        own = [row for row in rows if row["setup"] == name]
        for at, point in enumerate(own[0]["points"]):
            points = [row["points"][at] for row in own]
            weights, whole, test = (statistics.mean(each[column] for each in points) for column in ("weights", "bytes", "test"))
            dense = statistics.mean(row["baseline"]["test"] for row in own)
            yield (
                name, f"price {point['price']:g}", f"{dense:.2f}", f"{test:.2f}", f"{dense - test:.2f}", f"{weights:,.0f}",
                f"{whole:,.0f}", f"{own[0]['float_bytes'] / whole:.0f}", "", "", str(len(own)),
            )  # fmt: skip


def measure(setup: Setup, seed: int) -> Row:
    """One curve: the better of two dense networks, and a file for each price."""
    seed_everything(seed)
    task = dark_task(setup.data, seed)
    dense = NETWORKS[setup.network]()
    if setup.network == "lenet5":
        dense = dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # trains in half the time
    task.tune(dense, Train(epochs=setup.dense, weight_decay=DECAY))
    control = copy.deepcopy(dense)
    task.tune(control, Train(epochs=sum(epochs for _, epochs in setup.stages), weight_decay=DECAY))
    baseline = max((dense, control), key=lambda network: evaluate(network, task, "valid"))
    taught = dataclasses.replace(task, teacher=baseline)
    points: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        row = packed_row(baseline, task, Path(folder), "raw")
        network = dense
        for price, epochs in setup.stages:
            network = Rate(price=price, train=Train(epochs=epochs, learning_rate=setup.rate))(network, taught)
            points.append({"price": price, **packed_row(network, task, Path(folder)), "widths": widths(network)})
    kept = {name: row[name] for name in ("valid", "test")}
    key = {"key": f"{setup.name} seed {seed}", "setup": setup.name, "seed": seed}
    return {**key, "baseline": kept, "dense": round(100 * evaluate(dense, task, "test"), 2), "float_bytes": row["bytes"], "points": points}


def widths(network: nn.Module) -> list[int]:
    """Outputs of each layer."""
    return [layer.weight.shape[0] for layer in network.children() if isinstance(layer, nn.Linear | nn.Conv2d)]


EXPERIMENT = RateAware()
