"""Zero padding in front of convolutions becomes part of them: engines do that for float networks only."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def fold_pad(node: ir.Node) -> None:
    """Let a convolution do the padding of its input, in place, if its input is padded with zeros along positions.

    Between the two may stand quantizers with the scale and zero point that the padded values have already: what is padded is exact on
    their grid, so that nothing changes.

    Args:
        node: any node of a graph.
    """
    automatic = node.attributes.get("auto_pad")
    if node.op_type != "Conv" or node.inputs[0] is None or (automatic is not None and automatic.as_string() != "NOTSET"):
        return
    grid, value = None, node.inputs[0]
    dequantizer = _producer(value, "DequantizeLinear")
    if dequantizer is not None:
        quantizer = _producer(dequantizer.inputs[0], "QuantizeLinear")
        if quantizer is None or _grid(quantizer) != _grid(dequantizer):
            return
        grid, value = _grid(quantizer), quantizer.inputs[0]
    pad = _producer(value, "Pad")
    if pad is None or pad.inputs[0] is None:
        return
    source = pad.inputs[0]
    before = _producer(source, "DequantizeLinear")
    if grid is not None and (before is None or _grid(before) != grid):
        return
    sides = _sides(pad)
    if sides is None:
        return
    own = node.attributes.get("pads")
    before_and_behind = list(own.as_ints()) if own is not None else [0] * len(sides)
    if len(before_and_behind) != len(sides):
        return
    node.attributes["pads"] = ir.AttrInt64s("pads", [ours + theirs for ours, theirs in zip(before_and_behind, sides, strict=True)])
    node.replace_input_with(0, source)


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _grid(node: ir.Node) -> tuple[Any, ...]:
    """Scale and zero point: the very constants."""
    return tuple(node.inputs[1:3])


def _sides(pad: ir.Node) -> list[int] | None:
    """What is added before and then behind every axis of positions; None if that isn't constant, not zeros, or elsewhere too."""
    mode = pad.attributes.get("mode")
    if (mode is not None and mode.as_string() != "constant") or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return None
    if len(pad.inputs) > 2 and pad.inputs[2] is not None:
        fill = ir.convenience.get_const_tensor(pad.inputs[2])
        if fill is None or fill.numpy().item() != 0:
            return None
    constant = None if pad.inputs[1] is None else ir.convenience.get_const_tensor(pad.inputs[1])
    if constant is None:
        return None
    amounts = [int(amount) for amount in constant.numpy().reshape(-1)]
    rank = len(amounts) // 2
    if any(amounts[axis] or amounts[rank + axis] for axis in (0, 1)) or min(amounts) < 0:
        return None
    return [*amounts[2:rank], *amounts[rank + 2 :]]
