"""Write a network as one ONNX file: the same network always gives the same bytes."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx
import onnx.compose
import onnx.version_converter
import onnx_ir as ir
import torch
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.core.errors import CaptureError, ModelError
from pared.core.files import atomic_path
from pared.graph.capture import as_inputs, batch_of_two, explain, training_mode
from pared.graph.record import module_path
from pared.runtime import qdq
from pared.runtime.canonical import canonical
from pared.runtime.engine import Engine
from pared.runtime.few_bits import pack_linear_layers

OPSET = 20
"""The ONNX opset of all files: the newest that ONNX Runtime, OpenVINO and MNN all read."""

LARGEST = 2**31 - 1
"""Bytes of the largest file that the ONNX format can hold in one piece."""

_TOLERANCE = 1e-3  # of the largest output: float kernels sum in another order
_INT8_TOLERANCE = 0.1  # of the outputs' norm: a tie that is rounded the other way is a whole step, and steps add up

_log = logging.getLogger(__name__)


@runtime_checkable
class ExportsItself(Protocol):
    """A network that `torch.export` can't follow, because what it computes depends on its input, and that writes its own ONNX."""

    def to_onnx(self, example_inputs: tuple[Any, ...]) -> onnx.ModelProto:
        """Return the network in eval mode as an ONNX model."""
        ...


def export(model: nn.Module, example_inputs: Tensor | Sequence[Any], path: str | Path, normalize: nn.Module | None = None) -> Path:
    """Write `model` in eval mode as an ONNX file, check the file against the model, and return its path.

    The batch is dynamic where the model allows it; else the file is fixed to the batch of the example, and the log says so. Batch
    norm is folded, metadata is left out, and the file appears whole or not at all.

    Args:
        model: any module that `torch.export` accepts, or one that `ExportsItself`.
        example_inputs: a tensor or a tuple; only shapes and types matter.
        path: of the file, usually ending in .onnx.
        normalize: put before the model, inside the file, so that the file takes pixels in [0, 1].

    Raises:
        CaptureError: if the model can't be exported (names the operator, module and line) or is larger than 2 GB.
        ModelError: if the file's outputs differ from the model's by more than 1e-3 of the largest (int8: more than roundings explain).
        RunError: if the file can't be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(nn.Linear(4, 2), torch.zeros(1, 4), folder + "/linear.onnx").name
    'linear.onnx'
    """
    path, inputs = Path(path), as_inputs(example_inputs)
    proto = model_proto(model, inputs, normalize)
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        _compare(_in_front(normalize, model), inputs, temporary, path)
    return path


def model_proto(model: nn.Module, example_inputs: Tensor | Sequence[Any], normalize: nn.Module | None = None) -> onnx.ModelProto:
    """The ONNX model that `export` writes, in canonical form; networks that write their own ONNX build it from such parts.

    Linear layers of 16,384 weights or more whose weights lie on grids of 4 or 2 bits, by output or by 16 to 128 inputs of one, hold them
    packed and are computed by the engine's operator for that (MatMulNBits), which rounds their inputs to 8 bits, block by block.

    Raises:
        CaptureError: as `export`.
    """
    inputs = as_inputs(example_inputs)
    size = sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    if size > LARGEST:
        raise CaptureError(f"{type(model).__name__}: its weights take {size / 1e9:.1f} GB, an ONNX file holds 2 GB. Compress it in parts.")
    if isinstance(model, ExportsItself):
        with training_mode(model, False):
            proto = _at_opset(model.to_onnx(inputs))
        if normalize is not None:
            proto = _merge(_translate(normalize, inputs), proto)
    else:
        proto = _translate(_in_front(normalize, model), inputs)
    proto = canonical(pack_linear_layers(proto))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def named_proto(model: nn.Module, example_inputs: Tensor | Sequence[Any], normalize: nn.Module | None = None) -> onnx.ModelProto:
    """The ONNX model before it takes its canonical form: operators still say which module they come from.

    Raises:
        CaptureError: as `export`.
    """
    return _translate(_in_front(normalize, model), as_inputs(example_inputs))


