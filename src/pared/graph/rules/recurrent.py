"""Recurrent layers and cells: a hidden unit is a row of every gate, a column of the recurrent weight, and an index of every state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pared.graph.algebra import combine, fixed, single
from pared.graph.labels import FROZEN, Atoms, Group, Labels
from pared.graph.passes import Pass

_ALIKE = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")


@dataclass(frozen=True)
class _Weights:
    """The tensors of one direction of one layer, with the places of the weights among the node's arguments."""

    incoming: Labels
    recurrent: Labels
    biases: tuple[Labels, ...]
    projection: Labels | None
    at: tuple[int | tuple[int, int], ...]


def lstm(cx: Pass, x: Labels, states: Sequence[Labels], weights: Sequence[Labels], *settings: bool | int | float) -> list[Labels]:
    """lstm.input: (x, (h, c), weights, has_biases, num_layers, dropout, train, bidirectional, batch_first) to (outputs, h, c)."""
    return _layers(cx, x, states, weights, settings, gates=4)


def gru(cx: Pass, x: Labels, state: Labels, weights: Sequence[Labels], *settings: bool | int | float) -> list[Labels]:
    """gru.input: as `lstm` with one state and three gates."""
    return _layers(cx, x, [state], weights, settings, gates=3)


def rnn(cx: Pass, x: Labels, state: Labels, weights: Sequence[Labels], *settings: bool | int | float) -> list[Labels]:
    """rnn_tanh.input, rnn_relu.input: as `lstm` with one state and one gate."""
    return _layers(cx, x, [state], weights, settings, gates=1)


def lstm_cell(cx: Pass, x: Labels, states: Sequence[Labels], *weights: Labels) -> list[Labels]:
    """lstm_cell: (x, (h, c), weight_ih, weight_hh, bias_ih, bias_hh) to (h, c)."""
    out = _cell(cx, x, states, weights, gates=4)
    return [out, out]


def gru_cell(cx: Pass, x: Labels, state: Labels, *weights: Labels) -> Labels:
    """gru_cell: (x, h, weight_ih, weight_hh, bias_ih, bias_hh) to h."""
    return _cell(cx, x, [state], weights, gates=3)


def rnn_cell(cx: Pass, x: Labels, state: Labels, *weights: Labels) -> Labels:
    """rnn_tanh_cell, rnn_relu_cell: as `gru_cell` with one gate."""
    return _cell(cx, x, [state], weights, gates=1)


def _layers(
    cx: Pass, x: Labels, states: Sequence[Labels], weights: Sequence[Labels], settings: Sequence[bool | int | float], gates: int
) -> list[Labels]:
    """All layers and directions. Each may lose other units, but all keep equally many: they share one tensor of states."""
    if not isinstance(settings[0], bool):  # lstm.data has one argument more
        raise ValueError("packed sequences aren't followed")
    biases, layers, directions = bool(settings[0]), int(settings[1]), 2 if settings[4] else 1
    each = len(weights) // (layers * directions)
    x = single(cx, fixed(cx, x, [0, 1], "is a sequence"), 2)
    incoming = None if (group := x.on(2)) is None else group.atoms
    cells: list[tuple[Atoms, Atoms]] = []
    for layer in range(layers):
        found = []
        for direction in range(directions):
            first = each * (layer * directions + direction)
            found.append(_direction(cx, incoming, _taken(weights, first, each, biases), gates, f"{layer}.{direction}"))
        cells += found
        incoming = np.concatenate([out for _, out in found])
    assert incoming is not None
    shapes = cx.shape()
    outs, units = np.stack([out for _, out in cells]), np.stack([unit for unit, _ in cells])
    for place, state in enumerate(states):
        _meet(cx, state, (outs, units)[place], _is_alike(cx, place))
    results = [Labels(tuple(shapes[0]), (Group((2,), incoming),))]
    return results + [_state(cx, tuple(shapes[1 + place]), (outs, units)[place]) for place in range(len(states))]


def _taken(weights: Sequence[Labels], first: int, each: int, biases: bool) -> _Weights:
    mine = weights[first : first + each]
    projected = each > 2 + 2 * biases
    places = [(2, first), (2, first + 1)] + ([(2, first + each - 1)] if projected else [])
    return _Weights(mine[0], mine[1], tuple(mine[2:4]) if biases else (), mine[-1] if projected else None, tuple(places))


