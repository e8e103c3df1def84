"""ONNX Runtime, set up so that measurements repeat."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pared.codec import PackedFile, to_onnx
from pared.core.errors import ModelError, RunError

_FATAL = 4  # onnxruntime's log level: errors come as exceptions, nothing else is of use on a user's screen


class Engine:
    """A deployed ONNX file, ready to run on the CPU.

    Graph optimisation is on in full; threads don't spin while they wait, since a spinning pool steals time from the next session.

    Args:
        path: an ONNX file, or a `.pared` file that holds one, which is unpacked in memory.
        threads: of one operator; 1 by default because measurements with more need a machine of one's own.

    Raises:
        RunError: if the file is missing, damaged, or uses an operator that the engine lacks.
        FileError: if a `.pared` file is damaged, or holds no model.

    >>> import onnx, tempfile
    >>> graph = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) { y = Relu(x) }')
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     onnx.save(graph, folder + "/relu.onnx")
    ...     Engine(folder + "/relu.onnx").run(np.array([-1.0, 2.0], dtype=np.float32))
    [array([0., 2.], dtype=float32)]
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.path, self.threads = Path(path), threads
        if not self.path.is_file():
            raise RunError(f"{self.path}: there is no such file.")
        packed = self.path.suffix == ".pared"
        content = to_onnx(PackedFile(self.path)).SerializeToString() if packed else str(self.path)
        try:
            self._session = onnxruntime.InferenceSession(content, session_options(threads), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RunError(f"{self.path}: ONNX Runtime can't load this file. {_first_line(error)} Export it again.") from error
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self._input_types = tuple(_numpy_type(value.type) for value in self._session.get_inputs())
        self.input_shapes: tuple[tuple[int | str, ...], ...] = tuple(tuple(value.shape) for value in self._session.get_inputs())

    @property
    def batch(self) -> int | None:
        """The batch size that the file is fixed to, or None if it takes any."""
        sizes = [shape[0] for shape in self.input_shapes if shape]
        return sizes[0] if sizes and isinstance(sizes[0], int) else None

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run on one array an input, in the file's order, and return all outputs.

        Raises:
            ModelError: if the arrays don't fit the file's inputs.
        """
        if len(arrays) != len(self.input_names):
            raise ModelError(f"{self.path}: takes {len(self.input_names)} inputs ({', '.join(self.input_names)}). Got {len(arrays)}.")
        feed = {name: np.asarray(array, kind) for name, array, kind in zip(self.input_names, arrays, self._input_types, strict=True)}
        try:
            return [np.asarray(output) for output in self._session.run(None, feed)]
        except Exception as error:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ModelError(f"{self.path}: can't run on inputs of shape {shapes}. {_first_line(error)}") from error


def load(path: str | Path, threads: int = 1) -> Engine:
    """A deployed file, ready to run: an `.onnx` file, or a `.pared` file that holds one.

    Args:
        path: the file.
        threads: of one operator.

    Raises:
        RunError: if the file is missing, damaged, or uses an operator that the engine lacks.
        FileError: if a `.pared` file is damaged, or holds no model.

    >>> import onnx, pared, tempfile
    >>> graph = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) { y = Relu(x) }')
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     onnx.save(graph, folder + "/relu.onnx")
    ...     pared.codec.pack(folder + "/relu.onnx", folder + "/relu.pared")
    ...     pared.load(folder + "/relu.pared").run(np.array([-1.0, 2.0], dtype=np.float32))
    [array([0., 2.], dtype=float32)]
    """
    return Engine(path, threads)


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options of every session: one operator at a time on `threads` threads that sleep when idle, all optimisations, no log."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _FATAL
    return options


def _numpy_type(name: str) -> Any:
    """The numpy type of a tensor type as ONNX Runtime writes it, such as tensor(int64)."""
    kind = name.removeprefix("tensor(").rstrip(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0]).strip().rstrip(".") + "."
