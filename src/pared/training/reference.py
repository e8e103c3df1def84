"""What takes the place of labels where there are none: the answers of the task's teacher."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pared.core.errors import DataError
from pared.graph.capture import training_mode
from pared.training.check import run
from pared.training.metric import Accuracy

if TYPE_CHECKING:
    from pared.training.task import Task


def targets_or_answers(task: Task, inputs: tuple[Tensor, ...], targets: Any, split: str) -> Any:
    """What outputs are to be compared with: the targets, or where a split has none what the task's teacher says to the prepared inputs.

    Raises:
        DataError: if there are no targets, and no teacher or a metric that needs labels.
    """
    if targets is not None:
        return targets
    if isinstance(task.metric, Accuracy):
        raise DataError(
            f"the {split} split has no labels, which {task.metric.name} needs. Give the task another metric, such as "
            "Task(…, metric=distill.Agreement()), which compares with the teacher."
        )
    teacher = reference(task, f"the {split} split has no labels")
    tensor = next(iter([*teacher.parameters(), *teacher.buffers()]), None)
    if tensor is not None and tensor.device != task.machine.device:  # the teacher is somebody else's, so it isn't moved
        teacher = copy.deepcopy(teacher).to(task.machine.device)
    with training_mode(teacher, False), torch.no_grad():
        return run(teacher, inputs)


def reference(task: Task, why: str) -> nn.Module:
    """The task's teacher.

    Raises:
        DataError: if it has none; the message begins with `why`.
    """
    if task.teacher is None:
        raise DataError(f"{why}, and there is no teacher. Give the task one, Task(…, teacher=…), or put the method into a Recipe.")
    return task.teacher
