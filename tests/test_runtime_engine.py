"""The engine: results as numpy arrays, and clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pared.core.errors import ModelError, RunError
from pared.runtime import Engine


def write(path: Path, shape: str = "n, 2") -> Path:
    head = '<ir_version: 8, opset_import: ["": 17]>'
    text = f"{head} g (float[{shape}] x, int64[n] i) => (float[{shape}] y, int64[n] j) {{ y = Relu(x) j = Identity(i) }}"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_runs_and_describes_its_inputs(tmp_path: Path) -> None:
    engine = Engine(write(tmp_path / "g.onnx"), threads=2)
    assert engine.input_names == ("x", "i")
    assert engine.output_names == ("y", "j")
    assert engine.input_shapes == (("n", 2), ("n",))
    assert engine.batch is None
    assert engine.threads == 2
    y, j = engine.run(np.array([[-1.0, 2.0]]), np.array([5], dtype=np.int32))  # other types are converted
    assert y.tolist() == [[0.0, 2.0]]
    assert j.tolist() == [5]
    assert y.dtype == np.float32
    assert j.dtype == np.int64


def test_fixed_batch(tmp_path: Path) -> None:
    assert Engine(write(tmp_path / "g.onnx", "3, 2")).batch == 3


def test_errors_name_the_file_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(RunError, match=r"broken.onnx: ONNX Runtime can't load this file"):
        Engine(broken)
    with pytest.raises(RunError, match=r"nowhere.onnx: there is no such file"):
        Engine(tmp_path / "nowhere.onnx")
    truncated = tmp_path / "cut.onnx"
    truncated.write_bytes(write(tmp_path / "g.onnx").read_bytes()[:60])
    with pytest.raises(RunError, match=r"cut.onnx"):
        Engine(truncated)
    engine = Engine(tmp_path / "g.onnx")
    with pytest.raises(ModelError, match=r"takes 2 inputs \(x, i\). Got 1"):
        engine.run(np.zeros((1, 2)))
    with pytest.raises(ModelError, match=r"can't run on inputs of shape \(1, 3\), \(1,\)"):
        engine.run(np.zeros((1, 3)), np.zeros(1))
    assert capfd.readouterr().err == ""
