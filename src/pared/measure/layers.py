"""Where a network's time goes: the engine's own profile, summed by the module whose weights an operator reads."""

from __future__ import annotations

import ast
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from torch import Tensor, nn

from pared.graph.capture import as_inputs
from pared.runtime import ExportsItself, named_proto

_SCOPES = "pkg.torch.onnx.name_scopes"
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def layer_times(
    model: nn.Module, example_inputs: Tensor | Sequence[Any], normalize: nn.Module | None = None, *, runs: int = 200, threads: int = 1
) -> dict[str, float]:
    """Milliseconds that each module of a network takes in ONNX Runtime, for one sample.

    The engine fuses operators and moves data between layouts, so an activation counts for the layer before it, and what belongs to no
    module counts as "". The sum is a little more than the latency of the whole, since profiling has a cost of its own.

    Args:
        model: any module that can be exported.
        example_inputs: a tensor or a tuple, as the file takes them.
        normalize: put before the model, as in the deployed file.
        runs: the median of so many is taken.
        threads: of the engine.

    Returns:
        By module path; empty for a network that writes its own ONNX, whose parts run or not.

    Raises:
        CaptureError: if the model can't be exported.

    >>> import torch
    >>> sorted(layer_times(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4), runs=3))
    ['0', '2']
    """
    if isinstance(model, ExportsItself):
        return {}
    inputs = as_inputs(example_inputs)
    proto = named_proto(model, inputs, normalize)
    paths = {path for path, _ in model.named_modules()}
    owners = _owners(proto.graph, paths, "model." if normalize is not None else "")
    sample = {value.name: x[:1].numpy() for value, x in zip(proto.graph.input, inputs, strict=True)}
    times: dict[str, list[float]] = {}
    for event in _profile(proto, sample, runs, threads):
        times.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1000)
    total: dict[str, float] = {}
    for name, durations in times.items():
        plain = name.removeprefix("fused ").partition("/")[0].removesuffix("_nchwc")  # what the engine's fusions make of a name
        path = owners.get(plain, "")
        total[path] = total.get(path, 0.0) + statistics.median(durations) * max(1, round(len(durations) / runs))
    return total


def _profile(proto: onnx.ModelProto, sample: dict[str, Any], runs: int, threads: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for _ in range(10):
            session.run(None, sample)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, sample)
        events = json.loads(Path(session.end_profiling()).read_text())
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def _owners(graph: onnx.GraphProto, paths: set[str], prefix: str) -> dict[str, str]:
    """The module of every operator, by the operator's name and by its outputs' (a fused operator goes by its output)."""
    makers = {name: node for node in graph.node for name in node.output}
    owners: dict[str, str] = {}
    for node in graph.node:
        owner = _owner(node, makers, paths, prefix)
        for name in (node.name, *node.output):
            owners[name] = owner
    return owners


def _owner(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], paths: set[str], prefix: str) -> str:
    """The module whose weight this operator reads, else that of the operator it only reshapes or activates, else its own scope."""
    step: onnx.NodeProto | None = node
    while step is not None:
        for name in step.input:
            path = _known(name.rpartition(".")[0], paths, prefix)
            if name not in makers and path is not None and path:
                return path
        if step.op_type in _WEIGHTED:
            return _scope(step, paths, prefix)
        activates = [name for name in step.input if name in makers]
        step = makers[activates[0]] if len(activates) == 1 and step.op_type not in ("Add", "Mul", "Concat") else None
    return _scope(node, paths, prefix)


def _scope(node: onnx.NodeProto, paths: set[str], prefix: str) -> str:
    """The innermost module in whose forward an operator was written."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    known = [path for scope in ast.literal_eval(scopes)[:-1] if (path := _known(scope, paths, prefix)) is not None]
    return known[-1] if known else ""


def _known(path: str, paths: set[str], prefix: str) -> str | None:
    path = path.removeprefix(prefix)
    return path if path in paths else None
