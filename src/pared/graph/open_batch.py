"""Make one graph for any batch out of two that were noted at batches of n and n + 1."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pared.core.errors import ModelError


class NotTraced(ModelError):
    """This forward has to be captured by `torch.export`."""


def open_batch(graph: fx.Graph, other: fx.Graph, size: int, batched: int) -> None:
    """Put multiples of the batch's length in the place of numbers that differ between the two runs.

    Args:
        graph: noted at a batch of `size`; changed.
        other: noted at a batch of one more.
        size: at least two.
        batched: the input whose first axis is the batch.

    Raises:
        NotTraced: if the graphs differ otherwise.
    """
    if [node.target for node in graph.nodes] != [node.target for node in other.nodes]:
        raise NotTraced("what is computed depends on the batch")
    twins = dict(zip(other.nodes, graph.nodes, strict=True))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    multiples: dict[int, fx.Node] = {}

    def multiple(factor: int) -> fx.Node:
        if 1 not in multiples:
            with graph.inserting_after(inputs[-1]):
                multiples[1] = graph.call_function(torch.ops.aten.sym_size.int, (inputs[batched], 0))
            multiples[1].meta["val"] = size
        if factor not in multiples:
            with graph.inserting_after(multiples[1]):
                multiples[factor] = graph.call_function(operator.mul, (multiples[1], factor))
            multiples[factor].meta["val"] = factor * size
        return multiples[factor]

    def merged(left: Any, right: Any) -> Any:
        if isinstance(left, fx.Node) or isinstance(right, fx.Node):
            if not isinstance(right, fx.Node) or twins[right] is not left:
                raise NotTraced("what is computed depends on the batch")
            return left
        if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
            return type(left)(merged(a, b) for a, b in zip(left, right, strict=True))
        if type(left) is int and type(right) is int and left != right:
            factor = right - left
            if factor <= 0 or left != factor * size:
                raise NotTraced("a number depends on the batch otherwise than as a multiple")
            return multiple(factor)
        if left is not right and left != right and not (left != left and right != right):
            raise NotTraced("a value depends on the batch")
        return left

    for right, left in list(twins.items()):
        if left.op == "call_function":
            if len(left.args) != len(right.args) or left.kwargs.keys() != right.kwargs.keys():
                raise NotTraced("what is computed depends on the batch")
            arguments = tuple(merged(a, b) for a, b in zip(left.args, right.args, strict=True))
            named = {name: merged(value, right.kwargs[name]) for name, value in left.kwargs.items()}
            left.args, left.kwargs = arguments, named
