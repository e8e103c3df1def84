"""The time of a cut network in the engine, as a share of the original's: predicted from the table, and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from pared.graph.analysis import Analysis
from pared.graph.cutting import Cut
from pared.prune.cost_table import CostTable, NetworkTimes
from pared.prune.targets import Trials

Measure = Callable[[nn.Module], tuple[float, float]]


class Latency:
    """The median time of one sample in the deployed file, on one thread.

    Args:
        measure: the times of the original and of a network in milliseconds; `Interleaved(model, task)`.
        original: the original network's time in milliseconds.
        table: what layers cost.
    """

    near = 0.05  # two measurements of one file differ by 2 %

    def __init__(self, measure: Measure, original: float, table: CostTable) -> None:
        self.measure, self.original, self.table = measure, original, table
        self._whole: float | None = None
        self._known: tuple[Analysis, NetworkTimes] | None = None

    def settle(self, trials: Trials, counts: Mapping[str, int]) -> dict[str, int]:
        """As many neurons of every class as cost no more time."""
        most = {key: room.most for key, room in trials.chooser.rooms(trials.analysis).items()}
        return self._times(trials.analysis).settle(counts, most)

    def estimate(self, trials: Trials, counts: Mapping[str, int]) -> float:
        """The original's time less what the table says that its layers have become faster."""
        times = self._times(trials.analysis)
        if self._whole is None:
            self._whole = times.total({})  # the first network of all is the original
        return 1 - (self._whole - times.total(counts)) / max(self.original, self._whole, 1e-9)

    def exact(self, cut: Cut) -> float:
        """Measure, in turn with the original."""
        original, small = self.measure(cut.model)
        return small / original

    def _times(self, analysis: Analysis) -> NetworkTimes:
        if self._known is None or self._known[0] is not analysis:
            self._known = analysis, NetworkTimes(analysis, self.table)
        return self._known[1]
