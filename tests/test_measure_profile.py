"""Metric and profile: everything is read off the deployed file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pared import codec
from pared.core.errors import DataError, ModelError
from pared.measure import AdaptsToInput, Latency, file_metric, profile, sample_inputs
from pared.runtime import export
from pared.training import Accuracy, Task, evaluate


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 - 1


def make_task(normalize: nn.Module | None = None, labels: int = 3) -> Task:
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.rand(size, 6, generator=generator), torch.randint(labels, (size,), generator=generator)) for size in (7, 7, 3)]
    return Task(batches, batches[:2], batches, normalize=normalize)


def test_file_metric_is_the_models(tmp_path: Path) -> None:
    task = make_task(Pixels())
    model = nn.Linear(6, 3)
    file = export(model, task.example_inputs(), tmp_path / "small.onnx", task.normalize)
    assert file_metric(file, task, "test") == evaluate(model, task, "test")
    assert file_metric(file, task) == evaluate(model, task, "valid")


def test_the_file_counts_not_the_model(tmp_path: Path) -> None:
    task, model = make_task(), nn.Linear(6, 3)
    file = export(model, task.example_inputs(), tmp_path / "small.onnx")
    value = file_metric(file, task, "test")
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, 5.0)
    assert file_metric(file, task, "test") == value


class Fixed(nn.Module):
    """Takes a batch of 2 only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(2, 6))


def test_fixed_batch(tmp_path: Path) -> None:
    task, model = make_task(), Fixed()
    file = export(model, task.example_inputs(2), tmp_path / "fixed.onnx")
    assert file_metric(file, task, "test") == evaluate(model.inner, task, "test")  # batches of 7, 7 and 3


def test_nan_and_wrong_labels(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    file = export(model, torch.rand(2, 6), tmp_path / "small.onnx")
    bad = [(torch.full((2, 6), float("nan")), torch.tensor([0, 1]))]
    with pytest.raises(ModelError, match=r"small.onnx: output is NaN"):
        file_metric(file, Task(bad, bad, bad), "test")
    with pytest.raises(DataError, match=r"in the test split: the model has 3 outputs"):
        file_metric(file, make_task(labels=9), "test")


def test_samples() -> None:
    task = make_task()
    samples = sample_inputs(task, "test", 9)
    everything = torch.cat([inputs for inputs, _ in task.test])
    assert len(samples) == 9
    assert all(entry[0].shape == (1, 6) for entry in samples)
    assert torch.equal(torch.cat([entry[0] for entry in samples]), everything[:9])
    assert len(sample_inputs(task, "test", 1000)) == 17


def test_profile_is_schema_1(tmp_path: Path) -> None:
    task, model = make_task(), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        model[0].weight[0] = 0
    file = export(model, task.example_inputs(), tmp_path / "small.onnx")
    time = Latency(1.5, 2.0, 1, 1, "onnxruntime 1", minimum=1.0)
    found = profile(model, file, task, "test", latency=time).to_dict()
    assert found == {
        "params": 50,
        "nonzero": 44,
        "macs": 45,
        "file_bytes": file.stat().st_size,
        "wire_bytes": (tmp_path / "small.pared").stat().st_size,
        "program_bytes": codec.inspect(tmp_path / "small.pared").program,
        "latency_ms": {"median": 1.5, "p90": 2.0, "batch": 1, "threads": 1, "engine": "onnxruntime 1"},
        "metric": {"name": Accuracy().name, "value": file_metric(file, task, "test"), "split": "test", "file": "small.onnx"},
    }
    assert json.loads(json.dumps(found)) == found


class Adaptive(nn.Linear):
    def mean_macs(self, task: Task, split: str) -> float:
        return {"valid": 7.4, "test": 9.6}[split]


def test_networks_that_adapt_report_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pared.measure.latency"], "FOREIGN", 2.0)  # the numbers don't matter here, so never measure again
    task, model = make_task(), Adaptive(6, 3)
    assert isinstance(model, AdaptsToInput)
    file = export(model, task.example_inputs(), tmp_path / "small.onnx")
    found = profile(model, file, task, "test")
    assert found.macs == 10
    assert found.latency.calls >= 3 * 17
