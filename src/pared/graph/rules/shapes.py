"""Operators that move, split, join or repeat indices without computing anything."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pared.graph.algebra import combine, concatenate, fixed, reshape, select, take
from pared.graph.labels import Atoms, Group, Labels
from pared.graph.passes import Pass


def same(cx: Pass, x: Labels, *_: Any, **__: Any) -> Labels:
    """Operators that leave all indices where they are."""
    return x


def size(cx: Pass, *_: Any, **__: Any) -> None:
    """Operators that return a number."""
    return


def getitem(cx: Pass, values: Any, index: Any) -> Any:
    """One of several outputs."""
    return values[index] if isinstance(values, list | tuple) else None


def view(cx: Pass, x: Labels, *_: Any, **__: Any) -> Labels:
    """view, reshape: (x, sizes); unflatten has its sizes third."""
    shape = tuple(cx.shape())
    cx.rewrite_sizes(1, shape)
    return reshape(cx, x, shape)


def unflatten(cx: Pass, x: Labels, dim: int, sizes: Sequence[int]) -> Labels:
    """(x, dim, sizes): sizes are those of the axes that `dim` becomes."""
    shape = tuple(cx.shape())
    dim = x.axis(dim)
    cx.rewrite_sizes(2, shape[dim : dim + len(sizes)], dim)
    return reshape(cx, x, shape)


def flatten(cx: Pass, x: Labels, *_: Any, **__: Any) -> Labels:
    """flatten and others whose result's shape needs no literal (squeeze, unsqueeze, reshape_as)."""
    return reshape(cx, x, tuple(cx.shape()))


def squeeze(cx: Pass, x: Labels, *dims: Any) -> Labels:
    """squeeze takes out axes of length one; an axis that a cut could bring to one is not among them."""
    wanted = dims[0] if dims else list(range(x.rank))
    axes = [x.axis(axis) for axis in ([wanted] if isinstance(wanted, int) else wanted)]
    axes = cx.memo("axes", lambda: [axis for axis in axes if x.shape[axis] == 1])
    if not dims:
        cx.retarget("squeeze", axes)
    for axis in sorted(axes, reverse=True):
        x = x.without_axis(axis)
    return x


def unsqueeze(cx: Pass, x: Labels, dim: int) -> Labels:
    """A new axis of length one."""
    return x.with_axis(dim % (x.rank + 1))


def permute(cx: Pass, x: Labels, order: Sequence[int]) -> Labels:
    """permute, movedim given as an order."""
    return x.permuted(order)


def transpose(cx: Pass, x: Labels, first: int = 0, second: int = 1) -> Labels:
    """transpose, swapaxes, t."""
    order = list(range(x.rank))
    if x.rank > 1:
        a, b = x.axis(first), x.axis(second)
        order[a], order[b] = order[b], order[a]
    return x.permuted(order)


def matrix_transpose(cx: Pass, x: Labels) -> Labels:
    """mT, adjoint, numpy_T of a matrix."""
    return transpose(cx, x, -2, -1) if x.rank > 1 else x


def movedim(cx: Pass, x: Labels, source: int | Sequence[int], destination: int | Sequence[int]) -> Labels:
    """movedim, moveaxis."""
    sources = [x.axis(axis) for axis in ([source] if isinstance(source, int) else source)]
    targets = [x.axis(axis) for axis in ([destination] if isinstance(destination, int) else destination)]
    rest = iter([axis for axis in range(x.rank) if axis not in sources])
    return x.permuted([sources[targets.index(place)] if place in targets else next(rest) for place in range(x.rank)])


def cat(cx: Pass, parts: Sequence[Labels], dim: int = 0) -> Labels:
    """Concatenation; an old habit of torch, the empty vector, is left out."""
    parts = [part for part in parts if part.shape != (0,)]
    return concatenate(cx, parts, parts[0].axis(dim))


def stack(cx: Pass, parts: Sequence[Labels], dim: int = 0) -> Labels:
    """A new axis of fixed length."""
    joined = combine(cx, *parts)
    return joined.with_axis(dim % (joined.rank + 1), len(parts))


