"""A network with exits as one ONNX file: each later stage is the body of an `If`, and sees only the samples that are still undecided."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from pared.graph import Staged
from pared.runtime import model_proto


def to_onnx(network: Staged, example_inputs: tuple[Any, ...]) -> onnx.ModelProto:
    """Write stages and heads as one ONNX model.

    After each head: Softmax, ReduceMax and GreaterOrEqual say who is sure, NonZero lists the others. If there are any, the body of an
    `If` takes their activations with Gather and runs the next stage and head on them; ScatterND puts their logits in their places. An
    engine skips the body of an `If` whose condition is false, so a stage that nobody needs costs nothing. The outputs are those of the
    torch network for any batch. Each part keeps its weights inside its own branch, where engines may reorder them for speed.

    Args:
        network: in eval mode, with stages of one output.
        example_inputs: of the first stage; only shapes and types matter.
    """
    parts, activation = [], example_inputs
    for stage, head in zip(network.stages, network.heads, strict=True):
        stage_proto = model_proto(stage, activation)
        with torch.no_grad():
            activation = (stage(*activation),)
        parts.append((stage_proto, None if isinstance(head, nn.Identity) else model_proto(head, activation)))
    builder = _Builder(parts, network.thresholds.detach().cpu().numpy().astype(np.float32))
    first = parts[0][0]
    names = [f"x_{index}" for index in range(len(first.graph.input))]
    nodes, initializers, logits = builder.level(0, names)
    classes = (parts[0][1] or first).graph.output[0].type.tensor_type
    inputs = [_renamed(value, name) for value, name in zip(first.graph.input, names, strict=True)]
    output = helper.make_tensor_value_info(logits, classes.elem_type, ["batch", classes.shape.dim[1].dim_value])
    graph = helper.make_graph(nodes, "early_exit", inputs, [output], initializers)
    return helper.make_model(graph, opset_imports=builder.opsets, ir_version=first.ir_version)


class _Builder:
    def __init__(self, parts: list[tuple[onnx.ModelProto, onnx.ModelProto | None]], thresholds: np.ndarray) -> None:
        self.parts = parts
        self.thresholds = thresholds
        versions = {entry.domain: entry.version for part in parts for proto in part if proto is not None for entry in proto.opset_import}
        self.opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]

    def level(self, number: int, inputs: list[str]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
        """Nodes and initialisers of a stage with all that comes after it, and the name of the logits of all samples given to it."""
        stage, head = self.parts[number]
        nodes, initializers, activation = _part(stage, inputs, f"stage_{number}_")
        logits = activation
        if head is not None:
            more_nodes, more_initializers, logits = _part(head, [activation], f"head_{number}_")
            nodes, initializers = nodes + more_nodes, initializers + more_initializers
        if number == len(self.parts) - 1:
            return nodes, initializers, logits
        at = f"exit_{number}_"
        constants = {
            "class_axis": np.array([1], np.int64),
            "threshold": self.thresholds[number],
            "first_axis": np.array([0], np.int64),
            "zero": np.array(0, np.int64),
        }
        initializers += [numpy_helper.from_array(np.asarray(value), at + name) for name, value in constants.items()]
        nodes += [
            helper.make_node("Softmax", [logits], [at + "probabilities"], axis=1),
            helper.make_node("ReduceMax", [at + "probabilities", at + "class_axis"], [at + "confidence"], keepdims=0),
            helper.make_node("GreaterOrEqual", [at + "confidence", at + "threshold"], [at + "sure"]),
            helper.make_node("Not", [at + "sure"], [at + "unsure"]),
            helper.make_node("NonZero", [at + "unsure"], [at + "row"]),
            helper.make_node("Squeeze", [at + "row", at + "first_axis"], [at + "waiting"]),
            helper.make_node("Size", [at + "waiting"], [at + "count"]),
            helper.make_node("Greater", [at + "count", at + "zero"], [at + "any"]),
            helper.make_node("Transpose", [at + "row"], [at + "places"], perm=[1, 0]),
        ]
        go_on, stop = self._go_on(number, activation, at), self._stop(logits, at)
        nodes += [
            helper.make_node("If", [at + "any"], [at + "later"], then_branch=go_on, else_branch=stop),
            helper.make_node("ScatterND", [logits, at + "places", at + "later"], [at + "logits"]),
        ]
        return nodes, initializers, at + "logits"

    def _go_on(self, number: int, activation: str, at: str) -> onnx.GraphProto:
        body, initializers, logits = self.level(number + 1, [at + "activation"])
        nodes = [helper.make_node("Gather", [activation, at + "waiting"], [at + "activation"], axis=0), *body]
        return helper.make_graph(nodes, at + "go_on", [], [self._logits(logits)], initializers)

    def _stop(self, logits: str, at: str) -> onnx.GraphProto:
        """Nobody waits: the logits of no sample, so that there is nothing to put in place."""
        node = helper.make_node("Gather", [logits, at + "waiting"], [at + "nothing"], axis=0)
        return helper.make_graph([node], at + "stop", [], [self._logits(at + "nothing")])

    def _logits(self, name: str) -> onnx.ValueInfoProto:
        stage, head = self.parts[0]
        return helper.make_tensor_value_info(name, (head or stage).graph.output[0].type.tensor_type.elem_type, None)


def _part(proto: onnx.ModelProto, inputs: list[str], prefix: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    """The nodes and initialisers of one part under names of its own, reading `inputs`, and the name of its output."""
    names = {value.name: name for value, name in zip(proto.graph.input, inputs, strict=True)}
    graph = onnx.compose.add_prefix_graph(proto.graph, prefix, rename_inputs=False, name_map=names)
    return list(graph.node), list(graph.initializer), graph.output[0].name


def _renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy
