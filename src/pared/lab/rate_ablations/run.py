"""Take parts of rate-aware training away, one at a time: the price, the contexts in the price, the contexts in the coder."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from pared.architecture.nets import lenet300
from pared.core.problems import Problems
from pared.core.seeds import seed_everything
from pared.lab.claims import judged, mean
from pared.lab.experiment import Progress, Row, Verdict
from pared.lab.packed import dark_task, packed_row
from pared.quantize import Rate
from pared.training import Task, Train

VARIANTS = ("all on", "no contexts in the price", "no price")
DECAY = 3e-5


@dataclass(frozen=True)
class RateAblations:
    """One LeNet-300-100 on Fashion-MNIST, trained in three ways; each result is packed with contexts and without.

    Args:
        seeds: of weights and samples.
        epochs: of the dense network.
        train: epochs of rate-aware training.
        price: of a bit.
        rate: the learning rate of rate-aware training.
    """

    name: ClassVar[str] = "rate_ablations"
    claim: ClassVar[str] = (
        "The price on bits makes the file of a LeNet-300-100 at least five times as small as training on the same grid without it; "
        "contexts in the coder save at least a quarter, only training with the same contexts gets that much from them, and what it leaves "
        "takes at most 0.6 of the zeroth-order entropy of its tensors."
    )

    seeds: tuple[int, ...] = (0,)
    epochs: int = 12
    train: int = 30
    price: float = 6e-6
    rate: float = 1e-3

    def __post_init__(self) -> None:
        problems = Problems("lab.rate_ablations")
        for name in ("epochs", "train"):
            problems.number(name, getattr(self, name), low=0, integer=True)
        problems.number("price", self.price, above=0, high=1)
        problems.number("rate", self.rate, above=0, high=1)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """A row for each variant and seed."""
        return tuple(f"{variant} seed {seed}" for seed in self.seeds for variant in VARIANTS)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Measure the variants that aren't done; the dense network is trained once for all variants of a seed."""
        for seed in self.seeds:
            left = [variant for variant in VARIANTS if f"{variant} seed {seed}" not in done]
            if not left:
                continue
            seed_everything(seed)
            task = dark_task("fashion-mnist", seed)
            dense = lenet300()
            task.tune(dense, Train(epochs=self.epochs, weight_decay=DECAY))
            for variant in left:
                seed_everything(seed)
                yield {"key": f"{variant} seed {seed}", "seed": seed, "variant": variant, **self.measure(variant, dense, task)}

    def measure(self, variant: str, dense: nn.Module, task: Task) -> Row:
        """Accuracy, and bytes of weights with all codings and with those without contexts."""
        method = Rate(price=self.price, train=Train(epochs=self.train, learning_rate=self.rate))
        if variant == "no price":
            method = dataclasses.replace(method, price=0.0)
        if variant == "no contexts in the price":
            method = dataclasses.replace(method, contexts=False)
        network = method(dense, dataclasses.replace(task, teacher=dense))
        with tempfile.TemporaryDirectory() as folder:
            row = packed_row(network, task, Path(folder))
            row["static"] = packed_row(network, task, Path(folder), "static")["weights"]
        row["nonzero"] = sum(int(layer.weight.count_nonzero()) for layer in network.children() if isinstance(layer, nn.Linear))
        return row

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Three claims on means over seeds."""
        found = {variant: [row for row in rows if row["variant"] == variant] for variant in VARIANTS}
        if not all(found.values()):
            return Verdict("unfinished", "Variants are missing.")
        names = ("weights", "static", "entropy", "test", "valid", "nonzero", "bytes")
        means = {variant: {name: mean(own, name) for name in names} for variant, own in found.items()}
        full, plain, free = (means[variant] for variant in VARIANTS)
        saved = {name: 1 - each["weights"] / each["static"] for name, each in zip(("full", "plain"), (full, plain), strict=True)}
        claims = {
            f"the price makes the weights at least five times as small ({free['weights']:,.0f} to {full['weights']:,.0f} bytes)": (
                full["weights"] * 5 <= free["weights"]
            ),
            f"contexts in the coder save at least a quarter ({100 * saved['full']:.0f} %)": saved["full"] >= 0.25,
            f"they save less where the price knew none ({100 * saved['plain']:.0f} %)": saved["plain"] < saved["full"],
            f"with all on, at most 0.6 of the zeroth-order entropy ({full['weights'] / full['entropy']:.2f})": (
                full["weights"] <= 0.6 * full["entropy"]
            ),
        }
        head = (
            "variant", "validation", "test", "weights, bytes", "without contexts in the coder", "zeroth-order entropy", "file, bytes",
            "weights that aren't 0",
        )  # fmt: skip
        lines = [
            (name, f"{m['valid']:.2f}", f"{m['test']:.2f}", f"{m['weights']:,.0f}", f"{m['static']:,.0f}", f"{m['entropy']:,.0f}",
             f"{m['bytes']:,.0f}", f"{m['nonzero']:,.0f}")
            for name, m in means.items()
        ]  # fmt: skip
        return judged(claims, (head, *lines))


EXPERIMENT = RateAblations()
