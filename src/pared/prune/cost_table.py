"""What layers cost in time for every number of channels, measured, and where a cut therefore pays.

The engine computes channels in blocks, and the size of a block depends on the processor, the operator and the shape. So the time of a
layer falls in steps, and only some counts are worth having. Here every layer's operator is timed alone on a grid of counts; of what is
wanted, each class then keeps as many neurons as cost no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from pared.graph.analysis import Analysis
from pared.graph.labels import Labels
from pared.prune.allocation import class_keys
from pared.prune.observe import operator_name
from pared.prune.one_operator import Operator, time_operators

TOLERANCE = 0.03
"""Times that differ by less are equal: medians of so few calls are no more exact."""

Timer = Callable[[Sequence[Operator]], list[float]]


@dataclass(frozen=True)
class Width:
    """The length of an axis as classes are cut: `fixed` indices stay, and so many belong to each class."""

    fixed: int
    shares: tuple[tuple[str, int], ...]

    def length(self, left: Mapping[str, float]) -> int:
        """The length where these shares of the classes are left (1 for a class not named), rounded up and at least 1.

        >>> Width(2, (("a", 4), ("b", 8))).length({"a": 0.5})
        12
        """
        return max(1, math.ceil(self.fixed + sum(number * left.get(key, 1.0) for key, number in self.shares) - 1e-9))


@dataclass(frozen=True)
class Layer:
    """A layer of a network: its operator, and which classes its two widths belong to."""

    operator: Operator
    outputs: Width
    inputs: Width

    @property
    def classes(self) -> set[str]:
        """The keys of the classes that it computes or reads."""
        return {key for width in (self.outputs, self.inputs) for key, _ in width.shares}


def grid(size: int) -> list[int]:
    """The counts at which a class of `size` is measured: all up to 16, else multiples of 4 (of 8 from 65 on, of more from 129 on).

    Blocks of engines are 4, 8 or 16 channels, so no step falls between, and a class has about 16 points.

    >>> grid(3), grid(20), len(grid(512))
    ([1, 2, 3], [4, 8, 12, 16, 20], 16)
    """
    step = 1 if size <= 16 else 4 if size <= 64 else 8 * math.ceil(size / 128)
    return sorted({*range(step, size, step), size})


@dataclass(frozen=True)
class Curve:
    """Times of an operator by one of its widths; between two measured widths it costs what the upper one does."""

    widths: tuple[int, ...]
    times: tuple[float, ...]

    def at(self, width: int) -> float:
        """The time at the next measured width.

        >>> Curve((4, 8), (1.0, 3.0)).at(5)
        3.0
        """
        return self.times[min(int(np.searchsorted(self.widths, width)), len(self.widths) - 1)]


class CostTable:
    """Times of operators, measured when they are first needed.

    The time of a layer for both widths is taken to be a product: T(o, i) = T(o, I) · T(O, i) / T(O, I), where O and I are its full
    widths. So a layer costs about 32 measurements, and not the square of 16.

    Args:
        timer: milliseconds of several operators, in their order; the engine's by default.

    >>> table = CostTable(lambda operators: [8.0 * math.ceil(operator.outputs / 8) for operator in operators])
    >>> table.curve(Operator("linear", 16, 4), "outputs", [4, 8, 12, 16]).times
    (8.0, 8.0, 16.0, 16.0)
    """

    def __init__(self, timer: Timer = time_operators) -> None:
        self.timer = timer
        self.times: dict[Operator, float] = {}

    def measure(self, operators: Iterable[Operator]) -> None:
        """Time those that aren't known yet, together."""
        unknown = [operator for operator in dict.fromkeys(operators) if operator not in self.times]
        if unknown:
            self.times.update(zip(unknown, self.timer(unknown), strict=True))

    def curve(self, operator: Operator, axis: str, widths: Sequence[int]) -> Curve:
        """The operator's time by its outputs or its inputs."""
        full = {"outputs": operator.outputs, "inputs": operator.inputs}
        versions = [operator.resized(**{**full, axis: width}) for width in widths]
        self.measure(versions)
        return Curve(tuple(widths), tuple(self.times[version] for version in versions))


