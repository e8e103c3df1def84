"""Int8 and fewer bits from the deployed file: what they lose, whether it is what was simulated, its speed, and other tools' files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pared.core.problems import Problems
from pared.lab.experiment import Progress, Row, Verdict
from pared.lab.int8_against_peers import photos, small
from pared.lab.int8_against_peers.verdict import judge


@dataclass(frozen=True)
class Int8AgainstPeers:
    """A row for every small network and seed, one for EfficientNet-Lite0, one for single convolutions.

    Args:
        seeds: of lenet5: weights, samples, augmentation. The first is that of resnet20 and of the photos too.
        epochs: of the float networks.
        tune: epochs of few bits.
        samples: training samples of both.
        calibration: inputs that ranges are measured on, of pictures and of photos.
        rounding: of them, those that weights of EfficientNet-Lite0 are rounded on.
        evaluation: crops of photos that are reported on.
    """

    name: ClassVar[str] = "int8_against_peers"
    claim: ClassVar[str] = (
        "Int8 costs small networks at most 0.1 points, its file says the same as the simulation, and is at least 1.5 times as fast on "
        "convolutions of the sizes of ResNet-18; EfficientNet-Lite0 keeps 95 % of its answers, no fewer than with other tools; GPTQ and "
        "AdaRound are below nearest in every layer; LeNet-5 with 4 bits is within 0.2 points, and LSQ with 2 not behind PACT."
    )

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 5
    tune: int = 3
    samples: int = 20_000
    calibration: int = 128
    rounding: int = 16
    evaluation: int = 256

    def __post_init__(self) -> None:
        problems = Problems("lab.int8_against_peers")
        problems.check(len(self.seeds) > 0, "seeds", "one or more numbers", self.seeds)
        for name in ("epochs", "tune"):
            problems.number(name, getattr(self, name), low=0, integer=True)
        for name in ("samples", "calibration", "rounding", "evaluation"):
            problems.number(name, getattr(self, name), low=8, integer=True)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """The dear ones last."""
        return ("convolutions", *(f"lenet5 seed {seed}" for seed in self.seeds), "efficientnet-lite0", f"resnet20 seed {self.seeds[0]}")

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Measure what isn't done; deployed files are left in `out`."""
        plan = small.Plan(self.epochs, self.tune, self.samples, self.calibration)
        for key in self.keys():
            if key in done:
                continue
            net, _, seed = key.partition(" seed ")
            folder = out / key.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            row: Row = {"key": key, "net": net, "seed": int(seed or self.seeds[0])}
            if net == "convolutions":
                yield {**row, "ms": photos.convolutions(folder)}
            elif net == "efficientnet-lite0":
                yield {**row, **photos.measure(row["seed"], self.calibration, self.rounding, self.evaluation, folder)}
            else:
                yield {**row, **small.measure(net, row["seed"], plan, folder, few_bits=net == "lenet5")}

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Every part of the claim by itself."""
        return judge(rows)


EXPERIMENT = Int8AgainstPeers()