class _Normalized(nn.Module):
    """A model behind its normalisation; lives only while a file is written."""

    def __init__(self, normalize: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.normalize, self.model = normalize, model

    def forward(self, *inputs: Any) -> Any:
        normalized = self.normalize(*inputs)
        return self.model(*normalized) if isinstance(normalized, tuple) else self.model(normalized)


def _in_front(normalize: nn.Module | None, model: nn.Module) -> nn.Module:
    return model if normalize is None else _Normalized(normalize, model)


def _name(model: nn.Module) -> str:
    """The class of the user's model."""
    return type(model.model if isinstance(model, _Normalized) else model).__name__


def _translate(model: nn.Module, inputs: tuple[Any, ...]) -> onnx.ModelProto:
    with training_mode(model, False), _quiet():
        program = _program(model, inputs)
        proto = _written(model, program)
        return proto if _complete(proto.graph) else _written(model, program, optimize=False)


def _written(model: nn.Module, program: torch.export.ExportedProgram, *, optimize: bool = True) -> onnx.ModelProto:
    """The program as ONNX. Not optimized by the exporter, it still has its constants folded, and its batch norms."""
    try:
        result = torch.onnx.export(
            program,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            verbose=False,
            optimize=optimize,
            custom_translation_table=qdq.onnx_translations(),
        )
    except Exception as error:
        raise CaptureError(_untranslated(model, program, error)) from error
    assert result is not None
    if not optimize:
        optimizer.fold_constants_ir(result.model)
        rules = common.fuse_batchnorm_into_conv_rule, common.fuse_batchnorm_into_conv_transpose_rule, common.fuse_batchnorm_into_gemm_rule
        return ir.to_proto(rewriter.rewrite(result.model, rules))
    return result.model_proto


def _complete(graph: onnx.GraphProto) -> bool:
    """Whether something gives every value that is read: the optimizer calls all bounds alike that clip one value, and loses all but one."""
    known = {value.name for value in (*graph.input, *graph.initializer)} | {name for node in graph.node for name in node.output}
    return all(name in known for node in graph.node for name in node.input if name)


def _program(model: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """Trace with a dynamic batch, else with any axes that torch finds dynamic, else with the example's shapes."""
    two, error = batch_of_two(inputs), None
    for size in (torch.export.Dim("batch", min=1), torch.export.Dim.AUTO):
        shapes: Any = torch.export.ShapesCollection()  # by tensor, so that it fits any signature
        for x in two:
            if isinstance(x, Tensor) and x.dim() and len(x) == _length(two):
                shapes[x] = {0: size}
        try:
            program = torch.export.export(model, two, dynamic_shapes=shapes)
        except Exception as failure:
            error = error or failure
            continue
        if program.range_constraints:  # else AUTO found that the batch is fixed
            return program
    try:
        program = torch.export.export(model, inputs)
    except Exception as failure:
        raise CaptureError(f"{_name(model)}: torch.export can't follow its forward. {explain(error or failure)}") from failure
    _log.warning("%s: its forward fixes the batch size, so the file takes a batch of %d only.", _name(model), _length(inputs))
    return program


def _length(inputs: tuple[Any, ...]) -> int:
    return next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim()), 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters (torch.export prints whole graphs): what matters comes back as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _untranslated(model: nn.Module, program: torch.export.ExportedProgram, error: BaseException) -> str:
    """Say which operator has no ONNX form, and where in the user's code it stands."""
    reasons: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        reasons.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(reasons)
    operator = re.search(r"OpOverload\(op='([^']+)'", text)
    name = re.search(r"translating node %(\w+)", text)
    words = [name[1]] if name else []
    words += [operator[1].rpartition(".")[2]] if operator else []  # a part of a composite operator, so look for its name too
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    node = next((node for word in words for node in calls if word in f"{node.name} {node.target}"), None)
    what = f"the operator {operator[1]} has no ONNX form" if operator else reasons[-1].strip().splitlines()[0].rstrip(".")
    where = ""
    if node is not None:
        lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
        where = f" (module {module_path(node) or _name(model)!r}{', ' + lines[-2] if len(lines) > 1 else ''})"
    return f"{_name(model)} can't be exported: {what}{where}. Replace it by operators that ONNX has."


def _at_opset(proto: onnx.ModelProto) -> onnx.ModelProto:
    current = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), OPSET)
    return proto if current == OPSET else onnx.version_converter.convert_version(proto, OPSET)


def _merge(first: onnx.ModelProto, second: onnx.ModelProto) -> onnx.ModelProto:
    """Put the outputs of `first` into the inputs of `second`."""
    first = onnx.compose.add_prefix(canonical(first), "normalize_")
    joints = [(out.name, into.name) for out, into in zip(first.graph.output, second.graph.input, strict=True)]
    first.ir_version = second.ir_version = max(first.ir_version, second.ir_version)
    for value, into in zip(first.graph.input, second.graph.input, strict=True):
        if value.type.tensor_type.shape.dim and into.type.tensor_type.shape.dim:  # a batch that the network fixes is fixed for all
            value.type.tensor_type.shape.dim[0].CopyFrom(into.type.tensor_type.shape.dim[0])
    return onnx.compose.merge_models(first, second, io_map=joints)


def _compare(model: nn.Module, inputs: tuple[Any, ...], file: Path, named: Path) -> None:
    """Run file and model on the example, and refuse a file that says something else."""
    engine = Engine(file)
    count = engine.batch
    if count is not None:
        inputs = tuple(x[:count] if isinstance(x, Tensor) and x.dim() else x for x in inputs)
    copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)  # a forward may write into its inputs
    with training_mode(model, False), torch.no_grad():
        expected = [x.detach().cpu().numpy() for x in pytree.tree_leaves(model(*copies)) if isinstance(x, Tensor)]
    found = engine.run(*(x.detach().cpu().numpy() for x in inputs if isinstance(x, Tensor)))
    quantized = any(node.op_type in ("QuantizeLinear", "MatMulNBits") for node in onnx.load(str(file), load_external_data=False).graph.node)
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours.shape != theirs.shape:
            raise ModelError(f"{named}: output {index} has shape {theirs.shape}, the model's has {ours.shape}.")
        error = _distance(ours.astype(np.float64), theirs.astype(np.float64), quantized)
        limit = _INT8_TOLERANCE if quantized else _TOLERANCE
        if not error <= limit:
            raise ModelError(
                f"{named}: output {index} differs from the model's by {error:.2g} of its size (allowed: {limit:g}), so it wasn't written. "
                "Does the forward draw random numbers in eval mode?"
            )


def _distance(ours: np.ndarray, theirs: np.ndarray, quantized: bool) -> float:
    """The difference relative to the largest output, or for int8 networks, where single entries may jump, to their norm."""
    if ours.size == 0 or np.array_equal(ours, theirs, equal_nan=True):
        return 0.0
    tiny = np.finfo(np.float32).tiny
    if quantized:
        return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(ours), tiny))
    return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), tiny))
