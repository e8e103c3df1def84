"""All that is reported about one network, as result.json holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pared import codec, graph
from pared.measure.latency import Latency, latency
from pared.measure.metric import file_metric, sample_inputs

if TYPE_CHECKING:
    from pared.training import Split, Task

ADAPTIVE_SAMPLES = 32
"""Inputs over which the latency of a network that adapts to its input is averaged."""


@runtime_checkable
class AdaptsToInput(Protocol):
    """A network that spends more on some inputs than on others, and knows what it spends on average."""

    def mean_macs(self, task: Task, split: Split) -> float:
        """MACs per sample, averaged over the samples of a split."""
        ...


@dataclass(frozen=True)
class Metric:
    """The quality of a network: the mean of the task's metric over a split, read from a file.

    Attributes:
        name: such as "accuracy".
        value: the mean over all samples.
        split: "valid" or "test".
        file: the name of the deployed file that it was read from.
    """

    name: str
    value: float
    split: str
    file: str

    def to_dict(self) -> dict[str, Any]:
        """The fields that result.json holds."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Profile:
    """The size, cost and quality of one network.

    Attributes:
        params: parameters, int8 weights among them.
        nonzero: those that aren't zero.
        macs: multiply-adds per sample; for networks that adapt to their input the mean over the split.
        file_bytes: of the deployed file.
        wire_bytes: of that file packed as `.pared`, what one would send.
        latency: of the deployed file.
        metric: read from the deployed file.
        program_bytes: what of the packed file is no tensor: the graph and its names; None in results of earlier versions.
    """

    params: int
    nonzero: int
    macs: int
    file_bytes: int
    wire_bytes: int
    latency: Latency
    metric: Metric
    program_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """PROFILE of result.json, schema 1."""
        return {
            "params": self.params,
            "nonzero": self.nonzero,
            "macs": self.macs,
            "file_bytes": self.file_bytes,
            "wire_bytes": self.wire_bytes,
            "program_bytes": self.program_bytes,
            "latency_ms": self.latency.to_dict(),
            "metric": self.metric.to_dict(),
        }


def profile(
    model: nn.Module,
    file: str | Path,
    task: Task,
    split: Split = "valid",
    *,
    latency: Latency | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
) -> Profile:
    """Count a network and measure its deployed file.

    Args:
        model: the network, for its parameters and MACs.
        file: the same network, deployed; it is also packed, as a `.pared` file beside it.
        task: gives data and metric.
        split: "valid" to choose by, "test" to report.
        latency: of the file, if it was timed together with others (which makes ratios exact); else it is timed alone.
        example_inputs: prepared inputs; by default the task's.

    Raises:
        ModelError, RunError, DataError: as `graph.count`, `latency` and `file_metric`.

    >>> import tempfile, torch
    >>> from pared.runtime import export
    >>> from pared.training import Task
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model = nn.Linear(2, 2, bias=False)
    ...     file = export(model, torch.zeros(1, 2), folder + "/small.onnx")
    ...     found = profile(model, file, Task(batches, batches, batches), "test")
    >>> found.params, found.macs, found.metric.file
    (4, 4, 'small.onnx')
    """
    file = Path(file)
    counts = graph.count(model, task.example_inputs() if example_inputs is None else example_inputs)
    macs = round(model.mean_macs(task, split)) if isinstance(model, AdaptsToInput) else counts.macs
    small = codec.inspect(packed(file))
    return Profile(
        params=counts.params,
        nonzero=counts.nonzero,
        macs=macs,
        file_bytes=file.stat().st_size,
        wire_bytes=small.total,
        program_bytes=small.program,
        latency=latency if latency is not None else _alone(model, file, task, split),
        metric=Metric(task.metric.name, file_metric(file, task, split), split, file.name),
    )


def packed(file: Path) -> Path:
    """Pack a deployed file beside itself, `small.onnx` as `small.pared`, and return the path; its size is what one would send.

    Raises:
        FileError: if it is no ONNX file.
        RunError: if the packed file can't be written.
    """
    target = file.with_suffix(".pared")
    codec.pack(file, target)
    return target


def _alone(model: nn.Module, file: Path, task: Task, split: Split) -> Latency:
    count = ADAPTIVE_SAMPLES if isinstance(model, AdaptsToInput) else 1
    return latency({file.name: file}, sample_inputs(task, split, count))[file.name]
