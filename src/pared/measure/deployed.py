"""Networks as the files that would be deployed, and their time beside that of the original."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path

from torch import nn

from pared.measure.latency import latency
from pared.measure.metric import sample_inputs
from pared.runtime import export
from pared.training import Task


def deploy(model: nn.Module, task: Task, path: Path) -> Path:
    """Write the file that a run would write: on the CPU, with the task's normalisation inside."""
    raw = dataclasses.replace(task, normalize=None).example_inputs()
    normalize = None if task.normalize is None else copy.deepcopy(task.normalize).cpu()
    return export(copy.deepcopy(model).cpu(), tuple(x.cpu() for x in raw), path, normalize=normalize)


class Interleaved:
    """Measures networks in turn with an original, whose deployed file is kept."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.task = task
        self.inputs = sample_inputs(task, "valid", 1)[0]
        with tempfile.TemporaryDirectory() as folder:
            self.file = deploy(model, task, Path(folder) / "original.onnx").read_bytes()

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        """Milliseconds of the original and of `model`: medians of calls that take turns."""
        with tempfile.TemporaryDirectory() as folder:
            original = Path(folder) / "original.onnx"
            original.write_bytes(self.file)
            small = deploy(model, self.task, Path(folder) / "small.onnx")
            times = latency({"original": original, "small": small}, self.inputs, quick=True)
        return times["original"].median, times["small"].median

    def alone(self) -> float:
        """Milliseconds of the original."""
        with tempfile.TemporaryDirectory() as folder:
            original = Path(folder) / "original.onnx"
            original.write_bytes(self.file)
            return latency({"original": original}, self.inputs, quick=True)["original"].median