def _direction(cx: Pass, incoming: Atoms | None, weights: _Weights, gates: int, key: str) -> tuple[Atoms, Atoms]:
    """One direction of one layer: ties its weights and returns the atoms of its hidden units and of its outputs."""
    _columns(cx, incoming, weights.incoming)
    if cx.memo(f"{key}:one", lambda: weights.incoming.shape[0] == gates):
        for labels in (weights.incoming, weights.recurrent, *weights.biases):
            for group in labels.groups:
                cx.freeze(group.atoms, "is the only hidden unit")
        return np.array([FROZEN]), np.array([FROZEN])
    rows = weights.incoming.on(0)
    assert rows is not None
    units = rows.atoms.reshape(gates, -1)[0]
    for labels in (weights.incoming, weights.recurrent, *weights.biases):
        group = labels.on(0)
        assert group is not None
        for gate in group.atoms.reshape(gates, -1):
            cx.tie(gate, units)
    for place in weights.at[:2]:
        cx.producer(place, units, _rows_of(gates))
    outputs = units
    if weights.projection is not None:
        _columns(cx, units, weights.projection)
        made = weights.projection.on(0)
        outputs = np.array([FROZEN]) if made is None else made.atoms
        cx.producer(weights.at[2], outputs, _rows_of(1))
    _columns(cx, outputs, weights.recurrent)
    return units, outputs


def _rows_of(gates: int) -> Callable[[Tensor], Tensor]:
    """One row for each hidden unit of a weight whose rows are (gates, units)."""

    def rows(weight: Tensor) -> Tensor:
        blocks = weight.detach().reshape(gates, weight.shape[0] // gates, -1)
        return blocks.transpose(0, 1).reshape(blocks.shape[1], -1)

    return rows


def _columns(cx: Pass, incoming: Atoms | None, weight: Labels) -> None:
    """The last axis of a weight reads what comes in."""
    columns = weight.on(1)
    if incoming is not None and columns is not None:
        cx.tie(incoming, columns.atoms)
    elif columns is not None:
        cx.freeze(columns.atoms, "meets an input of fixed length")
    elif incoming is not None:
        cx.freeze(incoming, "meets a weight of fixed length")


def _meet(cx: Pass, state: Labels, cells: Atoms, alike: bool) -> None:
    """A state that comes in, of shape (layers and directions, batch, units), meets the units of every layer and direction."""
    state = fixed(cx, state, [0, 1], "is a state of every layer")
    group = state.on(2)
    if group is not None and set(group.axes) == {0, 2}:
        cx.tie(group.along((0, 2)), cells)
        return
    group = single(cx, state, 2).on(2)
    for row in cells[:1] if alike and group is not None else cells:
        if group is None:
            cx.freeze(row, "meets a state of fixed length")
        else:
            cx.tie(group.atoms, row)


def _is_alike(cx: Pass, place: int) -> bool:
    """Whether a state is a constant whose indices are all alike, so that only its length matters."""
    given = cx.node.args[1]
    source = given[place] if isinstance(given, list | tuple) else given
    return getattr(getattr(getattr(source, "target", None), "overloadpacket", None), "__name__", "") in _ALIKE


def _state(cx: Pass, shape: tuple[int, ...], cells: Atoms) -> Labels:
    """A state that goes out: rows of units, one for each layer and direction, that keep equally many."""
    if len(cells) == 1:
        return Labels(shape, (Group((2,), cells[0]),))
    cx.grid(cells)
    cx.link(cells, None)
    return Labels(shape, (Group((0, 2), cells),))


def _cell(cx: Pass, x: Labels, states: Sequence[Labels], weights: Sequence[Labels], gates: int) -> Labels:
    """One step of one layer."""
    x = single(cx, x, x.rank - 1)
    incoming = None if (group := x.on(x.rank - 1)) is None else group.atoms
    first = 2
    tensors = _Weights(weights[0], weights[1], tuple(bias for bias in weights[2:] if isinstance(bias, Labels)), None, (first, first + 1))
    units, _ = _direction(cx, incoming, tensors, gates, "cell")
    shapes = cx.shape()
    shape = tuple(shapes[0] if isinstance(shapes, list) else shapes)
    kept = tuple(other for other in x.groups if x.rank - 1 not in other.axes)
    return combine(cx, Labels(shape, (*kept, Group((len(shape) - 1,), units))), *states)
