"""What can go without a trace, or with none but a number: neurons whose weights are exactly zero on one side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pared.graph.analysis import Analysis
from pared.graph.axes import Axis, fixed_nodes, neuron_axes
from pared.graph.capture import Captured
from pared.graph.classes import CutClass
from pared.graph.labels import Labels, groups_in

Marks = NDArray[np.bool_]


def silent_neurons(analysis: Analysis) -> list[int]:
    """The neurons whose removal changes nothing at all, as roots; a choice for `cut_model`.

    A neuron is silent if the weights that compute it are all zero, with bias and the scale and shift of its norm, and what it then
    emits is zero wherever it is summed (after a sigmoid it isn't); or if every weight that reads it is zero. Of a grid only whole rows
    or equal numbers of each row go, so that some silent neurons may stay. Classes in which a norm, a mean or a softmax runs over
    the neurons stay.

    >>> from torch import nn
    >>> from pared.graph.analysis import analyse
    >>> from pared.graph.capture import capture
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> _ = model[0].weight.data[1].zero_(), model[0].bias.data[1].zero_()
    >>> analysis = analyse(capture(model, torch.zeros(2, 2)))
    >>> [analysis.classes[0].neurons.index(root) for root in silent_neurons(analysis)]
    [1]
    """
    axes = neuron_axes(analysis)
    mute, unread = _mute(analysis, axes), _unread(analysis, axes)
    if not (mute | unread).any():
        return []
    heard, noticed = _noticed(analysis, mute, unread)
    silent = (mute & ~heard) | (unread & ~noticed)
    bare = np.ones_like(silent)  # the rows of a grid, which have no weights of their own
    for axis in axes:
        bare[axis.roots] = False
    removed: list[int] = []
    for found in analysis.classes:
        if not analysis.inexact(np.array(found.neurons)):
            removed += [neuron for neuron in found.free if silent[neuron]]
            removed += [neuron for part in _grids(found) for neuron in _regular_choice(part, silent, bare)]
    return removed


def _grids(found: CutClass) -> list[CutClass]:
    return [dataclasses.replace(found, neurons=tuple(sorted(grid.members)), free=(), grids=(grid,)) for grid in found.grids]


def _regular_choice(grid: CutClass, silent: Marks, bare: Marks) -> list[int]:
    """The largest regular choice in a grid that takes silent neurons only."""
    members = list(grid.neurons)
    may_go = silent | bare
    scores = np.where(may_go, 0.0, 1.0)
    for number in range(int(may_go[members].sum()) if silent[members].any() else 0, 0, -1):
        chosen = grid.choose(scores, 1 - number / len(members))
        if chosen and may_go[chosen].all():
            return chosen
    return []


def constant_neurons(analysis: Analysis) -> Marks:
    """The neurons, as marks of roots, that no weight computes from anything: what they emit comes from biases and norms alone."""
    return _mute(analysis, [axis for axis in neuron_axes(analysis) if axis.parameter.dim() > 1])


def _mute(analysis: Analysis, axes: list[Axis]) -> Marks:
    """Roots that some producer computes, and all weights of `axes` that compute them are zero."""
    loud = _nonzero(analysis, [axis for axis in axes if axis.computes])
    known = np.zeros(analysis.first.count, bool)
    parameters = dict(analysis.captured.module.named_parameters(remove_duplicate=False))
    for producer in analysis.producers:
        roots = analysis.root[producer.atoms]
        known[roots] = True
        loud[roots[producer.view(parameters[producer.parameter]).ne(0).flatten(1).any(1).cpu().numpy()]] = True
    return known & ~loud & ~analysis.frozen


def _unread(analysis: Analysis, axes: list[Axis]) -> Marks:
    """Roots that some weights read, all of which are zero."""
    readers = [axis for axis in axes if not axis.computes]
    known = np.zeros(analysis.first.count, bool)
    for axis in readers:
        known[axis.roots] = True
    return known & ~_nonzero(analysis, readers) & ~analysis.frozen


def _nonzero(analysis: Analysis, axes: list[Axis]) -> Marks:
    found = np.zeros(analysis.first.count, bool)
    for axis in axes:
        value = axis.parameter.detach().movedim(axis.axis, 0)
        found[axis.roots[value.ne(0).reshape(len(value), -1).any(1).cpu().numpy()]] = True
    return found


def _noticed(analysis: Analysis, mute: Marks, unread: Marks) -> tuple[Marks, Marks]:
    """Mute neurons that are heard all the same, and unread ones that something else than a weight reads.

    At an operator that sums over neurons one factor has to be zero for each: for mute ones any, since they emit the same for all inputs;
    for unread ones a weight, since an activation may be zero on the example by chance.
    """
    module = analysis.captured.module
    values = node_values(analysis.captured)
    fixed = fixed_nodes(module.graph)
    heard, noticed = np.zeros_like(mute), np.zeros_like(unread)
    for node in module.graph.nodes:
        labels = analysis.labels.get(node)
        if node.op != "call_function" or not (isinstance(labels, Labels) or any(True for _ in groups_in(labels))):
            continue  # what asks for a size or returns nothing reads no values
        left_atoms = np.zeros(analysis.first.count, bool)
        for group in groups_in(labels):
            left_atoms[group.atoms] = True
        left = np.zeros_like(mute)
        left[analysis.root[left_atoms]] = True
        summed, gone, zero, zero_weight = (np.zeros_like(mute) for _ in range(4))
        for source in node.all_input_nodes:
            for atoms, loud in _cells(analysis.labels.get(source), values[source]):
                roots = analysis.root[atoms]
                summed[roots[~left_atoms[atoms]]] = True
                gone[roots[~left[roots]]] = True
                silent = np.zeros_like(mute)
                silent[roots] = True
                silent[roots[loud]] = False
                zero |= silent
                zero_weight |= silent & (source in fixed)
        heard |= mute & summed & ~zero
        noticed |= unread & gone & ~zero_weight
    return heard, noticed


class _Values(fx.Interpreter):
    """Keeps what every node gave, as it was before an operator changed it in place."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def node_values(captured: Captured) -> dict[fx.Node, Any]:
    """What every node of a graph gives on the example inputs."""
    run = _Values(captured.module)
    with torch.no_grad():
        run.run(*(x.clone() if isinstance(x, Tensor) else x for x in captured.example_inputs))
    return run.seen


def _cells(labels: Any, value: Any) -> Iterator[tuple[NDArray[np.int64], Marks]]:
    """For every group of a tensor's labels: the atom of each cell, and whether anything in the cell isn't zero."""
    if isinstance(labels, Labels) and isinstance(value, Tensor):
        for group in labels.groups:
            if not group.atoms.size:
                continue  # an axis without an index
            cells = value.ne(0).movedim(group.axes, tuple(range(len(group.axes))))
            cells = cells.reshape(*group.atoms.shape, -1).any(-1)
            yield group.atoms.reshape(-1), cells.cpu().numpy().reshape(-1)
