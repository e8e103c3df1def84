"""How often neurons are active."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from pared.graph.analysis import Analysis
from pared.graph.labels import Labels
from pared.prune.importance.magnitude import Magnitude
from pared.prune.importance.protocol import Normalize, Scores, check_samples
from pared.prune.importance.samples import training_samples
from pared.prune.importance.sums import Sums, observe, with_magnitude
from pared.prune.observe import operator_name
from pared.training import Task

_RECTIFIERS = {"relu", "relu_", "relu6", "relu6_", "threshold", "threshold_"}


@dataclass(frozen=True)
class Activity:
    """How often a neuron is not zero after its ReLU, over samples and positions: one minus APoZ (Hu et al., 1607.03250, section 3.1).

    Counted in eval mode on training samples without augmentation. Neurons of a class without a ReLU (GELU, plain convolutions) have no
    zeros to count; such a class is ranked by `Magnitude`, which also breaks ties.

    Args:
        samples: how many training samples to look at; 2048 pin a fraction to about 1 point.
        normalize: "none" by default: shares compare over layers; "layer" divides them by the mean of their class.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task, or if its training split is empty.

    >>> Activity(samples=512).samples
    512
    """

    samples: int = 2048
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        check_samples("importance.activity", self.samples, self.normalize).raise_if_any()

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Run the graph on training data and count."""
        batches = training_samples(task, self.samples, analysis.captured.module, "importance.activity")
        magnitude = Magnitude()(analysis)
        tie_break = magnitude / max(float(magnitude.max()), 1e-12) * 1e-6
        activity, counted = active_fractions(analysis, (inputs for inputs, _ in batches))
        return with_magnitude(analysis, activity + tie_break, counted, self.normalize)


def active_fractions(analysis: Analysis, batches: Iterable[tuple[Tensor, ...]]) -> tuple[Scores, NDArray[np.bool_]]:
    """For every root, the share of values after a ReLU that are not zero, and whether it has a ReLU at all.

    Raises:
        DataError: if there is no batch.
    """
    axes = _rectified_axes(analysis)
    sums = Sums(analysis)

    def see(node: fx.Node, arguments: tuple[Any, ...], value: Tensor) -> None:
        active = (value != 0).movedim(axes[node], 0).flatten(start_dim=1)
        sums.add(analysis.labels[node].on(axes[node]).atoms, active.sum(dim=1), active.shape[1])

    return sums.means(observe(analysis, batches, axes, see, "importance.activity"))


def _rectified_axes(analysis: Analysis) -> dict[fx.Node, int]:
    """Nodes that rectify, with the labelled axis whose indices are neurons."""
    found: dict[fx.Node, int] = {}
    for node, labels in analysis.labels.items():
        name = operator_name(node)
        zero_floor = name in ("hardtanh", "hardtanh_") and len(node.args) > 1 and node.args[1] == 0
        if (name in _RECTIFIERS or zero_floor) and isinstance(labels, Labels):
            for group in labels.groups:
                if len(group.axes) == 1:
                    found[node] = group.axes[0]
    return found
