"""The value of the task's metric on one split, computed by the model in the training framework."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from pared.core.errors import DataError
from pared.graph.capture import training_mode
from pared.training.check import check_labels, run, split_batch
from pared.training.processes import rank_and_world, sum_over_processes
from pared.training.reference import targets_or_answers

if TYPE_CHECKING:
    from pared.training.task import Task

Split = Literal["train", "valid", "test"]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; afterwards every module is back in the mode that it had.

    >>> layer = nn.Dropout()
    >>> with evaluating(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    with training_mode(model, False), torch.no_grad():
        yield model


def evaluate(model: nn.Module, task: Task, split: Split = "valid") -> float:
    """The mean of `task.metric` over all samples of a split.

    The model is moved to the task's device; its modes (train or eval) are afterwards as before. With several processes each
    takes its share of the batches, and all get the same mean. Without labels the metric compares with the task's teacher.

    Args:
        model: takes the task's prepared inputs.
        task: gives the data, the metric and the normalisation.
        split: "valid" to choose by, "test" to report.

    Raises:
        DataError: if the split is empty or has labels that the model has no output for, or has none and there is no teacher.
        ModelError: if the model can't take the inputs.

    >>> from pared.training import Task
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> evaluate(nn.Identity(), Task(batches, batches, batches), "test")
    1.0
    """
    model.to(task.machine.device)
    rank, world = rank_and_world()
    total, count = 0.0, 0
    with evaluating(model):
        for batch in itertools.islice(getattr(task, split), rank, None, world):
            inputs, targets = split_batch(batch, split)
            targets = task.to_device(targets)
            inputs = task.prepare(inputs)
            outputs = run(model, inputs)
            if task.classifies:
                check_labels(outputs, targets, split)
            values = task.metric(outputs, targets_or_answers(task, inputs, targets, split))
            total += values.cpu().sum(dtype=torch.float64).item()  # not every device has double precision
            count += values.numel()
    total, count = sum_over_processes(torch.tensor([total, count], dtype=torch.float64), task.machine.device).tolist()
    if count == 0:
        raise DataError(f"the {split} split has no samples.")
    return total / count
