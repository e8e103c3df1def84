"""How large the activations of neurons are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from pared.graph.analysis import Analysis
from pared.prune.importance.protocol import Normalize, Scores, check_samples
from pared.prune.importance.readers import readers
from pared.prune.importance.samples import training_samples
from pared.prune.importance.sums import Sums, observe, with_magnitude
from pared.training import Task


@dataclass(frozen=True)
class MeanActivation:
    """The mean of |a| over samples and positions, where a is what the next layers read of a neuron (Molchanov et al., 1611.06440).

    It needs no ReLU and no labels. A class that no layer with a weight reads (the width of queries and keys) is ranked by `Magnitude`.

    Args:
        samples: how many training samples to look at; their labels aren't.
        normalize: "layer" by default, since the scale of activations differs by layer and says nothing between layers; it divides by the
            mean of a class.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task, or if its training split is empty.

    >>> MeanActivation().normalize
    'layer'
    """

    samples: int = 2048
    normalize: Normalize = "layer"

    def __post_init__(self) -> None:
        check_samples("importance.mean_activation", self.samples, self.normalize).raise_if_any()

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Run the graph on training data and average."""
        where = "importance.mean_activation"
        batches = training_samples(task, self.samples, analysis.captured.module, where)
        found, sums = readers(analysis), Sums(analysis)

        def see(node: fx.Node, arguments: tuple[Any, ...], value: Any) -> None:
            reader = found[node]
            sizes = arguments[reader.source].abs().movedim(reader.axis, 0).flatten(start_dim=1)
            sums.add(reader.atoms, sizes.double().sum(dim=1), sizes.shape[1])

        means, known = sums.means(observe(analysis, (inputs for inputs, _ in batches), found, see, where))
        return with_magnitude(analysis, means, known, self.normalize)
