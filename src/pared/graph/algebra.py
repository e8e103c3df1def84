"""What operators do to labels: broadcasting products, sums over an axis, reshapes, concatenations.

Every function takes the pass that runs it (`Pass`): the analysis notes ties, the cutter checks that they hold.
A group's atoms are laid out outermost axis first. Indices of an outer axis ("rows") can vanish as a whole; indices of the innermost
axis can vanish row by row, as long as every row that stays keeps equally many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pared.graph.labels import FROZEN, Atoms, Group, Labels, drop_constant_axes, factor
from pared.graph.passes import Pass


def combine(cx: Pass, *operands: Labels) -> Labels:
    """Labels of an elementwise operator with broadcasting."""
    result = operands[0]
    for operand in operands[1:]:
        result = _combine_two(cx, result, operand)
    return result


def _combine_two(cx: Pass, left: Labels, right: Labels) -> Labels:
    while left.rank < right.rank:
        left = left.with_axis(0)
    while right.rank < left.rank:
        right = right.with_axis(0)
    shape = tuple(b if a == 1 else a for a, b in zip(left.shape, right.shape, strict=True))
    groups = [joined for axes in _clusters(left, right) if (joined := _join(cx, axes, left, right)) is not None]
    return Labels(shape, tuple(groups))


def _clusters(left: Labels, right: Labels) -> list[set[int]]:
    """Sets of axes that are connected by groups of either operand."""
    clusters: list[set[int]] = []
    for group in (*left.groups, *right.groups):
        axes = set(group.axes)
        for cluster in [cluster for cluster in clusters if cluster & axes]:
            clusters.remove(cluster)
            axes |= cluster
        clusters.append(axes)
    return clusters


def _join(cx: Pass, axes: set[int], left: Labels, right: Labels) -> Group | None:
    """Tie what the two operands hold on a set of axes and return the group of the result."""
    inside = [group for group in (*left.groups, *right.groups) if set(group.axes) <= axes]
    kind = f"joined:{[group.axes for group in left.groups]}{[group.axes for group in right.groups]}{sorted(axes)}"
    widest = cx.memo(kind, lambda: max(range(len(inside)), key=lambda place: (len(inside[place].axes), inside[place].atoms.size)))
    master = inside[widest]
    own, other = (left, right) if any(group is master for group in left.groups) else (right, left)
    if set(master.axes) != axes:
        if any(group is not master and set(group.axes) <= axes for group in own.groups):
            for group in inside:
                cx.freeze(group.atoms, "meets axes that are grouped otherwise")
            return None
        other = _narrowed(cx, other, axes, set(master.axes))
    joined: Group | None = master
    for axis in sorted(master.axes):
        if joined is None:
            break
        partner = other.on(axis)
        if partner is None:
            if other.shape[axis] != 1 and axis in joined.axes:
                joined = fix(cx, joined, axis, "meets a fixed length")
        elif len(partner.axes) == 1:
            if axis in joined.axes:
                align(cx, joined, axis, partner.atoms)
            else:
                cx.freeze(partner.atoms, "meets a fixed length")
        elif set(partner.axes) == set(joined.axes):
            cx.tie(joined.atoms, partner.along(joined.axes))
            break
        elif set(partner.axes) < set(joined.axes):
            cx.tie(joined.atoms, np.broadcast_to(_spread(partner, joined.axes), joined.atoms.shape))
        else:
            cx.freeze(joined.atoms, "meets axes that are grouped otherwise")
            cx.freeze(partner.atoms, "meets axes that are grouped otherwise")
            joined = None
    return joined


def _narrowed(cx: Pass, labels: Labels, axes: set[int], wanted: set[int]) -> Labels:
    """Of the groups on `axes`, only what depends on the `wanted` ones: indices along the others are tied."""
    groups: list[Group] = []
    for group in labels.groups:
        left: Group | None = group
        for axis in sorted(set(group.axes) - wanted) if set(group.axes) <= axes else ():
            left = _tied_along(cx, left, axis) if left is not None else None
        groups += [left] if left is not None else []
    return Labels(labels.shape, tuple(groups))


def _spread(group: Group, axes: tuple[int, ...]) -> Atoms:
    """The atoms with one dimension for each of `axes`, of length one where the group has none."""
    inner = group.along([axis for axis in axes if axis in group.axes])
    return np.expand_dims(inner, tuple(place for place, axis in enumerate(axes) if axis not in group.axes))


def align(cx: Pass, group: Group, axis: int, atoms: Atoms) -> None:
    """Index i along `axis` of the group and atom i of a plain axis live and die together."""
    place = group.axes.index(axis)
    inner = math.prod(group.atoms.shape[place + 1 :])
    cells = group.atoms.reshape(-1, group.atoms.shape[place], inner)
    if len(group.axes) == 1:
        cx.tie(group.atoms, atoms)
    elif inner == 1 and place == len(group.axes) - 1:
        for row in cells:
            cx.tie(row[:, 0], atoms)
    else:
        for block in cells:
            cx.link(block, atoms)


def fix(cx: Pass, group: Group, axis: int, why: str) -> Group | None:
    """No index along `axis` may vanish; returns what is left of the group (None: nothing)."""
    if len(group.axes) == 1:
        cx.freeze(group.atoms, why)
        return None
    place = group.axes.index(axis)
    if place == len(group.axes) - 1:
        return _tied_along(cx, group, axis)
    cells = group.atoms.reshape(-1, math.prod(group.atoms.shape[place + 1 :]))
    if place == 0:
        cx.link(cells, None)
    else:  # within an outer row, all indices along the axis vanish together
        outer = cx.fresh((math.prod(group.atoms.shape[:place]),))
        cx.link(cells, np.repeat(outer, group.atoms.shape[place]))
    return group


def _tied_along(cx: Pass, group: Group, axis: int) -> Group | None:
    """Make the group independent of `axis` by tying all indices along it."""
    place = group.axes.index(axis)
    first = group.atoms.take([0], axis=place)
    cx.tie(group.atoms, np.broadcast_to(first, group.atoms.shape))
    rest = tuple(other for other in group.axes if other != axis)
    return Group(rest, group.at(axis)) if rest else None


def single(cx: Pass, labels: Labels, axis: int) -> Labels:
    """Make `axis` a group of its own (or unlabelled)."""
    group = labels.on(axis)
    while group is not None and len(group.axes) > 1:
        other = next(candidate for candidate in group.axes if candidate != axis)
        group = _tied_along(cx, group, other)
    return _replaced(labels, axis, group)


def fixed(cx: Pass, labels: Labels, axes: Sequence[int], why: str) -> Labels:
    """Fix the length of some axes."""
    for axis in axes:
        if (group := labels.on(axis)) is not None:
            labels = _replaced(labels, axis, fix(cx, group, axis, why))
    return labels


def _replaced(labels: Labels, axis: int, group: Group | None) -> Labels:
    kept = tuple(other for other in labels.groups if axis not in other.axes)
    return Labels(labels.shape, (*kept, group) if group is not None else kept)


def reduce(cx: Pass, labels: Labels, axis: int, *, inexact: str | None = None) -> Labels:
    """Labels after a reduction takes `axis` away; `inexact` says why missing indices would change the result."""
    group = labels.on(axis)
    if group is None:
        return labels.without_axis(axis)
    if inexact:
        cx.inexact(group.atoms, inexact)
    rest: Group | None = None
    if len(group.axes) > 1 and group.axes[-1] == axis:
        rows = cx.fresh(group.atoms.shape[:-1])
        cx.link(group.atoms.reshape(-1, group.atoms.shape[-1]), rows.reshape(-1))
        rest = Group(group.axes[:-1], rows)
    elif len(group.axes) > 1:
        rest = _tied_along(cx, group, axis)
    return _replaced(labels, axis, rest).without_axis(axis)


def contract(cx: Pass, left: Labels, right: Labels, axis: int) -> Labels:
    """A sum of products: broadcast two operands against each other and sum over `axis`."""
    return reduce(cx, combine(cx, left, right), axis)


def reshape(cx: Pass, labels: Labels, shape: Sequence[int], key: str = "reshape") -> Labels:
    """Labels after a reshape: axes merge, split or stay; a split leaves cells that know where they came from."""
    blocks = cx.memo(f"{key}:blocks", lambda: factor(labels.shape, shape))
    if math.prod(labels.shape) != math.prod(shape):
        cx.violate(f"can't reshape {labels.shape} to {tuple(shape)}")
    places = {olds[0]: news[0] for olds, news in blocks if len(olds) == len(news) == 1}
    done: list[Group] = []
    for number, (olds, news) in enumerate(blocks):
        touching = [group for group in labels.groups if set(group.axes) & set(olds)]
        if not touching or (len(olds) == len(news) == 1):
            continue
        group = max(touching, key=lambda candidate: candidate.atoms.size)
        for lost in touching:
            if lost is not group:
                cx.freeze(lost.atoms, "is merged with another axis that can be cut")
        labels = Labels(labels.shape, tuple(other for other in labels.groups if other not in touching))
        if not set(group.axes) - set(olds) <= set(places):
            cx.freeze(group.atoms, "is spread over several reshaped axes")
            continue
        moved = _moved(cx, group, labels.shape, shape, (olds, news, places), f"{key}:{number}")
        if moved is not None:
            done.append(moved)
    kept = tuple(Group(tuple(places[axis] for axis in group.axes), group.atoms) for group in labels.groups)
    return Labels(tuple(shape), (*kept, *done))


def _moved(
    cx: Pass, group: Group, old: Sequence[int], new: Sequence[int], block: tuple[list[int], list[int], dict[int, int]], key: str
) -> Group | None:
    """Carry one group through one block of a reshape."""
    olds, news, places = block
    outside = [axis for axis in group.axes if axis not in olds]
    inside = [axis for axis in olds if axis in group.axes]
    atoms = group.along([*outside, *inside])
    lengths = list(atoms.shape[: len(outside)])
    spread = atoms.reshape(*lengths, *(old[axis] if axis in inside else 1 for axis in olds))
    spread = np.broadcast_to(spread, (*lengths, *(old[axis] for axis in olds)))
    cells = spread.reshape(*lengths, *(new[axis] for axis in news))
    first = group.axes.index(inside[0]) if inside else 0
    moved = (*(places[axis] for axis in outside), *news)
    order = [places[axis] for axis in outside if group.axes.index(axis) < first]
    order += [*news, *(places[axis] for axis in outside if group.axes.index(axis) > first)]
    candidate = Group(tuple(order), cells.transpose([moved.index(axis) for axis in order]))
    _, stayed = cx.memo(f"{key}:stayed", lambda: drop_constant_axes(candidate))
    result, _ = drop_constant_axes(candidate, keep=stayed)
    if result is not None and len(result.axes) > 1:
        grids(cx, result)
    return result


def grids(cx: Pass, group: Group) -> None:
    """Every row of every level of a joint group keeps equally many cells, or none."""
    for place in range(1, len(group.axes)):
        cx.grid(group.atoms.reshape(math.prod(group.atoms.shape[:place]), -1))


def concatenate(cx: Pass, parts: Sequence[Labels], axis: int) -> Labels:
    """Labels of a concatenation: ranges lie side by side on `axis`; the other axes are tied."""
    length = sum(part.shape[axis] for part in parts)
    on_axis = [part.on(axis) for part in parts]
    joint = [group for group in on_axis if group is not None and len(group.axes) > 1]
    bare = [_without_group(part, axis) for part in parts]
    rest = combine(cx, *(Labels((*part.shape[:axis], 1, *part.shape[axis + 1 :]), part.groups) for part in bare))
    shape = (*rest.shape[:axis], length, *rest.shape[axis + 1 :])
    if joint:
        axes = joint[0].axes
        if not all(group is not None and set(group.axes) == set(axes) for group in on_axis):
            for group in on_axis:
                if group is not None:
                    cx.freeze(group.atoms, "is concatenated with an axis of another kind")
            return Labels(shape, rest.groups)
        cells = [group.along(axes) for group in on_axis if group is not None]
        _link_rows(cx, cells, axes.index(axis))
        return Labels(shape, (*rest.groups, Group(axes, np.concatenate(cells, axis=axes.index(axis)))))
    if not any(on_axis):
        return Labels(shape, rest.groups)
    ranges = [
        group.atoms if group is not None else np.full(part.shape[axis], FROZEN, np.int64)
        for group, part in zip(on_axis, parts, strict=True)
    ]
    return Labels(shape, (*rest.groups, Group((axis,), np.concatenate(ranges))))


def _without_group(labels: Labels, axis: int) -> Labels:
    return Labels(labels.shape, tuple(group for group in labels.groups if axis not in group.axes))


def _link_rows(cx: Pass, cells: list[Atoms], place: int) -> None:
    """Rows of joint groups that are concatenated on an inner axis vanish together."""
    if place == 0:
        return
    rows = cx.fresh((math.prod(cells[0].shape[:place]),))
    for part in cells:
        cx.link(part.reshape(len(rows), -1), rows)


def take(cx: Pass, labels: Labels, axis: int, index: slice) -> Labels:
    """A range of one axis."""
    result = labels.indexed(axis, index)
    group = result.on(axis)
    if group is not None and len(group.axes) > 1:
        grids(cx, group)
    return result


def select(cx: Pass, labels: Labels, axis: int, position: int, new_position: int) -> Labels:
    """One index of an axis; that index has to stay."""
    group = labels.on(axis)
    if group is not None and len(group.axes) == 1:
        cx.freeze(group.atoms[[new_position]], "is read by its index")
    elif group is not None:
        labels = fixed(cx, labels, [axis], "is read by its index")
        new_position = position
    return labels.indexed(axis, slice(new_position, new_position + 1)).without_axis_group(axis)
