"""Operators that sum products: convolutions, linear layers, matrix products, einsum, attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from pared.graph.algebra import combine, contract, fixed, reduce, single
from pared.graph.labels import Atoms, Group, Labels
from pared.graph.passes import Pass


def rows_of(weight: Tensor) -> Tensor:
    """One row for each output channel of a weight laid out (out, in, …)."""
    return weight.detach().reshape(weight.shape[0], -1)


def columns_of(weight: Tensor) -> Tensor:
    """One row for each output channel of a weight laid out (in, out, …)."""
    return weight.detach().transpose(0, 1).reshape(weight.shape[1], -1)


def linear(cx: Pass, x: Labels, weight: Labels, bias: Labels | None = None) -> Labels:
    """(x, weight, bias): the last axis of x against the last axis of the weight."""
    _note(cx, 1, weight.on(0) if weight.rank > 1 else None, rows_of)
    out = contract(cx, x.with_axis(x.rank - 1) if weight.rank > 1 else x, weight, x.rank - (weight.rank == 1))
    return combine(cx, out, bias) if bias is not None else out


def _note(cx: Pass, argument: int, group: Group | None, view: Any) -> None:
    if group is not None and len(group.axes) == 1:
        cx.producer(argument, group.atoms, view)


def convolution(cx: Pass, x: Labels, weight: Labels, bias: Labels | None = None, *rest: Any, **named: Any) -> Labels:
    """conv1d, conv2d, conv3d: (x, weight, bias, stride, padding, dilation, groups)."""
    return _convolution(cx, (x, weight, bias), named.get("groups", rest[3] if len(rest) > 3 else 1), transposed=False)


def transposed_convolution(cx: Pass, x: Labels, weight: Labels, bias: Labels | None = None, *rest: Any, **named: Any) -> Labels:
    """conv_transpose1d, 2d, 3d: (x, weight, bias, stride, padding, output_padding, groups, dilation)."""
    return _convolution(cx, (x, weight, bias), named.get("groups", rest[3] if len(rest) > 3 else 1), transposed=True)


def _convolution(cx: Pass, tensors: tuple[Labels, Labels, Labels | None], groups: int, *, transposed: bool) -> Labels:
    x, weight, bias = tensors
    batched = x.rank == weight.rank
    x = x if batched else x.with_axis(0)
    x = single(cx, fixed(cx, x, range(2, x.rank), "is a spatial axis of a convolution"), 1)
    weight = single(cx, single(cx, fixed(cx, weight, range(2, weight.rank), "is a spatial axis of a kernel"), 0), 1)
    kind = _plain if cx.memo("groups", lambda: groups) == 1 else _grouped
    out = kind(cx, x, weight, transposed)
    shape = tuple(cx.shape()) if batched else (1, *cx.shape())
    kept = [group for group in x.groups if 1 not in group.axes]
    result = Labels(shape, tuple(kept) if out is None else (*kept, Group((1,), out)))
    if bias is not None:
        result = combine(cx, result, _as_channels(bias, result.rank))
    return result if batched else result.without_axis_group(0)


def _as_channels(labels: Labels, rank: int) -> Labels:
    """A vector as (1, n, 1, …)."""
    labels = labels.with_axis(0)
    while labels.rank < rank:
        labels = labels.with_axis(labels.rank)
    return labels


def _plain(cx: Pass, x: Labels, weight: Labels, transposed: bool) -> Atoms | None:
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    incoming, columns, rows = x.on(1), weight.on(in_axis), weight.on(out_axis)
    if incoming is not None and columns is not None:
        cx.tie(incoming.atoms, columns.atoms)
    for group in (incoming, columns):
        if group is not None and (incoming is None or columns is None):
            cx.freeze(group.atoms, "meets an input of fixed length")
    _note(cx, 1, rows, columns_of if transposed else rows_of)
    return None if rows is None else rows.atoms


def _grouped(cx: Pass, x: Labels, weight: Labels, transposed: bool) -> Atoms | None:
    """Channels on both sides are grids of (groups, channels of a group), whose rows vanish together."""
    incoming, first, second = x.on(1), weight.on(0), weight.on(1)
    if incoming is None or first is None:
        for group in (incoming, first, second):
            if group is not None:
                cx.freeze(group.atoms, "is grouped with an input of fixed length")
        return first.atoms if first is not None and not transposed else None
    groups = cx.memo("groups", lambda: 1)
    per_group = cx.memo("per group", lambda: x.shape[1] // groups)
    if per_group == 1 and (not transposed or second is None):
        return _depthwise(cx, incoming.atoms, first.atoms)
    if transposed:
        return _grouped_transposed(cx, incoming.atoms, first.atoms, second)
    columns, outgoing = _cells(cx, incoming.atoms, "columns"), _cells(cx, first.atoms, "rows")
    _link(cx, columns, outgoing)
    _gather(cx, columns, first.atoms, second, per_group)
    _note(cx, 1, first, rows_of)
    return first.atoms


def _cells(cx: Pass, atoms: Atoms, key: str) -> Atoms:
    """Channels as a grid with one row for each group that is left."""
    original = cx.memo(key, lambda: atoms)
    size = len(original) // cx.memo("groups", lambda: 1)
    origin = cx.places(atoms, original) // size
    groups = len(np.unique(origin))
    if groups == 0 or len(atoms) % groups or (origin.reshape(groups, -1) != origin.reshape(groups, -1)[:, :1]).any():
        cx.violate("the groups of a grouped convolution are left with unequal widths")
    return atoms.reshape(groups, -1)


def _link(cx: Pass, *grids: Atoms) -> None:
    rows = cx.fresh((len(grids[0]),))
    for cells in grids:
        cx.grid(cells)
        cx.link(cells, rows)
    cx.rewrite(6, len(grids[0]))


def _gather(cx: Pass, columns: Atoms, first: Atoms, second: Group | None, per_group: int) -> None:
    """Cut the weight: block by block where it is a parameter, else by columns that are the same in all groups."""
    if second is None:
        return
    if not cx.is_parameter(1):
        for row in columns:
            cx.tie(row, second.atoms)
        return
    original_rows, original_columns = cx.memo("rows", lambda: first), cx.memo("columns", lambda: columns)
    cx.freeze(second.atoms, "")
    places = cx.places(columns.reshape(-1), original_columns) % per_group
    cx.gather_blocks(1, cx.places(first, original_rows), places.reshape(columns.shape))


def _grouped_transposed(cx: Pass, incoming: Atoms, first: Atoms, second: Group | None) -> Atoms | None:
    if second is None or not cx.is_parameter(1):
        for atoms in (incoming, first, second.atoms if second is not None else first):
            cx.freeze(atoms, "feeds a grouped transposed convolution whose weight is computed")
        return None
    cx.tie(first, incoming)
    groups, per_group = cx.memo("groups", lambda: 1), cx.memo("out per group", lambda: len(second.atoms))
    outgoing = cx.fresh((groups * per_group,))
    cells_in, cells_out = _cells(cx, incoming, "columns"), _cells(cx, outgoing, "outgoing")
    _link(cx, cells_in, cells_out)
    rows, columns = cx.memo("rows", lambda: first), cx.memo("outgoing", lambda: outgoing)
    cx.freeze(second.atoms, "")
    cx.gather_blocks(1, cx.places(first, rows), (cx.places(outgoing, columns) % per_group).reshape(cells_out.shape))
    cx.producer(1, outgoing, lambda weight: _transposed_rows(weight, groups))
    return outgoing


def _transposed_rows(weight: Tensor, groups: int) -> Tensor:
    """One row for each output channel of a grouped transposed weight (in, out / groups, …)."""
    blocks = weight.detach().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return blocks.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def _depthwise(cx: Pass, incoming: Atoms, first: Atoms) -> Atoms:
    multiplier = cx.memo("multiplier", lambda: len(first) // len(incoming))
    if multiplier == 1:
        cx.tie(first, incoming)
    else:
        if len(first) % len(incoming):
            cx.violate("a depthwise convolution is left with unequal multipliers")
        cells = first.reshape(len(incoming), -1)
        cx.grid(cells)
        cx.link(cells, incoming)
    cx.rewrite(6, len(incoming))
    cx.producer(1, first, rows_of)
    return first


def matmul(cx: Pass, left: Labels, right: Labels) -> Labels:
    """matmul, mm, bmm, mv, dot: the last axis of the left against the last but one of the right."""
    if right.rank == 2:
        _note(cx, 1, right.on(1), columns_of)
    a = left if left.rank > 1 else left.with_axis(0)
    b = right if right.rank > 1 else right.with_axis(1)
    out = contract(cx, a.with_axis(a.rank), _with_rows(b), _rank(a, b) - 1)
    if right.rank == 1:
        out = out.without_axis_group(out.rank - 1)
    return out.without_axis_group(out.rank - (2 if right.rank > 1 else 1)) if left.rank == 1 else out


def _with_rows(labels: Labels) -> Labels:
    """(…, K, N) as (…, 1, K, N), to meet (…, M, K, 1)."""
    return labels.with_axis(labels.rank - 2)


def _rank(left: Labels, right: Labels) -> int:
    """Place of K plus one in the broadcast (…, M, K, N)."""
    return max(left.rank, right.rank)


def added_matmul(cx: Pass, bias: Labels, left: Labels, right: Labels, **_: Any) -> Labels:
    """addmm, baddbmm: bias + left @ right."""
    if right.rank == 2:
        _note(cx, 2, right.on(1), columns_of)
    return combine(cx, contract(cx, left.with_axis(left.rank), _with_rows(right), _rank(left, right) - 1), bias)


def einsum(cx: Pass, equation: str, operands: list[Labels], **_: Any) -> Labels:
    """einsum without ellipsis or repeated letters in one term; anything else freezes what it touches."""
    equation = equation.replace(" ", "")
    terms, arrow, result = equation.partition("->")
    names = terms.split(",")
    repeated = any(len(set(name)) < len(name) for name in names)
    if "." in equation or repeated or not arrow:
        for labels in operands:
            for group in labels.groups:
                cx.freeze(group.atoms, "goes through an einsum of a kind that isn't followed")
        return Labels(tuple(cx.shape()))
    letters = sorted(set("".join(names)) - set(result)) + list(result)
    spread = [_spread(labels, name, letters) for labels, name in zip(operands, names, strict=True)]
    out = combine(cx, *spread)
    for _letter in range(len(letters) - len(result)):
        out = reduce(cx, out, 0)
    return out


def _spread(labels: Labels, name: str, letters: list[str]) -> Labels:
    """An operand with one axis for every letter, in the order of `letters`."""
    order = [name.index(letter) for letter in letters if letter in name]
    labels = labels.permuted(order)
    for place, letter in enumerate(letters):
        if letter not in name:
            labels = labels.with_axis(place)
    return labels


def attention(cx: Pass, query: Labels, key: Labels, value: Labels, mask: Labels | None = None, *rest: Any, **named: Any) -> Labels:
    """scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).

    The scale stays that of the trained width: where it was left to the default it is written out.
    """
    width = cx.memo("width", lambda: query.shape[-1])
    if query.shape[-1] != width and named.get("scale") is None:
        cx.rewrite("scale", 1 / math.sqrt(width))
    if named.get("enable_gqa"):
        key, value = (_repeat_heads(labels, query) for labels in (key, value))
    rank = max(query.rank, key.rank)
    swapped = key.permuted([*range(key.rank - 2), key.rank - 1, key.rank - 2])
    scores = contract(cx, query.with_axis(query.rank), _with_rows(swapped), rank - 1)
    if mask is not None:
        scores = combine(cx, scores, mask)
    if (group := scores.on(scores.rank - 1)) is not None:
        cx.inexact(group.atoms, "softmax over the axis")
    rank = max(scores.rank, value.rank)
    return contract(cx, scores.with_axis(scores.rank), _with_rows(value), rank - 1)


def _repeat_heads(labels: Labels, query: Labels) -> Labels:
    """Grouped-query attention: a key and value head serves several query heads, which live and die with it."""
    axis = labels.rank - 3
    times = query.shape[-3] // labels.shape[axis]
    return labels.indexed(axis, np.repeat(np.arange(labels.shape[axis]), times))
