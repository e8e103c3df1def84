"""The value of the task's metric, read from the deployed file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pared.core.errors import DataError, ModelError
from pared.measure.latency import fit_batch
from pared.runtime import Engine
from pared.training.check import check_labels, split_batch
from pared.training.reference import targets_or_answers

if TYPE_CHECKING:
    from pared.training import Split, Task


def file_metric(file: str | Path, task: Task, split: Split = "valid", threads: int = 1) -> float:
    """The mean of `task.metric` over a split, from the outputs of a deployed file; nothing of PyTorch's computes them.

    Inputs go to the file as the split gives them: normalisation is inside. A file fixed to a batch gets pieces of that size. Without
    labels the metric compares with the task's teacher, which PyTorch computes.

    Args:
        file: an ONNX file.
        task: gives the split and the metric.
        split: "valid" to choose by, "test" to report.
        threads: of the engine.

    Raises:
        RunError: if the file can't be loaded.
        ModelError: if it can't take the inputs, or gives NaN.
        DataError: if the split is empty or has labels that the file has no output for.

    >>> import tempfile
    >>> from pared.runtime import export
    >>> from pared.training import Task
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = export(torch.nn.ReLU(), torch.zeros(2, 2), folder + "/relu.onnx")
    ...     file_metric(file, Task(batches, batches, batches), "test")
    1.0
    """
    engine = Engine(file, threads)
    total, count = 0.0, 0
    for batch in getattr(task, split):
        inputs, targets = split_batch(batch, split)
        outputs = _outputs(engine, inputs if isinstance(inputs, tuple) else (inputs,))
        if task.classifies:
            check_labels(outputs, targets, split)
        if targets is None:
            answers = targets_or_answers(task, task.prepare(inputs), None, split)
            targets = pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, answers)
        values = task.metric(outputs, targets)
        total += values.sum(dtype=torch.float64).item()
        count += values.numel()
    if count == 0:
        raise DataError(f"the {split} split has no samples.")
    return total / count


def sample_inputs(task: Task, split: Split = "test", count: int = 1) -> list[tuple[Tensor, ...]]:
    """The first `count` samples of a split, each a batch of one, in the units of the deployed file."""
    samples: list[tuple[Tensor, ...]] = []
    for batch in getattr(task, split):
        inputs = split_batch(batch, split)[0]
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        samples += [tuple(part[i : i + 1] for part in parts) for i in range(min(len(parts[0]), count - len(samples)))]
        if len(samples) == count:
            break
    if not samples:
        raise DataError(f"the {split} split has no samples.")
    return samples


def _outputs(engine: Engine, inputs: tuple[Tensor, ...]) -> Any:
    """All outputs for a batch: a tensor, or a tuple where the file has several."""
    arrays = tuple(part.detach().cpu().numpy() for part in inputs)
    size, step = len(arrays[0]), engine.batch
    if step is None or step == size:
        found = engine.run(*arrays)
    else:
        pieces = []
        for begin in range(0, size, step):
            part = tuple(array[begin : begin + step] for array in arrays)
            pieces.append([output[: len(part[0])] for output in engine.run(*fit_batch(part, step))])
        found = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
    for name, output in zip(engine.output_names, found, strict=True):
        if np.issubdtype(output.dtype, np.floating) and np.isnan(output).any():
            raise ModelError(f"{engine.path}: {name} is NaN for some samples. Check the weights and the inputs.")
    tensors = tuple(torch.from_numpy(output) for output in found)
    return tensors[0] if len(tensors) == 1 else tensors
