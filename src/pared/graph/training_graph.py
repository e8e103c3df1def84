"""The training-mode graph of a cut network: captured on its own and cut alike, or made from the eval graph.

Only the capture knows what training mode adds (stochastic depth, auxiliary heads, counted batches). Where it can't be had, the eval graph
is switched: batch norm takes the statistics of the batch, dropout drops.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pared.core.errors import ModelError
from pared.graph.analysis import Analysis, analyse
from pared.graph.analysis_pass import attribute
from pared.graph.capture import Inputs
from pared.graph.cut_pass import CutPass
from pared.graph.labels import Labels
from pared.graph.tracing import trace_or_capture

Kept = dict[str, dict[int, np.ndarray[Any, Any]]]
Cuts = tuple[Tensor, dict[int, np.ndarray[Any, Any]]]
"""A cut tensor, and the indices kept of each axis."""


def cut_training_graph(
    model: nn.Module, inputs: Inputs, kept: Kept, dynamic: bool, unread: frozenset[str] = frozenset()
) -> tuple[CutPass, fx.GraphModule] | None:
    """Capture `model` in training mode and follow the cut that is described by the indices kept of each parameter.

    Args:
        model: the original; unchanged.
        inputs: the example.
        kept: by name and axis, of every parameter that the eval graph cuts.
        dynamic: whether the eval graph takes any batch size.
        unread: parameters that only training mode reads, of auxiliary heads; these may lose indices besides.

    Returns:
        The pass and the captured graph, or None where training mode can't be captured or would be cut differently.
    """
    twin = copy.deepcopy(model)
    try:
        with torch.random.fork_rng():
            captured = trace_or_capture(twin, inputs, train=True)
            if captured.dynamic != dynamic:
                return None
            analysis = analyse(captured)
        plan = CutPass(analysis, _removed(analysis, kept)).run()
    except (ModelError, RuntimeError):
        return None
    found = {
        str(node.target): plan.kept[id(value)]
        for node, value in _tensors(captured.module)
        if id(value) in plan.kept and str(node.target) not in unread
    }
    same = set(found) == set(kept) and all(
        set(found[name]) == set(kept[name]) and all(np.array_equal(found[name][axis], index) for axis, index in kept[name].items())
        for name in kept
    )
    return (plan, captured.module) if same else None


def auxiliary_cuts(model: nn.Module, inputs: Inputs, kept: Kept, dynamic: bool, unread: frozenset[str]) -> dict[str, Cuts]:
    """What parameters that only training mode reads (of auxiliary heads) lose along with the features that they read, by name.

    Arguments are those of `cut_training_graph`. Empty where nothing is lost or training mode can't be followed.
    """
    found = cut_training_graph(model, inputs, kept, dynamic, unread) if unread else None
    if found is None:
        return {}
    plan, module = found
    return {
        str(node.target): (plan.gathers[id(value)](value.detach()), plan.kept[id(value)])
        for node, value in _tensors(module)
        if str(node.target) in unread and id(value) in plan.gathers and id(value) in plan.kept
    }


def _tensors(module: fx.GraphModule) -> list[tuple[fx.Node, Tensor]]:
    nodes = [(node, attribute(node)) for node in module.graph.nodes if node.op == "get_attr"]
    return [(node, value) for node, value in nodes if isinstance(value, Tensor)]


def _removed(analysis: Analysis, kept: Kept) -> list[int]:
    """The roots of the indices that the eval graph lost."""
    gone: set[int] = set()
    for node, _ in _tensors(analysis.captured.module):
        labels = analysis.labels[node]
        for axis, index in kept.get(str(node.target), {}).items():
            group = labels.on(axis) if isinstance(labels, Labels) else None
            if group is not None:
                lost = np.setdiff1d(np.arange(len(group.atoms)), index)
                gone |= set(analysis.root[group.atoms[lost]].tolist())
    return sorted(gone)


def switched_to_training(evaluation: fx.Graph) -> fx.Graph:
    """The eval graph with its batch norms and dropouts in training mode; batches aren't counted."""
    graph = fx.Graph()
    graph.set_codegen(evaluation._codegen)
    result = graph.graph_copy(evaluation, {})
    for node in graph.nodes:
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if name == "batch_norm" and node.args[3] is not None:
            node.args = (*node.args[:5], True, *node.args[6:])
        elif name in ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout") and len(node.args) > 2:
            node.args = (*node.args[:2], True, *node.args[3:])
        elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu") and len(node.args) == 9:
            node.args = (*node.args[:6], True, *node.args[7:])  # dropout between the layers
    graph.output(result)
    return graph