def split(cx: Pass, x: Labels, sizes: Any, dim: int = 0) -> list[Labels]:
    """split, split_with_sizes, chunk, tensor_split: ranges side by side; the result's shapes say where they end."""
    axis = x.axis(dim)
    lengths = [shape[axis] for shape in cx.shape()]
    before = cx.memo("lengths", lambda: list(lengths))
    if cx.cutting and lengths != before:
        cx.retarget("split_with_sizes", lengths, axis)
    ends = np.cumsum([0, *lengths])
    return [take(cx, x, axis, slice(start, end)) for start, end in itertools.pairwise(ends.tolist())]


def unbind(cx: Pass, x: Labels, dim: int = 0) -> list[Labels]:
    """One output for each index of an axis, which therefore stays."""
    axis = x.axis(dim)
    x = fixed(cx, x, [axis], "is unbound")
    return [x.indexed(axis, slice(index, index + 1)).without_axis_group(axis) for index in range(x.shape[axis])]


def select_index(cx: Pass, x: Labels, dim: int, index: int) -> Labels:
    """x[..., index, ...]: (x, dim, index)."""
    axis = x.axis(dim)
    length = cx.memo("length", lambda: x.shape[axis])
    if not isinstance(index, int):
        return fixed(cx, x, [axis], "is read by a computed index").indexed(axis, slice(0, 1)).without_axis_group(axis)
    index %= length
    new = cx.position(0, axis, index)
    group = x.on(axis)
    if group is not None and len(group.axes) == 1 and x.shape[axis] != length:
        cx.rewrite(2, new)
    return select(cx, x, axis, index, new)


