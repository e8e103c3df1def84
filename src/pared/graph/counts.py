"""Parameters and multiply-adds (MACs) of a model, by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.graph.capture import as_inputs
from pared.graph.record import Shape, module_path, record
from pared.graph.staged import Staged
from pared.graph.tracing import trace_or_capture

aten = torch.ops.aten


@dataclass(frozen=True)
class ModuleCount:
    """Counts of one module's own parameters and of the operators in its own forward (its children count for themselves)."""

    path: str
    params: int
    nonzero: int
    macs: int


@dataclass(frozen=True)
class Counts:
    """Counts of a whole model; `modules` lists those that own parameters or multiply, in the model's order.

    `macs` are for one sample. One MAC is one multiply-add of a convolution, a linear layer, a matrix product or attention;
    biases, norms and activations aren't counted, as in the papers.
    """

    params: int
    nonzero: int
    macs: int
    modules: tuple[ModuleCount, ...]


def count(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> Counts:
    """Count parameters, non-zero parameters and MACs per sample.

    Shared parameters count once. The int8 weights of a quantized model are buffers, and count as parameters. A network made of
    stages (`Staged`) is counted with all its stages and heads.

    Args:
        model: any module that `capture` accepts.
        example_inputs: a tensor or a tuple; the batch size doesn't matter.

    Raises:
        ModelError, CaptureError: as `capture`.

    >>> counts = count(nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU()), torch.zeros(1, 2, 5, 5))
    >>> counts.params, counts.macs
    (72, 648)
    """
    inputs = as_inputs(example_inputs)
    macs = _staged_macs(model, inputs) if isinstance(model, Staged) else macs_by_module(model, inputs)
    params, nonzero = _parameters_by_module(model)
    order = [path for path, _ in model.named_modules()]
    paths = sorted(set(macs) | set(params), key=lambda path: (order.index(path) if path in order else len(order), path))
    modules = tuple(ModuleCount(path, params.get(path, 0), nonzero.get(path, 0), macs.get(path, 0)) for path in paths)
    return Counts(sum(params.values()), sum(nonzero.values()), sum(macs.values()), modules)


def macs_by_module(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """MACs per sample of every module whose own forward multiplies, by path."""
    captured = trace_or_capture(model, inputs)
    batch = next((len(x) for x in captured.example_inputs if isinstance(x, Tensor) and x.dim()), 1)
    divisor = batch
    seen: dict[fx.Node, Any] | None = None
    if captured.dynamic:
        try:
            seen = record(captured, tuple(_first(x, batch) for x in captured.example_inputs))
            divisor = 1
        except Exception:
            divisor = batch  # a graph may refuse a batch of one; then the example's own batch is divided out
    seen = record(captured) if seen is None else seen
    totals: dict[str, int] = {}
    for node in captured.module.graph.nodes:
        if (macs := node_macs(node, seen)) > 0:
            path = module_path(node)
            totals[path] = totals.get(path, 0) + macs
    return {path: math.ceil(total / divisor) for path, total in totals.items()}


def node_macs(node: fx.Node, seen: dict[fx.Node, Any]) -> int:
    """MACs of one node of a captured graph, for the batch that was recorded; 0 for operators that don't multiply."""
    rule = _RULES.get(getattr(node.target, "overloadpacket", None))
    if rule is None:
        return 0
    arguments = [_known(argument, seen) for argument in node.args]
    return rule(seen[node], arguments)


def _known(argument: Any, seen: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return seen[argument]
    return [_known(entry, seen) for entry in argument] if isinstance(argument, list | tuple) else argument


def _first(x: Any, batch: int) -> Any:
    return x[:1] if isinstance(x, Tensor) and x.dim() and len(x) == batch else x


def _convolution(out: Any, arguments: list[Any]) -> int:
    return math.prod(out) * math.prod(arguments[1][1:])


def _transposed_convolution(_: Any, arguments: list[Any]) -> int:
    return math.prod(arguments[0]) * math.prod(arguments[1][1:])


def _core_convolution(out: Any, arguments: list[Any]) -> int:
    return (_transposed_convolution if arguments[6] else _convolution)(out, arguments)


def _linear(out: Any, arguments: list[Any]) -> int:
    return math.prod(out) * arguments[1][-1]


def _product(out: Any, arguments: list[Any]) -> int:
    return math.prod(out) * arguments[0][-1]


def _added_product(out: Any, arguments: list[Any]) -> int:
    return math.prod(out) * arguments[1][-1]


def _attention(_: Any, arguments: list[Any]) -> int:
    query, key, value = arguments[:3]
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(_: Any, arguments: list[Any]) -> int:
    equation, operands = arguments[0].replace(" ", ""), arguments[1]
    if len(operands) < 2 or "." in equation:
        largest = max(operands, key=math.prod)
        return math.prod(largest) if len(operands) > 1 else 0
    terms = equation.split("->")[0].split(",")
    sizes = {letter: size for term, shape in zip(terms, operands, strict=True) for letter, size in zip(term, shape, strict=True)}
    return math.prod(sizes.values())


def _recurrent(_: Any, arguments: list[Any]) -> int:
    data, weights = arguments[0], [shape for shape in arguments[2] if len(shape) == 2]
    return math.prod(data[:-1]) * sum(math.prod(shape) for shape in weights)


def _recurrent_cell(_: Any, arguments: list[Any]) -> int:
    return math.prod(arguments[0][:-1]) * (math.prod(arguments[2]) + math.prod(arguments[3]))


_RULES: dict[Any, Callable[[Any, list[Any]], int]] = {
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _convolution),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), _transposed_convolution),
    aten.convolution: _core_convolution,
    aten.linear: _linear,
    **dict.fromkeys((aten.matmul, aten.bmm, aten.mm, aten.mv, aten.dot), _product),
    **dict.fromkeys((aten.addmm, aten.baddbmm), _added_product),
    aten.scaled_dot_product_attention: _attention,
    aten.einsum: _einsum,
    **dict.fromkeys((aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu), _recurrent),
    **dict.fromkeys((aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell), _recurrent_cell),
}


