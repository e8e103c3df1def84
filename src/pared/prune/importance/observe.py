"""Run a captured graph and look at what stands at its nodes; what to do with classes that an importance has nothing to say of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pared.core.errors import DataError
from pared.graph.analysis import Analysis
from pared.graph.capture import training_mode
from pared.prune.importance.magnitude import Magnitude
from pared.prune.importance.protocol import Normalize, Scores, divided_by_mean
from pared.prune.importance.samples import sum_over_processes

See = Callable[[fx.Node, tuple[Any, ...], Any], None]


def operator_name(node: fx.Node) -> str:
    """The name of the ATen operator that a node calls, such as "conv2d"; "" for other nodes."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


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
    """
    watcher = _Watcher(analysis.captured.module, set(nodes), see)
    device, seen = torch.device("cpu"), 0
    with torch.no_grad(), training_mode(analysis.captured.module, False):
        for batch in batches:
            watcher.run(*(x.clone() for x in batch))  # a graph may write into its inputs
            device, seen = batch[0].device, seen + 1
    if int(sum_over_processes(torch.tensor(seen), device)) == 0:
        raise DataError(f"{where}: the training split has no samples to score on.")
    return device


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node], see: See) -> None:
        super().__init__(module)
        self.nodes, self.see = nodes, see

    def run_node(self, n: fx.Node) -> Any:
        arguments = self.fetch_args_kwargs_from_env(n)[0] if n in self.nodes else ()
        value = super().run_node(n)
        if n in self.nodes:
            self.see(n, arguments, value)
        return value


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
