"""What a tensor is made of: a grid, a table of few values, integers, or numbers of all kinds. Found in the values alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pared.codec import grids
from pared.codec.cursor import Cursor, number
from pared.codec.elements import Layout, ordered
from pared.core.errors import FileError

MOST_VALUES = 1 << 12
"""The largest table of values."""

_MOST_MULTIPLE = (1 << 31) - 1
_SAMPLE = 1 << 16


class Kind(IntEnum):
    """What the integers of a tensor stand for, or how it is stored without any; the numbers are those in the file."""

    RAW = 0
    PLANES = 1
    ZSTD = 2
    INTEGERS = 3
    NIBBLES = 4
    TABLE = 5
    GRID = 6
    GRID_ROWS = 7
    GRID_COLUMNS = 8
    SIGNED_GRID = 9
    SIGNED_GRID_ROWS = 10
    SIGNED_GRID_COLUMNS = 11
    GRID_GROUPS = 12
    SIGNED_GRID_GROUPS = 13
    GRID_COLUMN_GROUPS = 14
    SIGNED_GRID_COLUMN_GROUPS = 15


_SIGNED: dict[Kind, Kind] = {  # with minus zeros
    Kind.GRID: Kind.SIGNED_GRID,
    Kind.GRID_ROWS: Kind.SIGNED_GRID_ROWS,
    Kind.GRID_COLUMNS: Kind.SIGNED_GRID_COLUMNS,
    Kind.GRID_GROUPS: Kind.SIGNED_GRID_GROUPS,
    Kind.GRID_COLUMN_GROUPS: Kind.SIGNED_GRID_COLUMN_GROUPS,
}
_GROUPS: dict[Kind, int] = {Kind.GRID_GROUPS: 1, Kind.GRID_COLUMN_GROUPS: 0}  # the axis along which the entries of a group stand
_LENGTHS = (1024, 512, 256, 128, 64, 32, 16)  # of groups that are tried in any case; what has grids in groups has them in halves of groups
_FEWEST = 8  # entries of a group: steps of smaller ones are larger than what they save
_LINES = 8  # in which the length of groups is looked for


@dataclass(frozen=True)
class Meaning:
    """A tensor as integers.

    Args:
        kind: what they stand for.
        head: what is needed to turn them back: an offset, a table or steps.
        matrix: the integers, shape (rows, columns).
    """

    kind: Kind
    head: bytes
    matrix: NDArray[np.int32]


def meanings(bits: NDArray[np.unsignedinteger], layout: Layout) -> Iterator[Meaning]:
    """All the ways in which a tensor's entries can be seen as integers, the likeliest first.

    Args:
        bits: the entries, shape (count,), as unsigned integers.
        layout: their type and shape.
    """
    shape, family = layout.matrix, layout.element.family
    unique = _different(bits)
    if family == "integer":
        yield from _offset(bits, layout)
    if layout.element.dtype == "<u1" and len(unique) > 1:
        counts = np.bincount(bits, minlength=256).reshape(16, 16)
        offset = int(np.argmax(counts.sum(0) + counts.sum(1)))
        halves = np.stack([bits & 15, bits >> 4], axis=1).astype(np.int32)
        halves -= offset
        yield Meaning(Kind.NIBBLES, bytes([offset]), halves.reshape(shape[0], 2 * shape[1]))
    found = False
    if family == "float":
        for meaning in _on_grids(bits.view(layout.element.dtype), shape):
            found = True
            yield meaning
    few = len(unique) <= MOST_VALUES and 2 * len(unique) <= max(len(bits), 2)
    if few and family != "integer" and not (found and len(unique) > MOST_VALUES // 4):
        yield _table(bits, layout, unique)


def _different(bits: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """The different entries in order, or those of a part if that has too many for a table already."""
    part = np.unique(bits[:: max(len(bits) // (4 * MOST_VALUES), 1)])
    return part if len(part) > MOST_VALUES else np.unique(bits)


def _offset(bits: NDArray[np.unsignedinteger], layout: Layout) -> Iterator[Meaning]:
    values = bits.view(layout.element.dtype)
    if len(values) == 0:
        return
    lowest, highest = int(values.min()), int(values.max())
    offset = int(np.median(values[:: max(len(values) // _SAMPLE, 1)])) if highest - lowest > _SAMPLE else _likeliest(values, lowest)
    if highest - offset <= _MOST_MULTIPLE and offset - lowest <= _MOST_MULTIPLE:
        head = (offset % (1 << 8 * layout.element.size)).to_bytes(layout.element.size, "little")
        difference = (values - np.array(offset, values.dtype)).astype(np.int32)  # modulo the size of an entry, or of an integer
        if layout.element.size < 4:
            difference = values.astype(np.int32) - np.int32(offset)
        yield Meaning(Kind.INTEGERS, head, difference.reshape(layout.matrix))


def _likeliest(values: NDArray[np.integer], lowest: int) -> int:
    """The most frequent value, of equally frequent ones the lowest, where all are near to each other."""
    counts = np.bincount((values - np.array(lowest, values.dtype)).astype(np.uint16))
    return lowest + int(np.argmax(counts))


def _on_grids(values: NDArray[np.floating], shape: tuple[int, int]) -> Iterator[Meaning]:
    matrix = values.reshape(shape)
    step = grids.find_step(values)
    if step is not None:
        yield from _multiples(Kind.GRID, matrix, np.array(step, values.dtype))
        return
    on_lines = False
    for kind, axis in ((Kind.GRID_ROWS, 1), (Kind.GRID_COLUMNS, 0)):
        lines = matrix if axis == 1 else matrix.T
        if min(shape) > 1 and (steps := grids.find_steps(lines)) is not None:
            on_lines = True
            yield from _multiples(kind, matrix, np.expand_dims(steps, axis))
    if not on_lines and min(shape) > 1:
        for kind in _GROUPS:
            yield from _in_groups(matrix, kind)


def _in_groups(matrix: NDArray[np.floating], kind: Kind) -> Iterator[Meaning]:
    """On grids of groups of neighbours in rows or columns, if there are any: of the longest length that all of them have grids for."""
    lines = matrix if _GROUPS[kind] else matrix.T
    entries = lines.shape[1]
    for length in _lengths(lines):
        if (steps := grids.find_steps(_groups(lines, length))) is None:
            continue
        steps = steps.reshape(len(lines), -1)
        spread = np.repeat(steps, length, axis=1)[:, :entries]
        if not _GROUPS[kind]:
            steps, spread = np.ascontiguousarray(steps.T), spread.T
        for meaning in _multiples(kind, matrix, spread):
            yield Meaning(meaning.kind, number(length) + steps.tobytes(), meaning.matrix)
        return


def _lengths(lines: NDArray[np.floating]) -> list[int]:
    """Lengths that groups may have, the longest first: as far as each of some lines has a grid, and the usual ones."""
    few, entries = lines[:: max(len(lines) // _LINES, 1)][:_LINES], lines.shape[1]
    low, high = 1, entries  # that many have grids, and that many haven't
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if grids.find_steps(few[:, :middle]) is None else (middle, high)
    usual = {length for length in _LENGTHS if length < entries}
    return sorted(usual | {low} if low >= _FEWEST else usual, reverse=True)


def _groups(lines: NDArray[np.floating], length: int) -> NDArray[np.floating]:
    """Groups of every line as rows of a matrix; the last of a line is filled up with zeros, which lie on every grid."""
    entries = lines.shape[1]
    if entries % length == 0:
        return lines.reshape(-1, length)
    return np.pad(lines, ((0, 0), (0, -entries % length))).reshape(-1, length)


def _multiples(kind: Kind, matrix: NDArray[np.floating], steps: NDArray[np.floating]) -> Iterator[Meaning]:
    found = grids.multiples(matrix, steps)
    if found is not None:
        yield Meaning(_SIGNED[kind] if found[1] else kind, steps.tobytes(), found[0])


def _table(bits: NDArray[np.unsignedinteger], layout: Layout, unique: NDArray[np.unsignedinteger]) -> Meaning:
    """Entries as their ranks in a sorted table, counted from zero's place, or from the most frequent value's where there is no zero."""
    table = unique[np.argsort(ordered(unique, layout.element.family))]
    rank = np.argsort(np.argsort(ordered(unique, layout.element.family))).astype(np.int32)
    ranks = np.empty(len(bits), np.int32)
    for start in range(0, len(bits), _SAMPLE):
        ranks[start : start + _SAMPLE] = rank[np.searchsorted(unique, bits[start : start + _SAMPLE])]
    zero = np.flatnonzero(table == 0)
    centre = int(zero[0]) if len(zero) else int(np.argmax(np.bincount(ranks, minlength=1)))
    ranks -= centre
    return Meaning(Kind.TABLE, number(len(table)) + number(centre) + table.tobytes(), ranks.reshape(layout.matrix))


def matrix_shape(kind: Kind, layout: Layout) -> tuple[int, int]:
    """Rows and columns of the integers of a tensor."""
    rows, columns = layout.matrix
    return (rows, 2 * columns) if kind is Kind.NIBBLES else (rows, columns)


def most_bits(kind: Kind, layout: Layout) -> int:
    """Bits that a magnitude among the integers of a tensor can have.

    >>> from pared.codec.elements import ELEMENTS
    >>> most_bits(Kind.INTEGERS, Layout(ELEMENTS["int8"], ())), most_bits(Kind.GRID, Layout(ELEMENTS["float32"], ()))
    (8, 23)
    """
    if kind is Kind.NIBBLES:
        return 4
    if kind is Kind.TABLE:
        return MOST_VALUES.bit_length() - 1
    if kind is Kind.INTEGERS:
        return min(8 * layout.element.size, 31)
    return {2: 10, 4: 23, 8: 31}[layout.element.size]  # as many as a float has after its first


@dataclass(frozen=True)
class Head:
    """What is needed to turn integers back into entries.

    Args:
        kind: what the integers stand for.
        values: an offset, the table or the steps.
        centre: of a table: the rank that 0 stands for.
        length: of groups: entries of each.
    """

    kind: Kind
    values: NDArray[np.generic]
    centre: int = 0
    length: int = 0


def read_head(cursor: Cursor, kind: Kind, layout: Layout) -> Head:
    """Read what `Meaning.head` holds.

    Raises:
        FileError: if it is cut off, or of a kind that a tensor of this type can't be.
    """
    element, (rows, columns) = layout.element, layout.matrix
    if kind is Kind.INTEGERS and element.family == "integer":
        return Head(kind, np.frombuffer(cursor.take(element.size, "an offset"), element.dtype))
    if kind is Kind.NIBBLES and element.dtype == "<u1":
        return Head(kind, np.frombuffer(cursor.take(1, "an offset"), np.uint8))
    if kind is Kind.TABLE:
        count = cursor.number("the size of a table", MOST_VALUES)
        centre = cursor.number("the place of zero", max(count - 1, 0))
        return Head(kind, np.frombuffer(cursor.take(count * element.size, "a table of values"), element.bits), centre)
    for plain, count in zip(_SIGNED, (1, rows, columns, rows, columns), strict=True):
        if element.family != "float" or kind not in (plain, _SIGNED[plain]):
            continue
        length = 0
        if plain in _GROUPS:
            entries = layout.matrix[_GROUPS[plain]]
            if (length := cursor.number("the length of a group", max(entries, 1))) == 0:
                raise cursor.error("groups of a grid have no entries")
            count *= -(-entries // length)
        return Head(kind, np.frombuffer(cursor.take(count * element.size, "the steps of a grid"), element.dtype), length=length)
    raise cursor.error(f"a tensor of {element.name} can't be stored as {kind.name}")


def entries(head: Head, matrix: NDArray[np.int32], layout: Layout) -> NDArray[np.unsignedinteger]:
    """The entries that integers stand for, shape (count,), as unsigned integers.

    Raises:
        FileError: if an integer stands for none.
    """
    found = np.empty(layout.matrix, layout.element.bits)
    for rows, columns in grids.tiles(layout.matrix):
        if head.kind is Kind.NIBBLES:
            found[rows, columns] = _bytes(head, matrix[rows, 2 * columns.start : 2 * columns.stop])
        else:
            found[rows, columns] = _part(head, matrix[rows, columns], rows, columns, layout)
    return found.reshape(-1)


def _bytes(head: Head, part: NDArray[np.int32]) -> NDArray[np.integer]:
    halves = part.astype(np.int64) + int(head.values[0])
    _check(halves, 0, 15)
    return halves[:, ::2] | halves[:, 1::2] << 4


def _part(head: Head, part: NDArray[np.int32], rows: slice, columns: slice, layout: Layout) -> NDArray[np.generic]:
    bits = layout.element.bits
    if head.kind is Kind.TABLE:
        ranks = part.astype(np.int64) + head.centre
        _check(ranks, 0, len(head.values) - 1)
        return head.values[ranks]
    if head.kind is Kind.INTEGERS:
        return part.astype(bits) + head.values.view(bits)
    steps = head.values
    if head.kind in (Kind.GRID_ROWS, Kind.SIGNED_GRID_ROWS):
        steps = head.values[rows, None]
    elif head.kind in (Kind.GRID_COLUMNS, Kind.SIGNED_GRID_COLUMNS):
        steps = head.values[columns]
    elif head.kind in (Kind.GRID_COLUMN_GROUPS, Kind.SIGNED_GRID_COLUMN_GROUPS):
        by_group = head.values.reshape(-1, layout.matrix[1])
        steps = by_group[np.arange(rows.start, min(rows.stop, layout.matrix[0])) // head.length][:, columns]
    elif head.length:
        by_row = head.values.reshape(layout.matrix[0], -1)
        steps = by_row[rows][:, np.arange(columns.start, min(columns.stop, layout.matrix[1])) // head.length]
    signed = head.kind in _SIGNED.values()
    return grids.at(part, steps, np.dtype(layout.element.dtype), signed=signed).view(bits)  # pyright: ignore[reportArgumentType]


def _check(values: NDArray[np.int64], low: int, high: int) -> None:
    if values.min(initial=low) < low or values.max(initial=low) > high:
        raise FileError("an integer stands for no value.")
