"""How much to cut for a target: a share of the multiply-adds, the parameters, the file's bytes or the time that the original has."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from torch import nn

from pared.core.bisection import bisect
from pared.graph.analysis import Analysis, analyse
from pared.graph.counts import count
from pared.graph.cutting import Cut
from pared.graph.tracing import trace_or_capture
from pared.measure.deployed import deploy
from pared.prune.allocation import Scores
from pared.prune.chooser import Chooser
from pared.prune.importance import Importance
from pared.prune.importance.protocol import scores_of
from pared.training import Task

Of: TypeAlias = Literal["neurons", "macs", "parameters", "bytes", "latency"]

FILLINGS = 12
"""How many enlargements are tried when the search ends below its target; each takes a cut."""

CORRECTIONS = 5
"""How often an estimate is corrected by a true cost before the search ends; one or two do for bytes."""

_log = logging.getLogger(__name__)


class Cost(Protocol):
    """What a cut network costs, as a share of what the original costs.

    Attributes:
        near: a result so close below its target (as a share of it) ends the search.
    """

    near: float

    def settle(self, trials: Trials, counts: Mapping[str, int]) -> dict[str, int]:
        """The counts of classes that are really cut where these are wanted."""
        ...

    def estimate(self, trials: Trials, counts: Mapping[str, int]) -> float:
        """About what a cut would cost; called for every trial of a search."""
        ...

    def exact(self, cut: Cut) -> float:
        """What a cut does cost; called for what a search ends at."""
        ...


@dataclass(frozen=True)
class Reached:
    """A cut and what it costs, as a share of the original."""

    cut: Cut
    counts: dict[str, int]
    cost: float


class Trials:
    """Cuts of one network by one chooser. The network is analysed, and every neuron scored, only once.

    Args:
        model: is not changed.
        example_inputs: prepared.
        chooser: its share is the one that varies.
        leave: module paths whose outputs keep their width.
    """

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...], chooser: Chooser, leave: tuple[str, ...] = ()) -> None:
        self.model, self.example_inputs, self.leave = model, example_inputs, leave
        self.chooser = dataclasses.replace(chooser, importance=_Remembered(chooser.importance))
        self.analysis = analyse(trace_or_capture(model, example_inputs), leave)
        self._last: tuple[dict[str, int], Cut] | None = None

    def counts(self, share: float) -> dict[str, int]:
        """How many neurons of each class stay if the share does."""
        return dataclasses.replace(self.chooser, keep=share).counts(self.analysis)

    def cut(self, counts: Mapping[str, int]) -> Cut:
        """A cut that keeps so many of each class."""
        if self._last is None or self._last[0] != counts:
            chooser = dataclasses.replace(self.chooser, stay=counts)
            self._last = dict(counts), chooser.cut(self.model, self.example_inputs, self.leave)
        return self._last[1]


class _Remembered:
    """An importance whose scores are computed once for the same analysis."""

    def __init__(self, importance: Importance) -> None:
        self.importance = importance
        self._scores: dict[bytes, Scores] = {}
        if hasattr(importance, "normalize"):
            self.normalize = importance.normalize  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, analysis: Analysis, task: Task | None) -> Scores:
        key = analysis.root.tobytes() + analysis.frozen.tobytes()
        if key not in self._scores:
            self._scores[key] = scores_of(self.importance, analysis, task)
        return self._scores[key]


class Counted:
    """Multiply-adds or parameters, counted on every trial."""

    near = 0.01

    def __init__(self, of: Literal["macs", "parameters"], model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
        self.of, self.example_inputs = of, example_inputs
        self.whole = self._count(model)

    def settle(self, trials: Trials, counts: Mapping[str, int]) -> dict[str, int]:
        """As wanted."""
        return dict(counts)

    def estimate(self, trials: Trials, counts: Mapping[str, int]) -> float:
        """Cut and count."""
        return self.exact(trials.cut(counts))

    def exact(self, cut: Cut) -> float:
        """Count."""
        return self._count(cut.model) / max(1, self.whole)

    def _count(self, model: nn.Module) -> int:
        found = count(model, self.example_inputs)
        return found.macs if self.of == "macs" else found.params


class FileBytes:
    """Bytes of the deployed file: estimated from the tensors' bytes, exactly those of an export in the end."""

    near = 0.01

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.task = task
        self.whole, self.tensors = self._bytes(model), _tensor_bytes(model)

    def settle(self, trials: Trials, counts: Mapping[str, int]) -> dict[str, int]:
        """As wanted."""
        return dict(counts)

    def estimate(self, trials: Trials, counts: Mapping[str, int]) -> float:
        """As many bytes less as the tensors have."""
        return 1 - (self.tensors - _tensor_bytes(trials.cut(counts).model)) / self.whole

    def exact(self, cut: Cut) -> float:
        """Export and look."""
        return self._bytes(cut.model) / self.whole

    def _bytes(self, model: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return deploy(model, self.task, Path(folder) / "model.onnx").stat().st_size


def reach(trials: Trials, cost: Cost, target: float) -> Reached:
    """The cut that keeps the most and costs at most `target`, a share of what the original costs.

    Shares are tried by `bisect` on the estimate. Where the true cost of what comes out is another, the estimate is shifted by the
    difference and the search repeated. If even the smallest share costs more, that cut is returned and the log says so.

    Args:
        trials: of the network to be cut.
        cost: what is counted or measured.
        target: greater than 0.
    """
    estimates: dict[tuple[tuple[str, int], ...], float] = {}
    found: dict[tuple[tuple[str, int], ...], Reached] = {}
    shift = 0.0

    def about(share: float) -> float:
        counts = cost.settle(trials, trials.counts(share))
        key = tuple(sorted(counts.items()))
        if key not in estimates:
            estimates[key] = cost.estimate(trials, counts)
        return estimates[key] + shift

    def look(share: float) -> Reached:
        counts = cost.settle(trials, trials.counts(share))
        key = tuple(sorted(counts.items()))
        if key not in found:
            cut = trials.cut(counts)
            found[key] = Reached(cut, counts, cost.exact(cut))
        return found[key]

    for _ in range(CORRECTIONS):
        seen = len(found)
        share = bisect(about, target, min(1.0, target) ** 0.5, cost.near)  # most costs are products of two widths
        reached = look(share)
        if len(found) == seen or (1 - cost.near) * target <= reached.cost <= target:
            break
        shift += reached.cost - about(share)
    if not any(reached.cost <= target for reached in found.values()):
        look(0.0)
    fitting = [reached for reached in found.values() if reached.cost <= target]
    if fitting:
        best = max(fitting, key=lambda reached: reached.cost)
        return fill(trials, cost, target, best) if isinstance(cost, Counted) else best
    nearest = min(found.values(), key=lambda reached: reached.cost)
    _log.warning("prune.neurons: the target %.3g can't be reached within floor, cap, leave and only; %.3g is.", target, nearest.cost)
    return nearest


def fill(trials: Trials, cost: Counted, target: float, reached: Reached) -> Reached:
    """Use what rounding has left of a target: single classes grow, in the order in which a larger share would let them, where they fit.

    Args:
        trials: of the network to be cut.
        cost: what is counted.
        target: the share that the result may cost.
        reached: a cut that costs less.
    """
    refused: set[str] = set()
    tries = 0
    for share in np.linspace(0, 1, 257):
        for key, number in trials.counts(float(share)).items():
            if reached.cost >= (1 - cost.near) * target or tries == FILLINGS:
                return reached
            if number > reached.counts[key] and key not in refused:
                tries += 1
                counts = reached.counts | {key: number}
                cut = trials.cut(counts)
                larger = Reached(cut, counts, cost.exact(cut))
                if larger.cost <= target:
                    reached = larger
                else:
                    refused.add(key)
    return reached


def _tensor_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())