def slice_range(cx: Pass, x: Labels, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Labels:
    """x[..., start:end:step, ...]."""
    axis = x.axis(dim)
    length = cx.memo("length", lambda: x.shape[axis])
    if x.on(axis) is None:
        out = list(x.shape)
        out[axis] = cx.shape()[axis]
        return Labels(tuple(out), x.groups)
    first, last, _ = slice(start, end, step).indices(length)
    reaches_the_end = last == length and (end is None or end >= length)
    first, last = cx.position(0, axis, first), cx.position(0, axis, max(first, last))
    if x.shape[axis] != length:  # a bound that still means the same stays as it is: it may be right for any batch
        cx.rewrite(2, first)
        if not reaches_the_end:
            cx.rewrite(3, last)
    return take(cx, x, axis, slice(first, last, step))


def narrow(cx: Pass, x: Labels, dim: int, start: int, length: int) -> Labels:
    """x[..., start : start + length, ...] by start and length."""
    axis = x.axis(dim)
    if x.on(axis) is None:
        return Labels(tuple(cx.shape()), x.groups)
    first, last = cx.position(0, axis, start), cx.position(0, axis, start + length)
    cx.rewrite(2, first)
    cx.rewrite(3, last - first)
    return take(cx, x, axis, slice(first, last))


def pad(cx: Pass, x: Labels, amounts: Sequence[int], mode: str = "constant", value: Any = None) -> Labels:
    """pad, constant_pad_nd: constant channels at either end are indices of their own, with no weights behind them."""
    new_amounts = list(amounts)
    for place in range(len(amounts) // 2):
        axis = x.rank - 1 - place
        before, after = amounts[2 * place], amounts[2 * place + 1]
        group = x.on(axis)
        if before == after == 0:
            continue
        if mode != "constant" or (before < 0 or after < 0) or (group is not None and len(group.axes) > 1):
            x = fixed(cx, x, [axis], "is padded")
            group = None
        if group is None:
            shape = (*x.shape[:axis], x.shape[axis] + before + after, *x.shape[axis + 1 :])
            x = Labels(shape, x.groups)
            continue
        ends = [cx.fresh((amount,)) for amount in (before, after)]
        new_amounts[2 * place : 2 * place + 2] = [len(ends[0]), len(ends[1])]
        x = concatenate(cx, [_range_on(x, axis, ends[0]), x, _range_on(x, axis, ends[1])], axis)
    cx.rewrite(1, new_amounts)
    return x


def _range_on(x: Labels, axis: int, atoms: Atoms) -> Labels:
    """Labels that broadcast against x on all axes but one, where they are `atoms`."""
    shape = tuple(len(atoms) if place == axis else 1 for place in range(x.rank))
    return Labels(shape, (Group((axis,), atoms),))


def roll(cx: Pass, x: Labels, shifts: Any, dims: Any = ()) -> Labels:
    """Cyclic shift: on a labelled axis a reordering whose shift is counted again after a cut."""
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    axes = [x.axis(axis) for axis in ([dims] if isinstance(dims, int) else dims)]
    if not axes:
        return fixed(cx, x, range(x.rank), "is rolled as one axis")
    new = []
    for shift, axis in zip(shifts, axes, strict=True):
        length = cx.memo(f"length {axis}", lambda now=x.shape[axis]: now)
        if x.on(axis) is None:
            new.append(shift)
            continue
        kept = cx.position(0, axis, (-shift) % length)
        new.append(x.shape[axis] - kept)
        order = np.roll(np.arange(x.shape[axis]), new[-1])
        x = x.indexed(axis, order)
    cx.rewrite(1, new)
    return x


def flip(cx: Pass, x: Labels, dims: Sequence[int]) -> Labels:
    """Reversed order on some axes."""
    for dim in dims:
        x = x.indexed(x.axis(dim), slice(None, None, -1))
    return x


def expand(cx: Pass, x: Labels, *_: Any, **__: Any) -> Labels:
    """expand, broadcast_to: an axis repeated from length one takes whatever length its partner has."""
    shape = tuple(cx.shape())
    cx.rewrite_sizes(1, shape)
    return _expanded(cx, x, shape)


def expand_as(cx: Pass, x: Labels, other: Labels) -> Labels:
    """As `expand`; the partner gives the shape."""
    return combine(cx, x, other)


def _expanded(cx: Pass, x: Labels, shape: tuple[int, ...]) -> Labels:
    while x.rank < len(shape):
        x = x.with_axis(0)
    groups = list(x.groups)
    repeated = cx.memo("repeated", lambda: [axis for axis in cx.free_axes(1, shape) if x.shape[axis] == 1 and shape[axis] > 1])
    groups += [Group((axis,), cx.fresh((shape[axis],))) for axis in repeated]
    return Labels(shape, tuple(groups))


def constant(cx: Pass, *arguments: Any, **__: Any) -> Labels:
    """zeros, ones, full, empty and their new_ forms: every index is alike, so each axis takes any length."""
    place = 1 if arguments and isinstance(arguments[0], Labels) else 0
    shape = tuple(cx.shape())
    cx.rewrite_sizes(place, shape)
    axes = cx.memo("axes", lambda: [axis for axis in cx.free_axes(place, shape) if shape[axis] > 1])
    return Labels(shape, tuple(Group((axis,), cx.fresh((shape[axis],))) for axis in axes))


def repeat(cx: Pass, x: Labels, times: Sequence[Any]) -> Labels:
    """repeat, tile: the index array is tiled."""
    shape = tuple(cx.shape())
    while x.rank < len(shape):
        x = x.with_axis(0)
    counts = cx.memo("counts", lambda: [new // old for new, old in zip(shape, x.shape, strict=True)])
    for axis, count in enumerate(counts):
        if count > 1 and x.on(axis) is not None:
            x = x.indexed(axis, np.tile(np.arange(x.shape[axis]), count))
        elif count > 1:
            x = Labels((*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 1 :]), x.groups)
    return x


def repeat_interleave(cx: Pass, x: Labels, times: Any, dim: int | None = None, **_: Any) -> Labels:
    """Every index `times` times in a row."""
    if dim is None or not isinstance(times, int):
        fixed(cx, x, range(x.rank), "is repeated a computed number of times")
        for group in x.groups:
            cx.freeze(group.atoms, "is repeated a computed number of times")
        return Labels(tuple(cx.shape()))
    axis = x.axis(dim)
    group = x.on(axis)
    if group is not None and axis != group.axes[0]:
        x = fixed(cx, x, [axis], "is repeated")
    if x.on(axis) is None:
        return Labels((*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :]), x.groups)
    return x.indexed(axis, np.repeat(np.arange(x.shape[axis]), times))


def pixel_shuffle(cx: Pass, x: Labels, factor: int) -> Labels:
    """(N, C r r, H, W) to (N, C, H r, W r): all r r channels of a pixel block live and die together."""
    *lead, channels, height, width = x.shape
    x = reshape(cx, x, (*lead, channels // factor**2, factor, factor, height, width), "split")
    n = len(lead)
    x = x.permuted([*range(n), n, n + 3, n + 1, n + 4, n + 2])
    x = fixed(cx, x, [n + 2, n + 4], "becomes part of a spatial axis")
    return reshape(cx, x, (*lead, channels // factor**2, height * factor, width * factor), "join")


def pixel_unshuffle(cx: Pass, x: Labels, factor: int) -> Labels:
    """(N, C, H r, W r) to (N, C r r, H, W)."""
    *lead, channels, height, width = x.shape
    n = len(lead)
    x = fixed(cx, x, [n + 1, n + 2], "is a spatial axis")
    x = reshape(cx, x, (*lead, channels, height // factor, factor, width // factor, factor), "split")
    x = x.permuted([*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return reshape(cx, x, (*lead, channels * factor**2, height // factor, width // factor), "join")


def channel_shuffle(cx: Pass, x: Labels, groups: int) -> Labels:
    """(N, g d, …) to (N, d g, …)."""
    groups = cx.memo("groups", lambda: groups)
    rest = x.shape[2:]
    x = reshape(cx, x, (x.shape[0], groups, x.shape[1] // groups, *rest), "split")
    x = x.permuted([0, 2, 1, *range(3, 3 + len(rest))])
    return reshape(cx, x, (x.shape[0], x.shape[1] * x.shape[2], *rest), "join")


def image_to_columns(cx: Pass, x: Labels, *_: Any, **__: Any) -> Labels:
    """im2col: (N, C, H, W) to (N, C k k, L): every channel k k times in a row."""
    x = fixed(cx, x, range(2, x.rank), "is a spatial axis")
    shape = tuple(cx.shape())
    group = x.on(1)
    if group is None:
        return Labels(shape)
    times = cx.memo("times", lambda: shape[1] // x.shape[1])
    if len(group.axes) > 1:
        cx.freeze(group.atoms, "is unfolded")
        return Labels(shape)
    return Labels(shape, (Group((1,), np.repeat(group.atoms, times)),))


def unfold(cx: Pass, x: Labels, dim: int, *_: Any) -> Labels:
    """Sliding windows on one axis, which stays; the window is a new last axis."""
    x = fixed(cx, x, [x.axis(dim)], "is unfolded")
    return Labels(tuple(cx.shape()), x.groups)


def index(cx: Pass, x: Labels, indices: Sequence[Labels | None]) -> Labels:
    """x[..., tensor, ...]: indexed axes stay; the others move as numpy says."""
    places = [axis for axis, entry in enumerate(indices) if entry is not None]
    x = fixed(cx, x, places, "is indexed by a tensor")
    for entry in indices:
        if entry is not None:
            fixed(cx, entry, range(entry.rank), "is used as an index")
    shape = tuple(cx.shape())
    added = len(shape) - (x.rank - len(places))
    adjacent = places == list(range(places[0], places[-1] + 1))
    at = places[0] if adjacent else 0
    others = [axis for axis in range(x.rank) if axis not in places]
    if any(set(group.axes) & set(places) for group in x.groups):
        for group in x.groups:
            cx.freeze(group.atoms, "is indexed by a tensor")
        return Labels(shape)
    before = [axis for axis in others if axis < at] if adjacent else []
    order = {axis: place for place, axis in enumerate(before)}
    order |= {axis: len(before) + added + place for place, axis in enumerate(axis for axis in others if axis not in before)}
    return x.renamed(shape, order)


def index_select(cx: Pass, x: Labels, dim: int, indices: Labels) -> Labels:
    """index_select: the indexed axis stays."""
    axis = x.axis(dim)
    return index(cx, x, [None] * axis + [indices])


def embedding(cx: Pass, weight: Labels, indices: Labels, *_: Any, **__: Any) -> Labels:
    """Rows of a table: its row axis stays, its columns are the result's last axis."""
    weight = fixed(cx, weight, [0], "is a vocabulary")
    fixed(cx, indices, range(indices.rank), "is used as an index")
    group = weight.on(1)
    if group is not None and len(group.axes) == 1:
        cx.producer(0, group.atoms, lambda table: table.detach().t())
    return weight.renamed(tuple(cx.shape()), {1: len(cx.shape()) - 1})
