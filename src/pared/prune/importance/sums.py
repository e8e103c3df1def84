"""Sums over what stands at the nodes of a graph, by root; and classes that an importance has nothing to say of."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pared.core.errors import DataError
from pared.graph.analysis import Analysis
from pared.prune.importance.magnitude import Magnitude
from pared.prune.importance.protocol import Normalize, Scores, divided_by_mean
from pared.prune.observe import See, Watch
from pared.training.processes import sum_over_processes


class Sums:
    """Sums and counts by root, over samples and processes."""

    def __init__(self, analysis: Analysis) -> None:
        self.root = analysis.root
        self.sums = np.zeros(analysis.first.count)
        self.counts = np.zeros(analysis.first.count)

    def add(self, atoms: NDArray[np.int64], sums: Tensor, count: int) -> None:
        """Add one sum over `count` values for each atom."""
        np.add.at(self.sums, self.root[atoms], sums.double().cpu().numpy())
        np.add.at(self.counts, self.root[atoms], count)

    def means(self, device: torch.device) -> tuple[Scores, NDArray[np.bool_]]:
        """The mean of each root, and whether anything was counted of it."""
        sums, counts = sum_over_processes(torch.from_numpy(np.stack([self.sums, self.counts])), device).numpy()
        return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0), counts > 0


def observe(analysis: Analysis, batches: Iterable[tuple[Tensor, ...]], nodes: Iterable[fx.Node], see: See, where: str) -> torch.device:
    """Run the graph on prepared batches and call `see(node, its arguments, its value)` at the nodes; returns the device.

    Raises:
        DataError: if there was no batch in any process.
        ModelError: if the graph can't take a batch.
    """
    watch = Watch(analysis.captured.module, nodes, see)
    device = next((parameter.device for parameter in analysis.captured.module.parameters()), torch.device("cpu"))
    seen = 0
    for batch in batches:
        watch.look(batch)
        seen += 1
    if int(sum_over_processes(torch.tensor(seen), device)) == 0:
        raise DataError(f"{where}: the training split has no samples to score on.")
    return device


def with_magnitude(analysis: Analysis, scores: Scores, known: NDArray[np.bool_], normalize: Normalize) -> Scores:
    """The scores where a whole class has them; a class of which some are unknown is ranked by `Magnitude` instead.

    Args:
        analysis: of a captured graph.
        scores: by root.
        known: by root, whether the score means anything.
        normalize: "layer" divides the scores of each class by their mean.
    """
    result = Magnitude()(analysis)
    for found in analysis.classes:
        roots = np.array(found.neurons)
        if known[roots].all():
            values = torch.from_numpy(scores[roots])
            result[roots] = (divided_by_mean(values) if normalize == "layer" else values).numpy()
    return result
