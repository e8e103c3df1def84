"""The original network teaches the compressed one."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.training import Task, Train
from pared.training.soft_targets import taught_by


@dataclass(frozen=True)
class Teach:
    """Train a network on its teacher's answers as well as on the labels (Hinton et al. 2015, 1503.02531).

    The loss of a batch is (1 - weight) · task.loss(student, labels) + weight · T² · KL(teacher || student), both softened by T.
    The teacher is `task.teacher`, the model that the recipe was given. It answers each batch once, as it is given to the student
    (augmented alike), in eval mode and without gradients, and stays as it is. Masks on the student's weights hold.
    A student with early exits is taught at each exit; the loss is the mean over exits.

    Args:
        temperature: T, greater than 0. 4 lets the lesser classes of a network of moderate size show; small students want 2.5 to 4,
            large ones take up to 20 (section 3 of the paper).
        weight: share of the teacher in the loss. The paper finds that the labels should weigh much less; at 1 they aren't used at all.
        train: the training plan.
        epochs: short for the plan with another number of epochs: `Teach(epochs=2)` and `Teach(train=Train(epochs=2))` are equal.

    Raises:
        SettingsError: for a wrong setting, or a task without a teacher.
        ModelError: if teacher and student answer in different shapes.

    >>> Teach(temperature=4.0, epochs=2).train.epochs
    2
    """

    temperature: float = 4.0
    weight: float = 0.9
    train: Train = field(default_factory=partial(Train, epochs=5))
    epochs: int | None = None

    def __post_init__(self) -> None:
        problems = Problems("distill.teach")
        problems.number("temperature", self.temperature, above=0, high=1e6)
        problems.number("weight", self.weight, low=0, high=1)
        if self.epochs is not None:
            problems.number("epochs", self.epochs, low=0, integer=True)
        problems.raise_if_any()
        plan = Train.parse(self.train)
        object.__setattr__(self, "train", plan if self.epochs is None else dataclasses.replace(plan, epochs=self.epochs))
        object.__setattr__(self, "epochs", None)  # the plan says it now, so that equal methods are equal values

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model`, taught by `task.teacher`."""
        if task.teacher is None:
            raise SettingsError(
                "distill.teach: there is no teacher. Put the method into a Recipe, or give the task one, Task(…, teacher=…)."
            )
        student = copy.deepcopy(model)
        task.tune(student, self.train, taught_by(task.teacher, task, self.temperature, self.weight))
        return student
