"""Exporting: one canonical file that computes what the model computes."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from pared.core.errors import CaptureError, ModelError, RunError
from pared.runtime import Engine, ExportsItself, export, model_proto
from pared.runtime.canonical import canonical


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.convolution(x)))
        return self.classifier(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25


def small() -> Small:
    torch.manual_seed(0)
    model = Small()
    model.norm.running_mean.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    model.norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
    return model


def test_file_computes_what_the_model_computes_for_any_batch(tmp_path: Path) -> None:
    model = small()
    file = export(model, torch.rand(1, 1, 8, 8), tmp_path / "small.onnx", Pixels())
    assert model.training  # exporting leaves the mode alone
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        expected = model.eval()((x - 0.5) / 0.25).numpy()
    np.testing.assert_allclose(Engine(file).run(x.numpy())[0], expected, atol=1e-5)


class ClampedTwice(nn.Module):
    """One value between several pairs of bounds, each of which is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.small = small()
        for name, bound in (("low", -0.5), ("high", 0.5), ("lower", -0.75), ("higher", 0.25)):
            self.register_buffer(name, torch.tensor(bound))

    def forward(self, x: Tensor) -> Tensor:
        x = self.small(x)
        return torch.clamp(x, self.low, self.high) - 2 * torch.clamp(x, self.lower, self.higher)


def test_one_value_clamped_several_times(tmp_path: Path) -> None:
    model = ClampedTwice().eval()
    x = 3 * torch.randn(5, 1, 8, 8)
    file = export(model, x[:2], tmp_path / "clamped.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(Engine(file).run(x.numpy())[0], model(x).numpy(), atol=1e-5)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(file).graph.node}


def test_file_has_no_metadata_and_short_names(tmp_path: Path) -> None:
    model = small()
    proto = onnx.load(export(model, torch.rand(2, 1, 8, 8), tmp_path / "small.onnx"))
    graph = proto.graph
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output] == ["output"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch" == graph.output[0].type.tensor_type.shape.dim[0].dim_param
    assert proto.producer_name == "pared"
    assert not proto.producer_version
    assert not proto.metadata_props
    assert not graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    assert all(len(node.name) <= 6 for node in graph.node)
    assert all(len(tensor.name) == 1 for tensor in graph.initializer)
    kinds = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in kinds
    assert "GlobalAveragePool" in kinds
    assert "ReduceMean" not in kinds
    assert (tmp_path / "small.onnx").stat().st_size < sum(parameter.nbytes for parameter in model.parameters()) + 700


_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_runtime_export import Pixels, small
from pared.runtime import export
export(small(), torch.rand(2, 1, 8, 8), sys.argv[2], Pixels())
"""


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    export(small(), torch.rand(2, 1, 8, 8), tmp_path / "here.onnx", Pixels())
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parent), str(tmp_path / "there.onnx")]
    subprocess.run(command, env=environment, check=True, timeout=120)
    here, there = (hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("here.onnx", "there.onnx"))
    assert here == there


def test_weights_make_the_bytes_differ(tmp_path: Path) -> None:
    model = small()
    first = export(model, torch.rand(2, 1, 8, 8), tmp_path / "a.onnx").read_bytes()
    with torch.no_grad():
        model.classifier.bias[0] += 1
    assert export(model, torch.rand(2, 1, 8, 8), tmp_path / "b.onnx").read_bytes() != first


def test_canonical_changes_nothing_twice() -> None:
    proto = model_proto(small(), torch.rand(2, 1, 8, 8))
    assert canonical(proto).SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.table(index), x * 2


def test_two_inputs_and_two_outputs(tmp_path: Path) -> None:
    model = TwoInputs()
    file = export(model, (torch.rand(2, 3), torch.tensor([0, 4])), tmp_path / "two.onnx")
    engine = Engine(file)
    assert engine.input_names == ("input", "input_1")
    assert engine.output_names == ("output", "output_1")
    x, index = torch.rand(3, 3), torch.tensor([1, 2, 3])
    for found, expected in zip(engine.run(x.numpy(), index.numpy()), model(x, index), strict=True):
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 4).cumsum(0)


def test_fixed_batch_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pared"):
        file = export(FixedBatch(), torch.rand(3, 4), tmp_path / "fixed.onnx")
    assert Engine(file).batch == 3
    assert "FixedBatch: its forward fixes the batch size, so the file takes a batch of 3 only." in caplog.text


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.second.weight.data.copy_(self.first.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_equal_weights_are_stored_once(tmp_path: Path) -> None:
    file = export(Tied(), torch.rand(2, 32), tmp_path / "tied.onnx")
    assert 32 * 32 * 4 < file.stat().st_size < 32 * 32 * 4 + 500


class Bessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = BesselInner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


class BesselInner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def test_errors_name_the_place_and_leave_no_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.onnx"
    with pytest.raises(CaptureError, match=r"bessel_j0 has no ONNX form \(module 'inner', File .*test_runtime_export.py"):
        export(Bessel(), torch.rand(2, 3), file)
    with pytest.raises(CaptureError, match=r"Branching: torch.export can't follow its forward.*x if x.sum\(\) > 0"):
        export(Branching(), torch.rand(2, 3), file)
    with pytest.raises(ModelError, match=r"bad.onnx: output 0 differs from the model's"):
        export(Noisy(), torch.rand(20, 30), file)
    assert list(tmp_path.iterdir()) == []


def test_too_large_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["pared.runtime.export"], "LARGEST", 100)
    with pytest.raises(CaptureError, match=r"Linear: its weights take .* GB, an ONNX file holds 2 GB"):
        export(nn.Linear(10, 10), torch.rand(2, 10), tmp_path / "large.onnx")


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be written"):
        export(nn.Linear(2, 2), torch.rand(2, 2), tmp_path / "file" / "small.onnx")


class Chooser(nn.Module):
    """Doubles an input of positive sum, else adds a constant; writes its own ONNX, with an If."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x + torch.tensor([1.0, 2.0])

    def to_onnx(self, example_inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
        return onnx.parser.parse_model("""
            <ir_version: 8, opset_import: ["": 18]>
            chooser (float[1, 2] x) => (float[1, 2] y) <float zero = {0}, float two = {2}, float[2] ones_and_two = {1, 2}> {
                total = ReduceSum<keepdims = 0>(x)
                positive = Greater(total, zero)
                y = If(positive) <
                    then_branch = then () => (float[1, 2] a) { a = Mul(x, two) },
                    else_branch = otherwise () => (float[1, 2] a) { copy = Identity(ones_and_two) a = Add(x, copy) }
                >
            }""")


@pytest.mark.parametrize("normalize", [None, Pixels()])
def test_network_that_writes_its_own_onnx(tmp_path: Path, normalize: nn.Module | None) -> None:
    model = Chooser()
    assert isinstance(model, ExportsItself)
    assert not isinstance(small(), ExportsItself)
    engine = Engine(export(model, torch.rand(1, 2), tmp_path / "chooser.onnx", normalize))
    assert engine.batch == 1
    assert engine.input_names == ("input",)
    for x in (torch.tensor([[3.0, 1.0]]), torch.tensor([[-3.0, -1.0]])):
        expected = model(x if normalize is None else normalize(x))
        np.testing.assert_allclose(engine.run(x.numpy())[0], expected.numpy(), atol=1e-6)
