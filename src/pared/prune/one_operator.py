"""Time single operators in the engine: one ONNX file for each, called in turn."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pared.runtime import Engine

OPSET, IR_VERSION = 20, 10

ROUNDS, LEAST_ROUNDS = 41, 7
"""Timed calls of every operator; fewer, but never fewer than 7, where the time is up."""

SECONDS = 0.5
"""For timing all operators of one call together."""


@dataclass(frozen=True)
class Operator:
    """A convolution, transposed convolution or linear layer by its sizes, for a batch of one.

    Attributes:
        kind: of the three.
        outputs, inputs: channels or features.
        sizes: spatial sizes of a convolution's input; for a linear layer all axes between batch and features.
        kernel, stride, padding, dilation: of a convolution, one number for each spatial axis.
        groups: of a convolution.
    """

    kind: Literal["convolution", "transposed", "linear"]
    outputs: int
    inputs: int
    sizes: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def resized(self, outputs: int, inputs: int) -> Operator:
        """The same operator for other widths; a depthwise one stays depthwise, groups stay equally wide (both rounded up).

        >>> Operator("convolution", 8, 8, groups=8).resized(5, 5).groups
        5
        """
        if self.groups == 1:
            return dataclasses.replace(self, outputs=outputs, inputs=inputs)
        if self.groups == self.inputs:
            multiplier = self.outputs // self.inputs
            inputs = max(1, math.ceil(outputs / multiplier))
            return dataclasses.replace(self, outputs=inputs * multiplier, inputs=inputs, groups=inputs)
        outputs, inputs = (max(1, math.ceil(width / self.groups)) * self.groups for width in (outputs, inputs))
        return dataclasses.replace(self, outputs=outputs, inputs=inputs)


def operator_model(operator: Operator) -> onnx.ModelProto:
    """The operator alone, as an ONNX model with one input and random weights."""
    numbers = np.random.default_rng(0)
    if operator.kind == "linear":
        shape, weight = (1, *operator.sizes, operator.inputs), (operator.outputs, operator.inputs)
        node = helper.make_node("MatMul", ["x", "w"], ["y"]) if operator.sizes else helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
        weight = weight[::-1] if operator.sizes else weight
    else:
        shape = (1, operator.inputs, *operator.sizes)
        ends = (operator.outputs, operator.inputs) if operator.kind == "convolution" else (operator.inputs, operator.outputs)
        weight = (ends[0], ends[1] // operator.groups, *operator.kernel)
        node = helper.make_node(
            "Conv" if operator.kind == "convolution" else "ConvTranspose",
            ["x", "w"],
            ["y"],
            kernel_shape=operator.kernel,
            strides=operator.stride,
            pads=operator.padding * 2,
            dilations=operator.dilation,
            group=operator.groups,
        )
    values = numbers.normal(size=weight).astype(np.float32)
    graph = helper.make_graph(
        [node],
        "operator",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(values, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def time_operators(operators: Sequence[Operator]) -> list[float]:
    """Milliseconds that each operator takes in ONNX Runtime on one thread, without what a call of the engine costs.

    All are called in turn, in an order that is reversed each round, so that whatever disturbs one disturbs all; every timed call
    follows an untimed one. The medians are returned, less that of a graph which does nothing.

    Args:
        operators: what is compared with each other.

    >>> import math
    >>> all(math.isfinite(time) and time >= 0 for time in time_operators([Operator("linear", 8, 8), Operator("linear", 64, 64)]))
    True
    """
    idle = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["x"], ["y"])],
            "idle",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 1))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 1))],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    with tempfile.TemporaryDirectory() as folder:
        engines = []
        for number, model in enumerate([idle, *map(operator_model, operators)]):
            path = Path(folder) / f"{number}.onnx"
            path.write_bytes(model.SerializeToString())
            engines.append(Engine(path))
        times = _take_turns(engines)
    return [1000 * max(0.0, statistics.median(one) - statistics.median(times[0])) for one in times[1:]]


def _take_turns(engines: Sequence[Engine]) -> list[list[float]]:
    numbers = np.random.default_rng(0)
    inputs = [numbers.normal(size=[int(size) for size in engine.input_shapes[0]]).astype(np.float32) for engine in engines]
    times: list[list[float]] = [[] for _ in engines]
    was_on = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + SECONDS
        for turn in range(ROUNDS):
            for which in range(len(engines)) if turn % 2 else range(len(engines) - 1, -1, -1):
                engines[which].run(inputs[which])
                begin = time.perf_counter()
                engines[which].run(inputs[which])
                times[which].append(time.perf_counter() - begin)
            if turn + 1 >= LEAST_ROUNDS and time.perf_counter() > end:
                break
    finally:
        if was_on:
            gc.enable()
    return times
