"""The original network teaches the compressed one."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.distill.attention import Attention
from pared.distill.decoupled import Decoupled
from pared.distill.direction import Direction
from pared.distill.dist import Dist
from pared.distill.hints import Hint
from pared.distill.inner import Inner, compare
from pared.distill.logits import Logits
from pared.distill.pairs import Feature
from pared.distill.relations import Relations
from pared.distill.similarity import Similarity
from pared.training import Task, Train, taught_by
from pared.training.answers import Teacher
from pared.training.teaching import Lesson, Response, fit_response


@dataclass(frozen=True)
class Teach:
    """Train a network on its teacher's answers as well as on the labels (Hinton et al. 2015, 1503.02531).

    The loss of a batch is (1 - weight) · task.loss(student, labels) + weight · T² · KL(teacher || student), both softened by T.
    The teacher is `task.teacher`, the model that the recipe was given, or an `Ensemble`. It answers each batch once, as it is given to the
    student (augmented alike), in eval mode and without gradients, and stays as it is; answers to data that don't change are kept. Masks on
    the student's weights hold. A student with early exits is taught at each exit; the loss is the mean over exits.

    Data without labels: the teacher alone teaches. If the task's loss isn't cross entropy (regression), it is then the distance to the
    teacher's outputs, unless `loss` says otherwise.

    Args:
        temperature: T, greater than 0. 4 lets the lesser classes of a network of moderate size show; small students want 2.5 to 4,
            large ones take up to 20 (section 3 of the paper).
        weight: share of the teacher in the loss. The paper finds that the labels should weigh much less; at 1 they aren't used at all.
        train: the training plan.
        epochs: short for the plan with another number of epochs: `Teach(epochs=2)` and `Teach(train=Train(epochs=2))` are equal.
        loss: how answers are compared: `Logits`, `Decoupled`, `Dist` or `Direction`, or a function of your own (see `Response`). None: soft
            targets. With label terms of the weight 1, as papers write them, `weight` is 0.5 and the learning rate twice theirs.
        features: losses of inner layers, added with their own weights: `Hint`, `Attention`, `Similarity`, `Relations`.
        first: a plan of training before, on the features alone (the first stage of FitNets, 1412.6550). None: everything at once.

    Raises:
        SettingsError: for a wrong setting, or a task without a teacher.
        ModelError: if teacher and student answer in different shapes.
        DataError: if `loss` needs labels, and the data have none.

    >>> Teach(temperature=4.0, epochs=2).train.epochs
    2
    """

    temperature: float = 4.0
    weight: float = 0.9
    train: Train = field(default_factory=partial(Train, epochs=5))
    epochs: int | None = None
    loss: Logits | Decoupled | Dist | Direction | Response | None = None
    features: tuple[Hint | Attention | Similarity | Relations | Feature, ...] = ()
    first: Train | None = None

    def __post_init__(self) -> None:
        problems = Problems("distill.teach")
        problems.number("temperature", self.temperature, above=0, high=1e6)
        problems.number("weight", self.weight, low=0, high=1)
        if self.epochs is not None:
            problems.number("epochs", self.epochs, low=0, integer=True)
        own = self.loss is None or (callable(self.loss) and not isinstance(self.loss, type))
        problems.check(own, "loss", "a response such as Logits(), or None", self.loss)
        several = isinstance(self.features, list | tuple)
        features = tuple(self.features) if several else ()
        fine = several and all(callable(each) and not isinstance(each, type) and hasattr(each, "layers") for each in features)
        problems.check(fine, "features", "a list of feature losses such as Hint()", self.features)
        problems.check(self.first is None or bool(features) or not fine, "first", "None where there are no features", self.first)
        plan = Train.parse(self.train)
        problems.check(not plan.teach and not plan.label_smoothing, "train", "a plan without teach and label_smoothing", self.train)
        problems.raise_if_any()
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "first", None if self.first is None else Train.parse(self.first))
        object.__setattr__(self, "train", plan if self.epochs is None else dataclasses.replace(plan, epochs=self.epochs))
        object.__setattr__(self, "epochs", None)  # the plan says it now, so that equal methods are equal values

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model`, taught by `task.teacher`."""
        if task.teacher is None:
            raise SettingsError(
                "distill.teach: there is no teacher. Put the method into a Recipe, or give the task one, Task(…, teacher=…)."
            )
        student = copy.deepcopy(model)
        if not self.features:
            objective = taught_by(task.teacher, task, self.temperature, self.weight, response=self.loss, train=self.train)
            task.tune(student, self.train, objective)
            return student
        teacher = Teacher(task.teacher, task, self.temperature)
        whole, compared = compare(self.features, teacher.network, student.to(task.machine.device), task)
        if self.first is not None:
            task.tune(whole, self.first, Inner(teacher, compared, None))
        lesson = Lesson(task, self.temperature, self.weight, fit_response(self.loss, teacher, task))
        task.tune(whole, self.train, Inner(teacher, compared, lesson))
        return whole.student
