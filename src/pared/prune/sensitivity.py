"""How much each class of neurons matters: cut one class at a time, and measure what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from pared.core.problems import Problems
from pared.graph.analysis import Analysis, analyse
from pared.graph.classes import CutClass, kept_count
from pared.graph.counts import count
from pared.graph.cutting import cut_model
from pared.graph.tracing import trace_or_capture
from pared.prune.importance import Importance, Magnitude
from pared.prune.importance.protocol import scores_of
from pared.training import Task, evaluate


@dataclass(frozen=True)
class SensitivityPoint:
    """A network of which one class was cut.

    Attributes:
        share: the share of the class that was to stay.
        neurons: how many stayed; more than the share where rows go as a whole or a cut can't be followed.
        metric: of the cut network, on the validation split.
        macs: of the cut network, for one sample.
    """

    share: float
    neurons: int
    metric: float
    macs: int


@dataclass(frozen=True)
class ClassSensitivity:
    """What cutting one class of neurons does.

    Attributes:
        layers: the modules that compute them.
        neurons: how many there are.
        points: one for each share, in the order asked for.
    """

    layers: tuple[str, ...]
    neurons: int
    points: tuple[SensitivityPoint, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The metric and the MACs of a network with one class cut at a time.

    Attributes:
        metric: name of the task's metric; its values are of the validation split.
        higher_is_better: which way it points.
        original: its value for the uncut network.
        macs: multiply-adds of the uncut network for one sample.
        shares: the shares that were tried.
        classes: in the order of the network.
    """

    metric: str
    higher_is_better: bool
    original: float
    macs: int
    shares: tuple[float, ...]
    classes: tuple[ClassSensitivity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def ranked(self) -> list[ClassSensitivity]:
        """The classes by the largest loss at any share, those that lose most first; equals stay in the network's order."""
        sign = 1 if self.higher_is_better else -1

        def least(found: ClassSensitivity) -> float:
            # NaN is the worst that can come out
            return min((-math.inf if math.isnan(point.metric) else sign * point.metric for point in found.points), default=math.inf)

        return sorted(self.classes, key=least)

    def __str__(self) -> str:
        head = f"{self.metric} on the validation split {self.original:.4f}, {self.macs:,} MACs; one class cut at a time"
        if not self.classes:
            return f"{head}\nnothing can be cut"
        columns = [f"keep {100 * share:g} %" for share in self.shares]
        rows = [["layers", "neurons", *(title for title in columns)]]
        for found in self.classes:
            cells = [f"{point.metric:.4f} ({_percent(point.macs, self.macs)} MACs)" for point in found.points]
            rows.append([_shortened(", ".join(found.layers)), str(found.neurons), *cells])
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([head, *lines])


def sensitivity(
    model: nn.Module,
    task: Task,
    shares: Sequence[float] = (0.75, 0.5, 0.25),
    importance: Importance | None = None,
    leave: Sequence[str] = (),
    norms: bool = False,
) -> Sensitivity:
    """Cut each class of neurons by itself, to each share, and measure the network that is left (Li et al. 1608.08710, section 3.2).

    Every number is that of a really cut network without fine-tuning: what falls steeply is what a plan should spare. For each class
    and share the model is captured, cut and evaluated once, so the time is (classes × shares + 1) evaluations of the validation split.
    Events for `task.report`: `{"event": "stage", "name", "index", "of"}` for every class and `{"event": "batch", "done", "total"}` for
    every cut network.

    Args:
        model: any module that `capture` accepts; unchanged, but moved to the task's device.
        task: gives the metric and the validation split.
        shares: the shares of a class to keep, each in [0, 1]; of 0 one neuron is left. Three by default: enough to see where a
            curve bends.
        importance: which neurons of a class go first; by default those whose weights have the smallest norm.
        leave: module paths whose outputs keep their width.
        norms: also classes over which a norm, a mean or a softmax runs, as in `cut`.

    Raises:
        SettingsError: if a setting is out of range, or a path in `leave` names no module.
        DataError: if the validation split is empty.
        ModelError, CaptureError: if the model can't be run or captured.

    >>> import torch
    >>> task = Task(*[[(torch.eye(4), torch.tensor([0, 1, 0, 1]))]] * 3)
    >>> found = sensitivity(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), task, shares=(0.5,))
    >>> found.classes[0].layers, found.macs, found.classes[0].points[0].macs
    (('0',), 48, 24)
    """
    problems = Problems("prune.sensitivity")
    problems.check(not isinstance(shares, str) and len(shares) > 0, "shares", "a list of numbers", shares)
    for place, share in enumerate(() if isinstance(shares, str) else shares):
        problems.number(f"shares[{place}]", share, low=0, high=1)
    problems.check(not isinstance(leave, str), "leave", "a list of module paths", leave)
    problems.raise_if_any()
    example = task.example_inputs()
    analysis = analyse(trace_or_capture(model.to(task.machine.device), example), tuple(leave))
    scorer = _Scorer(importance or Magnitude(), task)
    chosen = [found for found in analysis.classes if norms or not analysis.inexact(np.array(found.neurons))]
    measured = []
    original = evaluate(model, task, "valid")
    for index, found in enumerate(chosen, start=1):
        layers = tuple(dict.fromkeys(producer.parameter.rpartition(".")[0] or producer.parameter for producer in found.producers))
        task.report({"event": "stage", "name": ", ".join(layers), "index": index, "of": len(chosen)})
        points = []
        for done, share in enumerate(shares, start=1):
            points.append(_measure(model, task, _OneClass(found.neurons, float(share), scorer), tuple(leave)))
            task.report({"event": "batch", "done": done, "total": len(shares)})
        measured.append(ClassSensitivity(layers, len(found.neurons), tuple(points)))
    settings = (task.metric.name, task.metric.higher_is_better, original, count(model, example).macs)
    return Sensitivity(*settings, tuple(map(float, shares)), tuple(measured))


class _Scorer:
    """Scores of an importance, computed once for each way in which the neurons are tied: all captures of one model are alike."""

    def __init__(self, importance: Importance, task: Task) -> None:
        self.importance, self.task = importance, task
        self.known: dict[bytes, Any] = {}

    def __call__(self, analysis: Analysis) -> Any:
        key = analysis.root.tobytes()
        if key not in self.known:
            self.known[key] = scores_of(self.importance, analysis, self.task)
        return self.known[key]


@dataclass
class _OneClass:
    """A choice that cuts one class; notes how many of its neurons are to stay at the last call."""

    neurons: tuple[int, ...]
    share: float
    scorer: _Scorer
    stay: int = 0

    def __call__(self, analysis: Analysis) -> list[int]:
        """The roots to remove; the class is found again by its neurons, which may be tied or frozen by now."""
        own = set(analysis.root[list(self.neurons)].tolist())
        scores = self.scorer(analysis).copy()
        scores[analysis.frozen] = np.inf
        removed = [root for found in analysis.classes if own & set(found.neurons) for root in self._choose(found, scores)]
        gone = set(removed)
        self.stay = sum(int(root) not in gone for root in analysis.root[list(self.neurons)])
        return removed

    def _choose(self, found: CutClass, scores: Any) -> list[int]:
        if self.share >= 1:
            return []
        now = len(found.neurons)
        return found.choose(scores, kept_count(now, self.share) / now)


def _measure(model: nn.Module, task: Task, choice: _OneClass, leave: tuple[str, ...]) -> SensitivityPoint:
    example = task.example_inputs()
    small = cut_model(model, example, choice, leave).model
    return SensitivityPoint(choice.share, choice.stay, evaluate(small, task, "valid"), count(small, example).macs)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _shortened(names: str, length: int = 40) -> str:
    return names if len(names) <= length else f"{names[: length - 1]}…"
