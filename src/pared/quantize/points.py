"""How many bits each quantizer of a placement has, and putting quantizers into the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from pared.quantize.affine import Affine, choose_qparams
from pared.quantize.calibration import CalibrationMethod, calibrate
from pared.quantize.placement import Placement
from pared.training.samples import Inputs

Point = tuple[fx.Node, int]
"""A value whose range counts, and the bits of its integers."""

ARITHMETIC_BITS = 8
"""Of values that anything but a layer reads: sums and pools have no weights that could make up for less."""


@dataclass(frozen=True)
class Points:
    """The quantizers of a placement with their bits.

    Attributes:
        bits: of every root value.
        narrowed: layers that read fewer bits than the value before them has, which others read too, and how many.
    """

    bits: dict[fx.Node, int]
    narrowed: dict[fx.Node, int]

    def all(self, placement: Placement) -> list[Point]:
        """Every point once, in the order of the graph."""
        found = {(root, self.bits[root]): None for root in placement.quantized.values()}
        found |= {(layer.args[0], bits): None for layer, bits in self.narrowed.items() if isinstance(layer.args[0], fx.Node)}
        return list(found)


def place_points(placement: Placement, wanted: Mapping[fx.Node, int]) -> Points:
    """The bits of every quantizer.

    A value that only layers read has the bits that they want, if all want the same. Else it has 8, and a second quantizer stands before
    each layer that wants fewer: so a residual sum doesn't suffer from what the convolution beside it bears.

    Args:
        placement: where quantizers stand.
        wanted: the bits of the inputs of layers and products in it; others have 8.
    """
    groups: dict[fx.Node, set[int]] = {root: set() for root in placement.quantized.values()}
    for value, root in placement.quantized.items():
        for user in _readers(placement, value):
            if placement.quantized.get(user) is not root:  # else it passes the integers on
                groups[root].add(wanted.get(user, ARITHMETIC_BITS))
    bits = {root: found.pop() if len(found) == 1 else ARITHMETIC_BITS for root, found in groups.items()}
    narrowed = {}
    for layer in placement.layers:
        value = layer.args[0]
        if (
            layer in placement.consumers
            and isinstance(value, fx.Node)
            and wanted.get(layer, ARITHMETIC_BITS) < bits[placement.quantized[value]]
        ):
            narrowed[layer] = wanted[layer]
    return Points(bits, narrowed)


def calibrated(
    graph: fx.GraphModule, placement: Placement, points: Points, batches: Inputs, method: CalibrationMethod
) -> dict[Point, Affine]:
    """Scale and zero point of every quantizer, from the values that a prepared graph has on some batches.

    Raises:
        ModelError: if values aren't finite.
    """
    found: dict[Point, Affine] = {}
    every = points.all(placement)
    for bits in sorted({bits for _, bits in every}):
        ranges = calibrate(graph, [node for node, width in every if width == bits], batches, method, 2**bits)
        found |= {(node, bits): Affine(*choose_qparams(*limits, 2**bits), 2**bits) for node, limits in ranges.items()}
    return found


def insert_quantizers(
    graph: fx.GraphModule, placement: Placement, points: Points, create: Callable[[fx.Node, Point], fx.Node]
) -> dict[fx.Node, Point]:
    """Put a quantizer behind every placed value, in place.

    Args:
        graph: that the placement is for.
        placement: where they stand, and who reads them.
        points: their bits.
        create: (value, point) -> a new node that reads the value; it is made where it has to stand.

    Returns:
        The point of every new node.
    """
    made: dict[fx.Node, Point] = {}
    after: dict[fx.Node, fx.Node] = {}
    values = {layer: layer.args[0] for layer in points.narrowed}
    for value, root in placement.quantized.items():
        readers = _readers(placement, value)
        last = value
        if value.op == "placeholder":
            last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
        with graph.graph.inserting_after(last):
            node = create(value, (root, points.bits[root]))
        for reader in readers:
            reader.replace_input_with(value, node)
        after[value] = node
        made[node] = (root, points.bits[root])
    narrow: dict[Point, fx.Node] = {}
    for layer, bits in points.narrowed.items():
        value = values[layer]
        assert isinstance(value, fx.Node)
        point = (value, bits)
        if point not in narrow:
            with graph.graph.inserting_after(after[value]):
                narrow[point] = create(after[value], point)
            made[narrow[point]] = point
        layer.args = (narrow[point], *layer.args[1:])
    return made


def _readers(placement: Placement, value: fx.Node) -> list[fx.Node]:
    """Those that take the quantized form of a value."""
    return [user for user in value.users if value in placement.produced or user in placement.consumers]
