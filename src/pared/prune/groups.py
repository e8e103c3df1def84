"""Groups of weights that live and die together: neurons, positions of kernels, residual branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pared.graph.analysis import Analysis
from pared.graph.analysis_pass import attribute
from pared.graph.axes import Axis, fixed_nodes, neuron_axes
from pared.graph.capture import Captured
from pared.graph.classes import CutClass
from pared.graph.depth import Block, find_blocks
from pared.prune.masks import Layer, stored


@dataclass(frozen=True)
class Part:
    """The share that a parameter has in some groups.

    Attributes:
        parameter: the weights.
        group: for every weight the number of its group, or the number of groups where it is in none; of length one along the axes that
            don't matter.
    """

    parameter: nn.Parameter
    group: Tensor


@dataclass(frozen=True)
class Groups:
    """Groups of weights, numbered from 0.

    Attributes:
        count: how many.
        parts: where their weights are; the first parameter leads.

    >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> rows = Groups(2, (Part(weight, torch.tensor([[0], [1]])),))
    >>> rows.norms().tolist()
    [5.0, 0.0]
    """

    count: int
    parts: tuple[Part, ...]

    @property
    def lead(self) -> nn.Parameter:
        """The parameter whose optimiser sets the pace."""
        return self.parts[0].parameter

    def norms(self) -> Tensor:
        """The L2 norm of every group, of shape (count,)."""
        squares = torch.zeros(self.count + 1, dtype=self.lead.dtype, device=self.lead.device)
        for part in self.parts:
            value, group = part.parameter.detach(), part.group.to(squares.device)
            axes = [axis for axis, length in enumerate(group.shape) if length == 1]
            sums = value.square().sum(axes, keepdim=True) if axes else value.square()
            squares.index_add_(0, group.reshape(-1), sums.reshape(-1).to(squares))
        return squares[:-1].sqrt()

    def sizes(self) -> Tensor:
        """How many weights every group has, of shape (count,)."""
        sizes = torch.zeros(self.count + 1, dtype=self.lead.dtype, device=self.lead.device)
        for part in self.parts:
            group = part.group.to(sizes.device).reshape(-1)
            sizes.index_add_(0, group, torch.full_like(group, part.parameter.numel() // len(group), dtype=sizes.dtype))
        return sizes[:-1]

    def scale(self, factors: Tensor) -> None:
        """Multiply the weights of every group in place."""
        factors = torch.cat([factors, factors.new_ones(1)])
        with torch.no_grad():
            for part in self.parts:
                group = part.group.to(factors.device)
                part.parameter.mul_(factors[group].to(part.parameter))


def neuron_groups(analysis: Analysis, *, filters: bool = True, channels: bool = False) -> list[Groups]:
    """One group for every neuron that can be removed, over all layers that are tied; for attention and grouped layers one for every row.

    Classes in which a norm, a mean or a softmax runs over the neurons are left out (a neuron that is zero still counts there), and so are
    those in which zero weights wouldn't silence a neuron or can't be reached: frozen parameters, weight norm.

    Args:
        analysis: of the network.
        filters: the weights that compute a neuron, with bias and the scale and shift of its norm.
        channels: the weights that read it.
    """
    axes = [axis for axis in neuron_axes(analysis) if (filters if axis.computes else channels)]
    result: list[Groups] = []
    for found in analysis.classes:
        members = np.array(found.neurons)
        if analysis.inexact(members):
            continue
        parts, usable = [], filters <= _is_covered(analysis, found, axes)
        units = _units(found)
        number = np.full(analysis.first.count, len(units), np.int64)
        for index, unit in enumerate(units):
            number[list(unit)] = index
        for axis in axes:
            if (number[axis.roots] < len(units)).any():
                usable = usable and axis.plain and axis.parameter.requires_grad
                parts.append(Part(axis.parameter, along(number[axis.roots], axis)))
        if usable and parts:
            result.append(Groups(len(units), tuple(parts)))
    return result


def along(numbers: np.ndarray[Any, Any], axis: Axis) -> Tensor:
    """Numbers of groups, shaped to lie along an axis of its parameter."""
    shape = [1] * axis.parameter.dim()
    shape[axis.axis] = -1
    return torch.from_numpy(numbers).reshape(shape)


def shape_groups(layers: Mapping[str, Layer]) -> list[Groups]:
    """One group for every column W[:, c, m, k] of the matrix that a convolution multiplies patches of its input by.

    Grouped and transposed convolutions have no such matrix, so they have no groups.
    """
    result = []
    for layer in layers.values():
        weight = stored(layer, "weight")
        if weight is not None and weight.requires_grad and is_plain_convolution(layer):
            columns = weight[0].numel()
            result.append(Groups(columns, (Part(weight, torch.arange(columns).reshape(1, *weight.shape[1:])),)))
    return result


def is_plain_convolution(layer: nn.Module) -> bool:
    """Whether every output of a layer is a sum over one patch of all its inputs."""
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1


def depth_groups(captured: Captured) -> list[Groups]:
    """One group for every residual block: all weights of its branch.

    Blocks with a weight that is frozen, or that is used elsewhere too, have no group. A block inside another one comes first.
    """
    blocks = sorted(find_blocks(captured), key=lambda block: len(block.branch))
    found = [branch_weights(captured, block) for block in blocks]
    return [
        Groups(1, tuple(Part(weight, torch.zeros([1] * weight.dim(), dtype=torch.int64)) for weight in weights))
        for weights in found
        if all(weight.requires_grad for weight in weights) and weights
    ]


def branch_weights(captured: Captured, block: Block) -> list[nn.Parameter]:
    """The parameters that a block's branch reads, those of most axes first; none if one of them is read elsewhere too."""
    fixed = fixed_nodes(captured.module.graph)
    sources: dict[fx.Node, None] = {}
    pending = [node for inner in block.branch for node in inner.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in fixed and node not in sources:
            sources[node] = None
            pending += node.all_input_nodes
    weights = {id(value): value for node in sources if isinstance(value := _parameter(node), nn.Parameter)}
    outside = [node for node in fixed if id(_parameter(node)) in weights and node not in sources]
    shared = any(user not in block.branch and user not in sources for node in sources for user in node.users)
    return [] if outside or shared else sorted(weights.values(), key=lambda weight: -weight.dim())


def _parameter(node: fx.Node) -> Any:
    return attribute(node) if node.op == "get_attr" else None


def _units(found: CutClass) -> list[tuple[int, ...]]:
    """What can go by itself: single neurons, and in a grid whole rows with all that goes along."""
    units: list[tuple[int, ...]] = [(neuron,) for neuron in found.free]
    taken = set(found.free)
    for grid in found.grids:
        for family in grid.families:
            if taken.isdisjoint(neuron for unit in family for neuron in unit):
                units += family
                taken.update(neuron for unit in family for neuron in unit)
        rest = sorted(grid.members - taken)
        units += [(neuron,) for neuron in rest]
        taken.update(rest)
    return units


def _is_covered(analysis: Analysis, found: CutClass, axes: Sequence[Axis]) -> bool:
    """Whether all weights that compute the neurons of a class lie along axes."""
    written = {root for axis in axes if axis.computes and axis.parameter.dim() > 1 for root in axis.roots.tolist()}
    return all(written.issuperset(analysis.root[producer.atoms].tolist()) for producer in found.producers)
