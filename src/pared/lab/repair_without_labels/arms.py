"""All ways to cut and mend one network, the choice among them, and what is measured of the files."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared.graph import count
from pared.graph.cutting import Cut
from pared.lab.repair_without_labels.networks import Network, Sizes
from pared.measure import latency
from pared.measure.deployed import deploy
from pared.measure.metric import sample_inputs
from pared.prune import Magnitude, Reconstruction, recalibrate, reconstruct
from pared.prune.chooser import Chooser
from pared.prune.targets import Counted, Trials, reach
from pared.runtime import Engine
from pared.training import Task, evaluate

IMPORTANCES = {"magnitude": Magnitude, "reconstruction": Reconstruction}
ROUND_TO = 8


@dataclass(frozen=True)
class Arm:
    """A cut and a repair, and how near the result is to the original on the inputs to choose by.

    Attributes:
        cut: importance and widths.
        repair: one of `REPAIRS`.
        model: what came out.
        near: the metric's value.
        seconds: of the repair.
    """

    cut: str
    repair: str
    model: nn.Module
    near: float
    seconds: float


def least_squares(cut: Cut, original: nn.Module, task: Task, samples: int) -> None:
    """Weights alone."""
    reconstruct(cut, original, task, samples)


def batch_norm(cut: Cut, original: nn.Module, task: Task, samples: int) -> None:
    """Statistics alone."""
    recalibrate(cut.model, task, samples)


def both(cut: Cut, original: nn.Module, task: Task, samples: int) -> None:
    """Weights, then statistics."""
    reconstruct(cut, original, task, samples)
    recalibrate(cut.model, task, samples)


def nothing(cut: Cut, original: nn.Module, task: Task, samples: int) -> None:
    """As it was cut."""


Repair = Callable[[Cut, nn.Module, Task, int], None]
REPAIRS: Mapping[str, Repair] = {"no repair": nothing, "batch norm": batch_norm, "least squares": least_squares, "both": both}


class Bench:
    """One network with its file, and the widths of its cuts; these don't depend on the inputs.

    Args:
        network: with its inputs.
        keep: the share of multiply-adds that stays.
        sizes: numbers of inputs.
        out: a folder for files.
        everything: whether cuts of all classes are tried besides those of the inside of residual blocks.
    """

    def __init__(self, network: Network, keep: float, sizes: Sizes, out: Path, everything: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.network, self.keep, self.sizes, self.out = network, keep, sizes, out
        self.classes: dict[str, tuple[str, ...]] = {"inside": network.inside} | ({"all": ()} if everything else {})
        self.widths: dict[str, dict[str, int]] = {}
        self.by_magnitude: dict[str, Cut] = {}
        self.said: list[Tensor] = []  # by the original's file
        self.search_seconds: dict[str, float] = {}
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.model.modules())
        self.repairs = {name: repair for name, repair in REPAIRS.items() if norms or repair in (nothing, least_squares)}

    def measure(self, seed: int) -> dict[str, Any]:
        """Choose a cut by what least squares makes of it, then a repair for it; what came out is measured on the files."""
        task = self.network.task(self.sizes, seed)
        cuts: dict[str, Cut] = {}
        seconds: dict[str, float] = {}
        for classes in self.classes:
            for name, importance in IMPORTANCES.items():
                begin = time.perf_counter()
                cuts[f"{name}, {classes}"] = self._cut(importance(), classes, task)
                seconds[f"{name}, {classes}"] = round(time.perf_counter() - begin, 1)
        arms = [self._mended(name, cut, repair, task) for name, cut in cuts.items() for repair in ("no repair", "least squares")]
        chosen = self._best([arm for arm in arms if arm.repair == "least squares"]).cut
        arms += [
            self._mended(chosen, cuts[chosen], repair, task) for repair in self.repairs if repair not in ("no repair", "least squares")
        ]
        files = {
            "repaired": self._best([arm for arm in arms if arm.cut == chosen]),
            "bare": next(arm for arm in arms if (arm.cut, arm.repair) == (chosen, "no repair")),
            "best_bare": self._best([arm for arm in arms if arm.repair == "no repair"]),
        }
        return {
            **self._files(files, task),
            "chosen_by": {f"{arm.cut}, {arm.repair}": round(arm.near, 4) for arm in arms},
            "cut_seconds": seconds,
            "search_seconds": self.search_seconds,
            "repair_seconds": {f"{arm.cut}, {arm.repair}": round(arm.seconds, 1) for arm in arms},
        }

    def _cut(self, importance: Magnitude | Reconstruction, classes: str, task: Task) -> Cut:
        """So many neurons of every class stay that the multiply-adds are the share; which ones is the importance's choice."""
        model, example, only = self.network.model, task.example_inputs(), self.classes[classes]
        if classes not in self.widths:
            begin = time.perf_counter()
            trials = Trials(model, example, Chooser(self.keep, Magnitude(), only=only, round_to=ROUND_TO))
            reached = reach(trials, Counted("macs", model, example), self.keep)
            self.widths[classes], self.by_magnitude[classes] = reached.counts, reached.cut
            self.search_seconds[classes] = round(time.perf_counter() - begin, 1)
        if isinstance(importance, Magnitude):  # doesn't look at inputs
            return self.by_magnitude[classes]
        return Chooser(self.keep, importance, only=only, task=task, stay=self.widths[classes]).cut(model, example)

    def _mended(self, name: str, cut: Cut, repair: str, task: Task) -> Arm:
        own = copy.deepcopy(cut)
        begin = time.perf_counter()
        self.repairs[repair](own, self.network.model, task, self.sizes.calibration)
        seconds = time.perf_counter() - begin
        return Arm(name, repair, own.model, evaluate(own.model, task, "valid"), seconds)

    def _best(self, arms: list[Arm]) -> Arm:
        sign = 1 if self.network.metric.higher_is_better else -1
        return max(arms, key=lambda arm: sign * arm.near)

    def _files(self, arms: Mapping[str, Arm], task: Task) -> dict[str, dict[str, Any]]:
        """What is counted of the original and of arms, the time of one sample, and likeness on the inputs to report on."""
        files = {name: deploy(arm.model, task, self.out / f"{name}.onnx") for name, arm in arms.items()}
        if not self.said:
            self.said.append(answers_of(deploy(self.network.model, task, self.out / "original.onnx"), task))
        original = self.out / "original.onnx"
        times = latency({"original": original, "repaired": files["repaired"]}, sample_inputs(task, "test", 1))
        found = {"original": self._counted(self.network.model, original, task)}
        for name, arm in arms.items():
            likeness = self.network.likeness(answers_of(files[name], task), self.said[0])
            found[name] = self._counted(arm.model, files[name], task) | {"cut": arm.cut, "repair": arm.repair}
            found[name] |= {measure: round(value, 4) for measure, value in likeness.items()}
        for name, each in times.items():
            found[name]["latency_ms"] = round(each.median, 3)
        return found

    def _counted(self, model: nn.Module, file: Path, task: Task) -> dict[str, Any]:
        counted = count(model, task.example_inputs())
        return {"macs": counted.macs, "params": counted.params, "bytes": file.stat().st_size}


def answers_of(file: Path, task: Task) -> Tensor:
    """What a file says to the inputs to report on, in ONNX Runtime."""
    engine = Engine(file)
    return torch.cat([torch.from_numpy(engine.run(*(part.numpy() for part in inputs))[0]) for inputs, _ in task.test])