def _staged_macs(model: Staged, inputs: tuple[Any, ...]) -> dict[str, int]:
    """MACs of all parts of a staged network, each counted on the real output of the part before it."""
    totals: dict[str, int] = {}
    flags = [(module, module.training) for part in (*model.stages, *model.heads) for module in part.modules()]
    for module, _ in flags:
        module.training = False
    try:
        for index, (stage, head) in enumerate(zip(model.stages, model.heads, strict=True)):
            with torch.no_grad():
                outputs = as_inputs(stage(*inputs))
            for name, part, given in ((f"stages.{index}", stage, inputs), (f"heads.{index}", head, outputs)):
                for path, macs in macs_by_module(part, given).items():
                    totals[f"{name}.{path}" if path else name] = macs
            inputs = outputs
    finally:
        for module, flag in flags:
            module.training = flag
    return totals


def _parameters_by_module(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    params: dict[str, int] = {}
    nonzero: dict[str, int] = {}
    seen: set[int] = set()
    buffers = dict(model.named_buffers())
    for name, tensor in (*model.named_parameters(), *buffers.items()):
        # integers with a scale beside them are the weights and biases of a quantized layer
        is_weight = isinstance(tensor, nn.Parameter) or (not tensor.is_floating_point() and f"{name}_scale" in buffers)
        if not is_weight or id(tensor) in seen or tensor.numel() == 0:
            continue
        seen.add(id(tensor))
        path, parametrized, _ = f".{name}".partition(".parametrizations.")
        path = path[1:] if parametrized else name.rpartition(".")[0]
        params[path] = params.get(path, 0) + tensor.numel()
        nonzero[path] = nonzero.get(path, 0) + int(torch.count_nonzero(tensor))
    return params, nonzero


__all__ = ["Counts", "ModuleCount", "Shape", "count", "macs_by_module", "node_macs"]
