"""Born-again networks: a network teaches its own successor."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field

from torch import nn

from pared.core.problems import Problems
from pared.distill.ensemble import Ensemble
from pared.distill.teach import Teach
from pared.training import Task
from pared.training.fresh import reinitialize


@dataclass(frozen=True)
class Generations:
    """Self-distillation: each generation begins with new weights and is taught by the one before (Furlanello et al. 2018, 1805.04770).

    The first is taught by `task.teacher`, or without one by the network itself.

    Args:
        count: generations. The paper gains in the first two or three.
        teach: how each is taught; the plan has to be one that trains from scratch.
        fresh: begin with new random weights. False: go on with those of the network given.
        ensemble: teach by the mean of all generations so far instead of the last one.

    Raises:
        SettingsError: for a wrong setting.

    >>> import torch
    >>> batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    >>> Generations(count=2, teach=Teach(epochs=1))(nn.Linear(4, 3), Task(batches, batches, batches)).out_features
    3
    """

    count: int = 2
    teach: Teach = field(default_factory=Teach)
    fresh: bool = True
    ensemble: bool = False

    def __post_init__(self) -> None:
        problems = Problems("distill.generations")
        problems.number("count", self.count, low=1, high=1000, integer=True)
        problems.check(isinstance(self.teach, Teach), "teach", "a Teach", self.teach)
        problems.check(isinstance(self.fresh, bool), "fresh", "true or false", self.fresh)
        problems.check(isinstance(self.ensemble, bool), "ensemble", "true or false", self.ensemble)
        problems.raise_if_any()

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the last generation."""
        teachers = [task.teacher if task.teacher is not None else model]
        result = model
        for _ in range(self.count):
            student = copy.deepcopy(model)
            if self.fresh:
                reinitialize(student)
            teacher = Ensemble(teachers) if self.ensemble and len(teachers) > 1 else teachers[-1]
            result = self.teach(student, dataclasses.replace(task, teacher=teacher))
            teachers.append(result)
        return result
