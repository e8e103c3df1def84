"""How much a neuron matters. Every importance is a frozen dataclass that scores all neurons of an analysed network.

A score stands for a root of the analysis: a channel or hidden unit with everything that is tied to it. Scores are compared within a
class only, so each is brought to the scale of its layer where several layers add up (a residual sum ties the channels of many).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pared.core.errors import DataError
from pared.core.problems import Problems
from pared.graph.analysis import Analysis
from pared.graph.analysis_pass import attribute
from pared.graph.labels import Labels
from pared.training import Task

Scores = NDArray[np.float64]


class Importance(Protocol):
    """Scores by root; a low score goes first."""

    def __call__(self, analysis: Analysis, task: Task | None) -> Scores:
        """Score all roots of `analysis`."""
        ...


def row_norms(rows: Tensor, order: float) -> Tensor:
    """The norm of every row, divided by the mean of all: of shape (n,) for rows of shape (n, m).

    >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 2).tolist()
    [2.0, 0.0]
    """
    norms = torch.linalg.vector_norm(rows.double(), ord=order, dim=1)
    mean = norms.mean()
    return norms / mean if mean > 0 else norms


@dataclass(frozen=True)
class Magnitude:
    """The norm of the weights that compute a neuron, summed over tied layers (Li et al., 1608.08710: order 1 is theirs).

    Args:
        order: of the norm. 2 by default: with tied layers and attention it ranks as DepGraph's group norm does (Fang et al., 2301.12900).

    >>> Magnitude().order
    2
    """

    order: float = 2

    def __post_init__(self) -> None:
        problems = Problems("importance.magnitude")
        problems.number("order", self.order, above=0)
        problems.raise_if_any()

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Score all roots; needs no data."""
        scores = np.zeros(analysis.first.count)
        parameters = _parameters(analysis)
        for producer in analysis.producers:
            norms = row_norms(producer.view(parameters[producer.parameter]), self.order)
            np.add.at(scores, analysis.root[producer.atoms], norms.cpu().numpy())
        return scores


@dataclass(frozen=True)
class Random:
    """Chance: the baseline that every importance has to beat.

    Args:
        seed: same seed, same choice.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems("importance.random")
        problems.number("seed", self.seed, low=0, integer=True)
        problems.raise_if_any()

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Score all roots; needs no data."""
        return np.random.default_rng(self.seed).random(analysis.first.count)


@dataclass(frozen=True)
class Activity:
    """How often a neuron is not zero after its ReLU, over samples and positions: one minus APoZ (Hu et al., 1607.03250, section 3.1).

    Counted in eval mode on training samples without augmentation. Neurons of a class without a ReLU (GELU, plain convolutions) have no
    zeros to count; such a class is ranked by `Magnitude`, which also breaks ties.

    Args:
        samples: how many training samples to look at; 2048 pin a fraction to about 1 point.

    Raises:
        DataError: if there is no task, or its training split is empty.
    """

    samples: int = 2048

    def __post_init__(self) -> None:
        problems = Problems("importance.activity")
        problems.number("samples", self.samples, low=1, integer=True)
        problems.raise_if_any()

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Run the graph on training data and count."""
        if task is None:
            raise DataError("importance.activity: needs data to count on. Give a task, or use Magnitude().")
        batches = (task.prepare(inputs) for inputs, _ in task.train)
        magnitude = Magnitude()(analysis)
        tie_break = magnitude / max(float(magnitude.max()), 1e-12) * 1e-6
        activity, counted = active_fractions(analysis, _first_samples(batches, self.samples))
        scores = magnitude.copy()
        for found in analysis.classes:
            roots = np.array(found.neurons)
            if counted[roots].all():
                scores[roots] = activity[roots] + tie_break[roots]
        return scores


def active_fractions(analysis: Analysis, batches: Iterable[tuple[Tensor, ...]]) -> tuple[Scores, NDArray[np.bool_]]:
    """For every root, the share of values after a ReLU that are not zero, and whether it has a ReLU at all."""
    axes = _rectified_axes(analysis)
    alive, total = np.zeros(analysis.first.count), np.zeros(analysis.first.count)
    counter = _Counter(analysis, axes, alive, total)
    some = False
    with torch.no_grad():
        for batch in batches:
            counter.run(*(x.clone() for x in batch))
            some = True
    if not some:
        raise DataError("importance.activity: the training split has no samples to count on.")
    return np.divide(alive, total, out=np.zeros_like(alive), where=total > 0), total > 0


_RECTIFIERS = {"relu", "relu_", "relu6", "relu6_", "threshold", "threshold_"}


def _rectified_axes(analysis: Analysis) -> dict[fx.Node, int]:
    """Nodes that rectify, with the labelled axis whose indices are neurons."""
    found: dict[fx.Node, int] = {}
    for node, labels in analysis.labels.items():
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        zero_floor = name in ("hardtanh", "hardtanh_") and len(node.args) > 1 and node.args[1] == 0
        if (name in _RECTIFIERS or zero_floor) and isinstance(labels, Labels):
            for group in labels.groups:
                if len(group.axes) == 1:
                    found[node] = group.axes[0]
    return found


class _Counter(fx.Interpreter):
    """Runs the graph and counts values that aren't zero, by root."""

    def __init__(self, analysis: Analysis, axes: dict[fx.Node, int], alive: Scores, total: Scores) -> None:
        super().__init__(analysis.captured.module)
        self.analysis, self.axes, self.alive, self.total = analysis, axes, alive, total

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.axes:
            axis = self.axes[n]
            roots = self.analysis.root[self.analysis.labels[n].on(axis).atoms]
            active = (value != 0).movedim(axis, 0).reshape(len(roots), -1)
            np.add.at(self.alive, roots, active.sum(dim=1).cpu().numpy())
            np.add.at(self.total, roots, active.shape[1])
        return value


def _first_samples(batches: Iterable[tuple[Tensor, ...]], samples: int) -> Iterable[tuple[Tensor, ...]]:
    for batch in batches:
        batch = tuple(x[:samples] for x in batch)
        yield batch
        samples -= len(batch[0])
        if samples <= 0:
            return


def _parameters(analysis: Analysis) -> dict[str, Tensor]:
    return {str(node.target): attribute(node) for node in analysis.captured.module.graph.nodes if node.op == "get_attr"}
