"""Normalisation, reductions, pooling: operators that look along an axis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pared.graph.algebra import combine, fixed, reduce, single, take
from pared.graph.labels import Labels
from pared.graph.passes import Pass


def batch_norm(cx: Pass, x: Labels, *vectors: Any, **_: Any) -> Labels:
    """(x, weight, bias, running_mean, running_var, …): each channel by itself."""
    channels = 1 if x.rank > 1 else 0
    for vector in vectors[:4]:
        if isinstance(vector, Labels):
            while vector.rank < x.rank - channels:
                vector = vector.with_axis(vector.rank)
            x = combine(cx, x, vector)
    for axis in range(2, x.rank):
        if (group := x.on(axis)) is not None:
            cx.inexact(group.atoms, "a norm takes its statistics over the axis")
    return x


def layer_norm(cx: Pass, x: Labels, shape: Sequence[int], *vectors: Any, **_: Any) -> Labels:
    """layer_norm and rms_norm (x, normalized_shape, weight, bias): the statistics are taken over the last axes."""
    last = len(shape)
    for axis in range(x.rank - last, x.rank):
        if (group := x.on(axis)) is not None:
            cx.inexact(group.atoms, "a norm takes its statistics over the axis")
    for vector in vectors[:2]:
        if isinstance(vector, Labels):
            x = combine(cx, x, vector)
    cx.rewrite(1, list(cx.shape()[x.rank - last :]))
    return x


def group_norm(cx: Pass, x: Labels, groups: int, *vectors: Any, **_: Any) -> Labels:
    """(x, num_groups, weight, bias): statistics over the channels of a group and all positions."""
    x = single(cx, x, 1)
    group = x.on(1)
    groups = cx.memo("groups", lambda: groups)
    if group is not None and groups == cx.memo("channels", lambda: x.shape[1]):
        cx.rewrite(1, len(group.atoms))
    elif group is not None:
        original = cx.memo("atoms", lambda: group.atoms)
        origin = cx.places(group.atoms, original) // (len(original) // groups)
        left = len(np.unique(origin))
        if len(group.atoms) % left:
            cx.violate("the groups of a group norm are left with unequal widths")
        cells = group.atoms.reshape(left, -1)
        cx.grid(cells)
        cx.inexact(group.atoms, "a norm takes its statistics over the axis")
        cx.rewrite(1, left)
    for vector in vectors[:2]:
        if isinstance(vector, Labels):
            while vector.rank < x.rank - 1:
                vector = vector.with_axis(vector.rank)
            x = combine(cx, x, vector)
    return x


def softmax(cx: Pass, x: Labels, dim: int, *_: Any, **__: Any) -> Labels:
    """softmax, log_softmax, and others that rescale by what stands along `dim`."""
    if (group := x.on(x.axis(dim))) is not None:
        cx.inexact(group.atoms, "softmax over the axis")
    return x


def along(cx: Pass, x: Labels, dim: int, *_: Any, **__: Any) -> Labels:
    """cumsum, sort and other operators whose results depend on the order along `dim`, which therefore stays."""
    return fixed(cx, x, [x.axis(dim)], "is read in order")


def _reduction(cx: Pass, x: Labels, dims: Any, keep: bool, inexact: str | None) -> Labels:
    axes = list(range(x.rank)) if dims is None or dims == [] else [x.axis(axis) for axis in ([dims] if isinstance(dims, int) else dims)]
    for axis in sorted(axes, reverse=True):
        x = reduce(cx, x, axis, inexact=inexact)
        if keep:
            x = x.with_axis(axis)
    return x


def total(cx: Pass, x: Labels, dims: Any = None, keepdim: bool = False, **_: Any) -> Labels:
    """sum: what is missing adds nothing."""
    return _reduction(cx, x, dims, keepdim, None)


def mean(cx: Pass, x: Labels, dims: Any = None, keepdim: bool = False, **_: Any) -> Labels:
    """mean: divides by the number of indices."""
    return _reduction(cx, x, dims, keepdim, "a mean is taken over the axis")


def spread(cx: Pass, x: Labels, dims: Any = None, *rest: Any, keepdim: bool = False, **_: Any) -> Labels:
    """var, std: (x, dims, unbiased or correction, keepdim)."""
    keep = rest[1] if len(rest) > 1 else keepdim
    return _reduction(cx, x, dims if not isinstance(dims, bool) else None, keep, "a variance is taken over the axis")


def spread_and_mean(cx: Pass, x: Labels, dims: Any = None, *rest: Any, keepdim: bool = False, **_: Any) -> list[Labels]:
    """var_mean, std_mean."""
    result = spread(cx, x, dims, *rest, keepdim=keepdim)
    return [result, result]


def extreme(cx: Pass, x: Labels, dims: Any = None, keepdim: bool = False, **_: Any) -> Any:
    """amax, amin, argmax; max and min along an axis return two, and of two tensors are elementwise."""
    if isinstance(dims, Labels):
        return combine(cx, x, dims)
    result = _reduction(cx, x, dims, keepdim, "a maximum is taken over the axis")
    return [result, result] if isinstance(cx.shape(), list) else result


def vector_norm(cx: Pass, x: Labels, order: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Labels:
    """linalg_vector_norm, norm: zeros add nothing to any positive order."""
    return _reduction(cx, x, dims, keepdim, None)


def pool(cx: Pass, x: Labels, *_: Any, **__: Any) -> Any:
    """Pooling and resampling: the shape says which axes are spatial; channels pass."""
    shapes = cx.shape()
    shape = shapes[0] if isinstance(shapes, list) else shapes
    spatial = range(max(x.rank - _spatial_axes(cx), 0), x.rank)
    x = fixed(cx, x, spatial, "is a spatial axis")
    result = Labels(tuple(shape), x.groups)
    return [result] * len(shapes) if isinstance(shapes, list) else result


def _spatial_axes(cx: Pass) -> int:
    """The d of an operator's name: avg_pool2d has two."""
    match = re.search(r"(\d)d", str(cx.node.target))
    return int(match[1]) if match else 0


def glu(cx: Pass, x: Labels, dim: int = -1) -> Labels:
    """Gated linear unit: the first half of an axis times the sigmoid of the second."""
    axis = x.axis(dim)
    half = x.shape[axis] // 2
    if x.on(axis) is None:
        return Labels(tuple(cx.shape()), x.groups)
    return combine(cx, take(cx, x, axis, slice(0, half)), take(cx, x, axis, slice(half, None)))


def elementwise(cx: Pass, *arguments: Any, **named: Any) -> Labels:
    """Operators that compute each element from the elements at its place, with broadcasting."""
    tensors = [argument for argument in (*arguments, *named.values()) if isinstance(argument, Labels)]
    return combine(cx, *tensors)


def prelu(cx: Pass, x: Labels, weight: Labels) -> Labels:
    """prelu: one slope, or one for each channel."""
    if weight.shape == (1,) or weight.rank == 0:
        return x
    channels = weight.with_axis(0) if x.rank > 1 else weight
    while channels.rank < x.rank:
        channels = channels.with_axis(channels.rank)
    return combine(cx, x, channels)
