"""Cut two trained networks by a fifth of their multiply-adds and mend them from a few hundred inputs without labels."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pared.core.problems import Problems
from pared.lab.claims import judged
from pared.lab.experiment import Progress, Row, Verdict
from pared.lab.repair_without_labels.arms import Bench
from pared.lab.repair_without_labels.networks import NETWORKS, Sizes

TITLES = {"efficientnet-lite0": "EfficientNet-Lite0", "minilm": "MiniLM"}
MEASURES = {"efficientnet-lite0": ("agreement", "divergence", "cosine"), "minilm": ("cosine", "rank_correlation")}


@dataclass(frozen=True)
class RepairWithoutLabels:
    """Of each network, the best of several cuts and repairs by inputs kept for choosing, against the same cut without repair.

    Args:
        seeds: of the inputs that are calibrated and chosen on; those reported on are always the same.
        networks: which of the two.
        keep: the share of multiply-adds that stays.
        calibration: inputs that importances and repairs look at.
        validation: inputs to choose by.
        evaluation: inputs to report on.
        everything: try cuts of all classes too; by default only of those inside of residual blocks, see the card.
    """

    name: ClassVar[str] = "repair_without_labels"
    claim: ClassVar[str] = (
        "EfficientNet-Lite0 and the MiniLM sentence encoder, cut by 20 % of their multiply-adds and repaired from a few hundred inputs "
        "without labels, stay nearer to the original than the same cut without repair."
    )

    seeds: tuple[int, ...] = (0, 1, 2)
    networks: tuple[str, ...] = tuple(NETWORKS)
    keep: float = 0.8
    calibration: int = 256
    validation: int = 96
    evaluation: int = 512
    everything: bool = False

    def __post_init__(self) -> None:
        problems = Problems("lab.repair_without_labels")
        known = all(name in NETWORKS for name in self.networks)
        problems.check(known, "networks", f"names of {', '.join(NETWORKS)}", self.networks)
        problems.number("keep", self.keep, above=0, high=1)
        for name in ("calibration", "validation", "evaluation"):
            problems.number(name, getattr(self, name), low=2, integer=True)
        problems.check(isinstance(self.everything, bool), "everything", "true or false", self.everything)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """A network and a seed each."""
        return tuple(f"{name} seed {seed}" for name in self.networks for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Measure what isn't done; a network is loaded, and the widths of its cuts searched for, once."""
        sizes = Sizes(self.calibration, self.validation, self.evaluation)
        for name in self.networks:
            left = [seed for seed in self.seeds if f"{name} seed {seed}" not in done]
            bench = Bench(NETWORKS[name](), self.keep, sizes, out / name, self.everything) if left else None
            for seed in left:
                assert bench is not None
                yield {"key": f"{name} seed {seed}", "network": name, "seed": seed, **bench.measure(seed)}

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Repair has to help every network with every seed, by the first of its measures."""
        claims = {}
        for name in dict.fromkeys(row["network"] for row in rows):
            measure = MEASURES[name][0]
            pairs = [(row["repaired"][measure], row["bare"][measure]) for row in rows if row["network"] == name]
            listed = ", ".join(f"{after:.3f} against {before:.3f}" for after, before in pairs)
            claims[f"{TITLES[name]}: {measure} with the original is higher with repair on every seed ({listed})"] = all(
                after > before for after, before in pairs
            )
        return judged(claims, figures(rows))


def figures(rows: Sequence[Row]) -> tuple[tuple[str, ...], ...]:
    """A line for each network and measure: the chosen cut without and with repair, and the best cut without repair; means over seeds."""
    lines: list[tuple[str, ...]] = [("", "same cut, no repair", "repaired", "best cut without repair")]
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        for measure in MEASURES[name]:
            columns = ("bare", "repaired", "best_bare")
            lines.append(
                (f"{TITLES[name]}: {measure.replace('_', ' ')}", *(_means([row[column][measure] for row in mine]) for column in columns))
            )
        cost = {column: _share(mine, column) for column in ("macs", "params", "bytes", "latency_ms")}
        lines.append((f"{TITLES[name]}: of the original's {', '.join(cost)}", "", ", ".join(cost.values()), ""))
        lines.append((f"{TITLES[name]}: chosen", _chosen(mine, "bare"), _chosen(mine, "repaired"), _chosen(mine, "best_bare")))
    return tuple(lines)


def _means(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.3f} ({low:.3f} to {high:.3f})"


def _chosen(rows: Sequence[dict[str, Any]], column: str) -> str:
    """What the choice fell on, each once."""
    return "; ".join(dict.fromkeys(f"{row[column]['cut']}, {row[column]['repair']}" for row in rows))


def _share(rows: Sequence[dict[str, Any]], column: str) -> str:
    return f"{statistics.fmean(row['repaired'][column] / row['original'][column] for row in rows):.3f}"


EXPERIMENT = RepairWithoutLabels()
