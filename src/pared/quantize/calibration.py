"""Run a captured graph on calibration data and note the range of values at chosen nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from pared.core.errors import ModelError
from pared.quantize.affine import ACTIVATION_LEVELS, Range, affine_range
from pared.training.samples import Inputs

CalibrationMethod = Literal["minmax", "ema", "percentile", "mse", "kl"]

BINS = 2048
DECAY = 0.99
"""Of the running mean of "ema", as in quantization-aware training (1712.05877, section 3.1: close to 1)."""


def calibrate(
    module: fx.GraphModule, nodes: Collection[fx.Node], batches: Inputs, method: CalibrationMethod, levels: int = ACTIVATION_LEVELS
) -> dict[fx.Node, Range]:
    """The range of values at each of `nodes` over all batches.

    "ema" is the running mean of the extremes of each batch, with a decay of 0.99 and corrected for its beginning, so that of few batches
    it is nearly their plain mean; all others look at all values together, see `affine_range`, which makes room for `levels` integers.

    Raises:
        ModelError: if values aren't finite.
    """
    extremes: dict[fx.Node, _Extremes] = {node: _Extremes() for node in nodes}
    _run(module, extremes, batches)
    if method == "ema":
        return {node: seen.running() for node, seen in extremes.items()}
    if method == "minmax":
        return {node: (min(seen.low, 0.0), max(seen.high, 0.0)) for node, seen in extremes.items()}
    histograms = {node: _Histogram(min(seen.low, 0.0), max(seen.high, 0.0)) for node, seen in extremes.items()}
    _run(module, histograms, batches)
    return {node: affine_range(seen.counts, seen.low, seen.high, method, levels=levels) for node, seen in histograms.items()}


@dataclass
class _Extremes:
    low: float = float("inf")
    high: float = float("-inf")
    sums: tuple[float, float] = (0.0, 0.0)
    weight: float = 0.0

    def note(self, value: Tensor, name: str) -> None:
        if value.numel() == 0:
            return
        low, high = (float(entry) for entry in torch.aminmax(value.detach()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ModelError(f"{name}: values aren't finite on the calibration data, so they have no range. Check the inputs and weights.")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.sums = DECAY * self.sums[0] + (1 - DECAY) * low, DECAY * self.sums[1] + (1 - DECAY) * high
        self.weight = DECAY * self.weight + 1 - DECAY

    def running(self) -> Range:
        """The running mean, with 0 in it."""
        if self.weight == 0:
            return 0.0, 0.0
        return min(self.sums[0] / self.weight, 0.0), max(self.sums[1] / self.weight, 0.0)


@dataclass
class _Histogram:
    low: float
    high: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def note(self, value: Tensor, name: str) -> None:
        if self.low < self.high:
            self.counts += torch.histc(value.detach().float().cpu(), bins=BINS, min=self.low, max=self.high)


class _Watch(fx.Interpreter):
    """An interpreter that shows the values of some nodes to their observers."""

    def __init__(self, module: fx.GraphModule, observers: dict[fx.Node, Any]) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.observers:
            self.observers[n].note(value, n.name)
        return value


def _run(module: fx.GraphModule, observers: dict[fx.Node, Any], batches: Iterable[tuple[Tensor, ...]]) -> None:
    watch = _Watch(module, observers)
    with torch.no_grad():
        for batch in batches:
            watch.run(*batch)
