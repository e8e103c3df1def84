"""The layers that read neurons: linear layers, convolutions and matrix products, with the roots of what they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pared.graph.analysis import Analysis
from pared.graph.labels import Labels
from pared.prune.observe import operator_name


@dataclass(frozen=True)
class Reader:
    """An operator that multiplies activations by a weight.

    Attributes:
        source: the place of the activations among its arguments.
        weight: the place of the weight.
        axis: the axis of the activations whose indices are neurons.
        atoms: the atom of each index of that axis.
        energy: (weight) -> for each index, the sum of squares of the weights that read it, a tensor of shape (n,).
    """

    source: int
    weight: int
    axis: int
    atoms: NDArray[np.int64]
    energy: Callable[[Tensor], Tensor]


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = {"linear": (0, 1), "matmul": (0, 1), "mm": (0, 1), "addmm": (1, 2)}


def readers(analysis: Analysis) -> dict[fx.Node, Reader]:
    """Every operator with a weight that reads neurons."""
    found: dict[fx.Node, Reader] = {}
    for node in analysis.labels:
        name = operator_name(node)
        if name in _PRODUCTS:
            source, weight = _PRODUCTS[name]
        elif name in (*_CONVOLUTIONS, *_TRANSPOSED):
            source, weight = 0, 1
        else:
            continue
        labels = _labels(analysis, node, source)
        rank = len(analysis.first.seen[node.args[weight]])  # type: ignore[index]
        if labels is None or (name == "matmul" and rank != 2):  # a product of activations
            continue
        axis = labels.rank - 1 if name in _PRODUCTS else labels.rank - rank + 1
        group = labels.on(axis)
        if group is not None and len(group.axes) == 1:
            found[node] = Reader(source, weight, axis, group.atoms, _energy(node, name))
    return found


def _labels(analysis: Analysis, node: fx.Node, place: int) -> Labels | None:
    source = node.args[place]
    labels = analysis.labels.get(source) if isinstance(source, fx.Node) else None
    return labels if isinstance(labels, Labels) else None


def rows_energy(weight: Tensor) -> Tensor:
    """Sums of squares by input of a weight (in, …), as of matmul and of transposed convolutions.

    >>> rows_energy(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist()
    [5.0, 9.0]
    """
    return weight.double().square().reshape(weight.shape[0], -1).sum(dim=1)


def columns_energy(weight: Tensor, groups: int = 1) -> Tensor:
    """Sums of squares by input channel of a weight (out, in / groups, …): of the outputs of its own group.

    >>> columns_energy(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist()
    [10.0, 4.0]
    """
    squares = weight.double().square().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return squares.sum(dim=(1, 3)).flatten()


def _energy(node: fx.Node, name: str) -> Callable[[Tensor], Tensor]:
    if name == "linear":
        return lambda weight: columns_energy(torch.atleast_2d(weight))
    if name in _CONVOLUTIONS:
        groups: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
        return lambda weight: columns_energy(weight, groups)
    return rows_energy
