"""A chain of teachers, each smaller than the one before."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import nn

from pared.core.errors import SettingsError
from pared.core.method import Method
from pared.core.problems import Problems
from pared.distill.teach import Teach
from pared.training import Task


@dataclass(frozen=True)
class Assistants:
    """Teach through networks of sizes between teacher and student (Mirzadeh et al. 2019, 1902.03393).

    A student learns less from a teacher far above it. The teacher teaches the first assistant, that one the second, the last one the
    student. Each is taught alike.

    Args:
        assistants: from large to small: networks (copied, then taught), or methods that make one out of the teacher, such as
            `prune.Neurons(keep=0.7)`. Not to be written in a recipe file, as they are networks.
        teach: how each one is taught.

    Raises:
        SettingsError: for a wrong setting, or a task without a teacher.

    >>> import torch
    >>> batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    >>> large, middle, small = (nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 3)) for n in (32, 16, 4))
    >>> task = Task(batches, batches, batches, teacher=large)
    >>> Assistants((middle,), Teach(epochs=1))(small, task)[0].out_features
    4
    """

    assistants: tuple[nn.Module | Method, ...]
    teach: Teach = field(default_factory=Teach)

    def __post_init__(self) -> None:
        problems = Problems("distill.assistants")
        several = isinstance(self.assistants, list | tuple)
        fine = several and bool(self.assistants) and all(callable(each) and not isinstance(each, type) for each in self.assistants)
        problems.check(fine, "assistants", "a list of at least one network or method", self.assistants)
        problems.check(isinstance(self.teach, Teach), "teach", "a Teach", self.teach)
        problems.raise_if_any()
        object.__setattr__(self, "assistants", tuple(self.assistants))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model`, taught by the last assistant."""
        if task.teacher is None:
            raise SettingsError(
                "distill.assistants: there is no teacher. Put the method into a Recipe, or give the task one, Task(…, teacher=…)."
            )
        first = task.teacher
        for assistant in self.assistants:
            start = assistant if isinstance(assistant, nn.Module) else assistant(first, task)
            task = dataclasses.replace(task, teacher=self.teach(start, task))
        return self.teach(model, task)