class NetworkTimes:
    """The predicted time of a network's layers for any counts of its classes.

    Products of two activations (attention), pooling and everything else that has no weights isn't in it.

    Args:
        analysis: of the network.
        table: where times are looked up.
    """

    def __init__(self, analysis: Analysis, table: CostTable) -> None:
        self.sizes = {key: len(found.neurons) for key, found in zip(class_keys(analysis.classes), analysis.classes, strict=True)}
        self.layers = find_layers(analysis)
        self._curves: list[tuple[Curve, Curve]] = []
        for layer in self.layers:
            operator, widths = layer.operator, (self._widths(layer.outputs), self._widths(layer.inputs))
            full = {"outputs": operator.outputs, "inputs": operator.inputs}
            table.measure(
                operator.resized(**{**full, axis: width})
                for axis, line in zip(("outputs", "inputs"), widths, strict=True)
                for width in line
            )
            self._curves.append((table.curve(operator, "outputs", widths[0]), table.curve(operator, "inputs", widths[1])))

    def total(self, counts: Mapping[str, int]) -> float:
        """Milliseconds of all layers where so many neurons of the classes stay; a class that isn't named stays whole."""
        return self._sum(range(len(self.layers)), counts)

    def settle(self, counts: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
        """For every class the largest count that costs no more than what is wanted; a cut that doesn't pay isn't made.

        Args:
            counts: how many of each class are wanted.
            most: how many may stay.
        """
        settled = dict(counts)
        for key, wanted in counts.items():
            touched = [index for index, layer in enumerate(self.layers) if key in layer.classes]
            candidates = [number for number in grid(self.sizes[key]) if wanted <= number <= most[key]]
            curve = {number: self._sum(touched, {**settled, key: number}) for number in candidates}
            settled[key] = largest_at_the_price(curve, wanted) if touched else wanted
        return settled

    def _sum(self, indices: Iterable[int], counts: Mapping[str, int]) -> float:
        left = {key: counts[key] / size for key, size in self.sizes.items() if key in counts}
        return sum(self._time(index, left) for index in indices)

    def _time(self, index: int, left: Mapping[str, float]) -> float:
        layer, (outputs, inputs) = self.layers[index], self._curves[index]
        whole = outputs.at(layer.outputs.length({}))
        product = outputs.at(layer.outputs.length(left)) * inputs.at(layer.inputs.length(left))
        return product / whole if whole > 0 else 0.0

    def _widths(self, width: Width) -> list[int]:
        size = max((self.sizes[key] for key, _ in width.shares), default=1)
        keys = [key for key, _ in width.shares]
        return sorted({width.length(dict.fromkeys(keys, number / size)) for number in grid(size)})


def largest_at_the_price(curve: Mapping[int, float], wanted: int) -> int:
    """The largest count that costs what the smallest of these counts does, up to the noise; `wanted` if there are none.

    >>> largest_at_the_price({4: 1.0, 6: 1.01, 8: 1.0, 10: 2.0}, 4)
    8
    """
    if not curve:
        return wanted
    price = curve[min(curve)] * (1 + TOLERANCE)
    return max(number for number, time in curve.items() if time <= price)


def find_layers(analysis: Analysis) -> list[Layer]:
    """The convolutions and linear layers of an analysed network, with the classes of their widths."""
    owner = {root: key for key, found in zip(class_keys(analysis.classes), analysis.classes, strict=True) for root in found.neurons}
    layers = []
    for node in analysis.captured.module.graph.nodes:
        operator = _operator(node, analysis)
        if operator is None:
            continue
        x, weight = analysis.labels[node.args[0]], analysis.labels[node.args[1]]
        out_axis = 1 if operator.kind == "transposed" else 0
        grouped = operator.groups > 1
        # the weight of a grouped convolution has only a group's part of one of its axes; activations have all of both
        outputs = _width(analysis.labels[node], 1, analysis, owner) if grouped else _width(weight, out_axis, analysis, owner)
        inputs = _width(x, 1, analysis, owner) if grouped else _width(weight, 1 - out_axis, analysis, owner)
        layers.append(Layer(operator, outputs, inputs if operator.groups < operator.inputs or not grouped else Width(operator.inputs, ())))
    return layers


def _width(labels: Labels, axis: int, analysis: Analysis, owner: Mapping[int, str]) -> Width:
    group = labels.on(axis)
    if group is None or len(group.axes) > 1:
        return Width(labels.shape[axis], ())
    keys = [owner.get(int(root)) for root in analysis.root[group.atoms]]
    return Width(keys.count(None), tuple((key, keys.count(key)) for key in dict.fromkeys(keys) if key is not None))


def _operator(node: fx.Node, analysis: Analysis) -> Operator | None:
    """The operator of a node with its sizes, or None if it is neither a convolution nor a linear layer."""
    name = operator_name(node)
    if name != "linear" and not name.startswith(("conv1d", "conv2d", "conv3d", "conv_transpose")):
        return None
    seen = analysis.first.seen
    x, weight = (tuple(map(int, seen[argument])) for argument in node.args[:2])  # type: ignore[index]
    if name == "linear":
        return Operator("linear", *weight, sizes=x[1:-1]) if len(weight) == 2 else None
    if len(x) != len(weight):
        return None  # a convolution without a batch
    transposed, axes, kernel = name.startswith("conv_transpose"), len(weight) - 2, weight[2:]
    settings: list[Any] = [*node.args[3:], *[None] * 5]
    groups, dilation = (settings[3], settings[4]) if transposed else (settings[3], settings[2])
    groups, dilation = int(groups or 1), _each(dilation, 1, axes)
    padding = settings[1]
    if isinstance(padding, str):
        pads = tuple(step * (length - 1) // 2 if padding == "same" else 0 for step, length in zip(dilation, kernel, strict=True))
    else:
        pads = _each(padding, 0, axes)
    outputs, inputs = (weight[1] * groups, weight[0]) if transposed else (weight[0], weight[1] * groups)
    kind = "transposed" if transposed else "convolution"
    return Operator(kind, outputs, inputs, x[2:], kernel, _each(settings[0], 1, axes), pads, dilation, groups)


def _each(value: Any, default: int, axes: int) -> tuple[int, ...]:
    """A setting for every spatial axis: it may be given once for all, or not at all."""
    values = [default] if not value else list(value) if isinstance(value, list | tuple) else [value]
    return tuple(int(entry) for entry in (values * axes if len(values) == 1 else values))
