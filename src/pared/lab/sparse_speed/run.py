"""Time the convolutions of AlexNet as matrix products: dense, with scattered zeros, and with whole rows and columns gone."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.utils.benchmark import Timer

from pared.core.problems import Problems
from pared.lab.claims import judged
from pared.lab.experiment import Progress, Row, Verdict

# of one image of 227 x 227: outputs, inputs x kernel, positions, groups (Krizhevsky et al. 2012)
LAYERS = {
    "conv1": (96, 363, 3025, 1),
    "conv2": (256, 1200, 729, 2),
    "conv3": (384, 2304, 169, 1),
    "conv4": (384, 1728, 169, 2),
    "conv5": (256, 1728, 169, 2),
}
# zeros in percent by L1 training, and rows and columns gone by structured sparsity learning (Wen et al. 2016, table 4)
PAPER_ZEROS = {"conv1": 67.6, "conv2": 92.4, "conv3": 97.2, "conv4": 96.6, "conv5": 94.3}
MODERATE = (50.0, 70.0, 80.0, 90.0)


@dataclass(frozen=True)
class SparseSpeed:
    """At the same number of weights left, scattered or in whole columns.

    Args:
        seeds: of the values and of which are zero.
        rounds: in each of which every variant is timed once, in turn.
        seconds: that a variant is timed in a round.
    """

    name: ClassVar[str] = "sparse_speed"
    claim: ClassVar[str] = (
        "Scattered zeros make the layers of AlexNet slower than dense up to about 80 % zeros; as many weights gone in whole columns make "
        "them faster at any share."
    )

    seeds: tuple[int, ...] = (0,)
    rounds: int = 5
    seconds: float = 0.2

    def __post_init__(self) -> None:
        problems = Problems("lab.sparse_speed")
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.number("seconds", self.seconds, above=0)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """A layer, a share of zeros and a seed."""
        return tuple(
            f"{layer} {zeros} seed {seed}" for seed in self.seeds for layer in LAYERS for zeros in sorted((*MODERATE, PAPER_ZEROS[layer]))
        )

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Medians in milliseconds of dense, scattered and column-wise products, one thread."""
        for key in self.keys():
            if key not in done:
                layer, zeros, _, seed = key.split()
                times, left = self._times(layer, float(zeros), int(seed))
                yield {"key": key, "layer": layer, "zeros": float(zeros), "seed": int(seed), **times, **left}

    def _times(self, layer: str, zeros: float, seed: int) -> tuple[dict[str, float], dict[str, int]]:
        outputs, inputs, positions, groups = LAYERS[layer]
        generator = np.random.default_rng(seed)
        weight = generator.standard_normal((groups, outputs // groups, inputs), dtype=np.float32)
        columns = generator.standard_normal((groups, inputs, positions), dtype=np.float32)
        keep = max(1, round((1 - zeros / 100) * inputs))
        scattered = np.zeros_like(weight)
        for part, target in zip(weight, scattered, strict=True):
            chosen = generator.permutation(part.size)[: keep * part.shape[0]]  # exactly as many as whole columns leave
            target.flat[chosen] = part.flat[chosen]
        rows = [csr_matrix(part) for part in scattered]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says that its sparse tensors are in beta
            mkl = [torch.from_numpy(part).to_sparse_csr() for part in scattered]
        dense, activations = torch.from_numpy(weight), torch.from_numpy(columns)
        thin, fewer = dense[:, :, :keep].contiguous(), activations[:, :keep].contiguous()
        variants: dict[str, Callable[[], object]] = {
            "dense": lambda: torch.bmm(dense, activations),
            "scattered_scipy": lambda: [part @ x for part, x in zip(rows, columns, strict=True)],
            "scattered_torch": lambda: [part @ x for part, x in zip(mkl, activations, strict=True)],
            "columns": lambda: torch.bmm(thin, fewer),
        }
        medians: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(self.rounds):
            for name in list(variants) if number % 2 == 0 else list(reversed(variants)):
                timer = Timer("call()", globals={"call": variants[name]}, num_threads=1)
                medians[name].append(timer.blocked_autorange(min_run_time=self.seconds).median)
        times = {name: round(1000 * statistics.median(found), 4) for name, found in medians.items()}
        return times, {"weights_scattered": int(np.count_nonzero(scattered)), "weights_columns": thin.numel()}

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """By how much each is faster than dense; the better of both sparse products counts."""
        scattered = {row["key"]: row["dense"] / min(row["scattered_scipy"], row["scattered_torch"]) for row in rows}
        columns = {row["key"]: row["dense"] / row["columns"] for row in rows}
        low = [scattered[row["key"]] for row in rows if row["zeros"] <= 80]
        claims = {
            f"scattered zeros up to 80 % are slower than dense in every layer (at best {max(low, default=0):.2f} times)": max(
                low, default=0
            )
            < 1,
            f"whole columns are faster in every layer (at least {min(columns.values()):.2f} times)": min(columns.values()) > 1,
            "columns beat scattered zeros everywhere": all(columns[key] > scattered[key] for key in columns),
        }
        shares = sorted({row["zeros"] for row in rows})
        head = ("times faster than dense, scattered / columns", *(f"{share:g} %" for share in shares))
        lines = []
        for layer in dict.fromkeys(row["layer"] for row in rows):
            by_share = {row["zeros"]: row["key"] for row in rows if row["layer"] == layer}
            cells = [f"{scattered[by_share[share]]:.2f} / {columns[by_share[share]]:.2f}" if share in by_share else "" for share in shares]
            lines.append((layer, *cells))
        return judged(claims, (head, *lines))


EXPERIMENT = SparseSpeed()
