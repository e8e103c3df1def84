"""Along which axes of which parameters neurons lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx, nn

from pared.graph.analysis import Analysis
from pared.graph.analysis_pass import attribute
from pared.graph.fold import packet
from pared.graph.labels import Labels, groups_in

# what may stand between a parameter and the product it is used in, if a weight of zero is to be zero there
_PASSES = {"where", "t", "transpose", "permute", "numpy_T", "mT", "view", "reshape", "unsqueeze", "clone", "contiguous", "detach", "alias"}


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter along which neurons lie.

    Attributes:
        parameter: its tensor.
        axis: which one.
        roots: the neuron of every index.
        computes: whether these weights compute the neurons, or read them.
        plain: whether a weight of zero means zero (weight norm, for one, divides by it).
    """

    parameter: nn.Parameter
    axis: int
    roots: np.ndarray[Any, np.dtype[np.int64]]
    computes: bool
    plain: bool


def neuron_axes(analysis: Analysis) -> list[Axis]:
    """All axes of all parameters along which neurons lie; those that compute neurons come first.

    A weight computes the neurons of its output axis and reads those of its input axis. Biases, the scale and shift of norms and all
    else that meets neurons without summing over them computes them too.
    """
    fixed = fixed_nodes(analysis.captured.module.graph)
    produced: dict[str, list[np.ndarray[Any, Any]]] = {}
    for producer in analysis.producers:
        produced.setdefault(producer.parameter, []).append(producer.atoms)
    found: dict[tuple[int, int], Axis] = {}
    for node, labels in analysis.labels.items():
        value = attribute(node) if node.op == "get_attr" else None
        if not isinstance(value, nn.Parameter) or not isinstance(labels, Labels):
            continue
        outputs = _output_axes(analysis, labels, produced.get(str(node.target), []))
        for group in labels.groups:
            axis, roots = group.axes[0], analysis.root[group.atoms]
            computes = value.dim() == 1 or axis in outputs or (not outputs and _meets(analysis, node, roots, fixed))
            found.setdefault((id(value), axis), Axis(value, axis, roots, computes, _is_plain(node, fixed)))
    return sorted(found.values(), key=lambda axis: (not axis.computes, axis.parameter.dim() == 1))


def _output_axes(analysis: Analysis, labels: Labels, produced: Sequence[np.ndarray[Any, Any]]) -> set[int]:
    """The axes of a weight along which it computes neurons: that of the very indices, or else one of the same neurons."""
    same = {group.axes[0] for group in labels.groups for atoms in produced if np.array_equal(group.atoms, atoms)}
    if same or not produced:
        return same
    wanted = [set(analysis.root[atoms].tolist()) for atoms in produced]
    alike = [group.axes[0] for group in labels.groups if set(analysis.root[group.atoms].tolist()) in wanted]
    return set(alike[:1])


def _meets(analysis: Analysis, node: fx.Node, roots: np.ndarray[Any, Any], fixed: set[fx.Node]) -> bool:
    """Whether the first operator that combines a parameter with data still has its neurons in the output."""
    wanted, pending = set(roots.tolist()), list(node.users)
    while pending:
        user = pending.pop()
        if user in fixed:
            pending += user.users
        elif not wanted & {root for group in groups_in(analysis.labels[user]) for root in analysis.root[group.atoms].reshape(-1).tolist()}:
            return False
    return True


def _is_plain(node: fx.Node, fixed: set[fx.Node]) -> bool:
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user in fixed:
            if getattr(packet(user), "__name__", "") not in _PASSES:
                return False
            pending += user.users
    return True


def fixed_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on parameters only."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed
