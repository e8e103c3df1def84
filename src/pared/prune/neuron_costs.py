"""What each neuron costs: the multiply-adds or parameters that go with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pared.graph.analysis import Analysis
from pared.graph.analysis_pass import attribute
from pared.graph.classes import CutClass
from pared.graph.counts import node_macs
from pared.graph.labels import groups_in
from pared.graph.record import record
from pared.prune.allocation import Scores

Unit: TypeAlias = Literal["macs", "parameters"]


def neuron_costs(analysis: Analysis, unit: Unit) -> Scores:
    """What goes if one neuron does and all others stay, by root.

    Work is a product of the lengths of axes, so each of the n entries of an axis has 1/n of it. An axis that is summed over stands in
    both operands and counts once; a neuron that several layers compute or read gets its part of each.

    Args:
        analysis: of the network.
        unit: "macs", for the batch of the example, or "parameters".

    >>> import torch
    >>> from pared.graph.analysis import analyse
    >>> from pared.graph.capture import capture
    >>> found = analyse(capture(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)), torch.zeros(2, 4)))
    >>> neuron_costs(found, "parameters")[list(found.classes[0].neurons)].tolist()
    [6.0, 6.0, 6.0, 6.0, 6.0, 6.0]
    """
    costs = np.zeros(len(analysis.root))
    for amount, axes in _work(analysis, unit):
        for roots in axes:
            np.add.at(costs, roots, amount / len(roots))
    return costs


def class_costs(found: CutClass, costs: Scores) -> float:
    """What a whole class costs: all neurons, with what goes along in its grids."""
    members = set(found.neurons).union(*(grid.members for grid in found.grids))
    return float(costs[sorted(members)].sum())


def _work(analysis: Analysis, unit: Unit) -> Iterable[tuple[float, list[NDArray[np.int64]]]]:
    """An amount of work, and the roots along every axis that it is proportional to."""
    seen = record(analysis.captured) if unit == "macs" else {}
    parameters: set[int] = set()
    for node in analysis.captured.module.graph.nodes:
        if unit == "macs" and (amount := node_macs(node, seen) if node.op == "call_function" else 0) > 0:
            yield amount, _axes(analysis, [analysis.labels[source] for source in node.all_input_nodes])
        elif unit == "parameters" and node.op == "get_attr" and isinstance(value := attribute(node), nn.Parameter):
            if id(value) not in parameters:
                yield value.numel(), _axes(analysis, [analysis.labels[node]])
            parameters.add(id(value))


def _axes(analysis: Analysis, operands: list[Any]) -> list[NDArray[np.int64]]:
    """The roots along every axis of an operator; an axis that is summed over stands in several operands, and counts as often as in one."""
    known: dict[bytes, NDArray[np.int64]] = {}
    times: Counter[bytes] = Counter()
    for labels in operands:
        here: Counter[bytes] = Counter()
        for group in groups_in([labels]):
            roots = analysis.root[group.atoms.reshape(-1)]
            known[roots.tobytes()] = roots
            here[roots.tobytes()] += 1
        times |= here
    return [known[key] for key in times.elements()]
