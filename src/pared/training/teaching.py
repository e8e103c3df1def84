"""A loss in which a teacher has its say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.core.errors import ModelError
from pared.training.answers import Teacher
from pared.training.check import run
from pared.training.samples import first_samples
from pared.training.soft_targets import distillation_loss

if TYPE_CHECKING:
    from pared.training.fit import Objective
    from pared.training.plan import Train
    from pared.training.task import Task


class Response(Protocol):
    """How far a student's answer is from its teacher's."""

    def __call__(self, student: Tensor, teacher: Tensor, targets: Any, temperature: float) -> Tensor:
        """A scalar, 0 where both are equal; `targets` is None where the data have no labels."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A response that has to see some of the teacher's answers first."""

    @property
    def samples(self) -> int:
        """To how many training samples; with 0 it is used as it is."""
        ...

    def fitted(self, answers: Tensor) -> Response:
        """The response for a teacher that gave these answers."""
        ...


class Lesson:
    """The loss of a batch: (1 - weight) · task.loss(outputs, labels) + weight · response(outputs, the teacher's answer).

    Without labels the teacher is all there is. If then the task's loss isn't cross entropy and no response is given, it is the distance to
    the teacher: task.loss(outputs, answer). Of several outputs (tuples, dicts) the response is the mean over all; of a student that
    answers with a list where its teacher gives one tensor (early exits), each is taught and the loss is their mean.

    Args:
        task: gives the loss on labels.
        temperature: for the response.
        weight: share of the teacher.
        response: None: soft targets.
    """

    def __init__(self, task: Task, temperature: float, weight: float, response: Response | None = None) -> None:
        self.task, self.temperature, self.weight, self.response = task, temperature, weight, response

    def __call__(self, outputs: Any, answer: Any, targets: Any) -> Tensor:
        """The loss of the student's outputs."""
        exits = outputs if isinstance(outputs, list) and isinstance(answer, Tensor) else [outputs]
        return _mean([self._one(each, answer, targets) for each in exits])

    def _one(self, outputs: Any, answer: Any, targets: Any) -> Tensor:
        pairs = _pairs(outputs, answer)
        if targets is None and self.response is None and not self.task.classifies:
            return self.task.loss(outputs, answer)
        weight = 1.0 if targets is None else self.weight
        if weight == 0:
            return self.task.loss(outputs, targets)
        said = _mean([self._distance(ours, theirs, targets) for ours, theirs in pairs])
        return said if weight == 1 else (1 - weight) * self.task.loss(outputs, targets) + weight * said

    def _distance(self, ours: Tensor, theirs: Tensor, targets: Any) -> Tensor:
        if self.response is None:
            return distillation_loss(ours, theirs, self.temperature)
        return self.response(ours, theirs, targets, self.temperature)


def lesson_of(
    teacher: nn.Module, task: Task, temperature: float, weight: float, *, response: Response | None = None, train: Train | None = None
) -> Callable[[tuple[Tensor, ...], Any], Callable[[Any], Tensor]]:
    """The loss of `Lesson` for a batch: `lesson_of(…)(inputs, targets)(outputs)`; the arguments are those of `taught_by`."""
    said = Teacher(teacher, task, temperature, train)

    @functools.cache
    def lesson() -> Lesson:  # not before: a response may have to see the teacher's answers
        return Lesson(task, temperature, weight, fit_response(response, said, task))

    def loss_of(inputs: tuple[Tensor, ...], targets: Any) -> Callable[[Any], Tensor]:
        answer = said(inputs)
        return lambda outputs: lesson()(outputs, answer, targets)

    return loss_of


def taught_by(
    teacher: nn.Module, task: Task, temperature: float, weight: float, *, response: Response | None = None, train: Train | None = None
) -> Objective:
    """The objective of `Lesson`: (1 - weight) · task.loss(student, labels) + weight · T² · KL(teacher || student), or another response.

    The teacher is copied and answers each batch as it is given to the student (augmented alike), in eval mode and without gradients, once;
    see `Teacher` for when its answers are kept.

    Args:
        teacher: takes the same inputs as the student.
        task: gives the loss on labels, and the device.
        temperature: greater than 0.
        weight: share of the teacher; at 1 labels aren't used at all.
        response: how answers are compared; None: soft targets.
        train: the plan of the training, by which it is known whether the same samples come again. None: they may not.

    Raises (when it is called):
        ModelError: if teacher and student answer in different shapes.
        DataError: if the response needs labels, and there are none.
    """
    loss_of = lesson_of(teacher, task, temperature, weight, response=response, train=train)

    def objective(student: nn.Module, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        loss = loss_of(inputs, targets)
        return loss(run(student, inputs))

    return objective


def fit_response(response: Response | None, teacher: Teacher, task: Task) -> Response | None:
    """Let a response that asks for it see what the teacher says to the first training samples."""
    if not isinstance(response, Fitted) or response.samples == 0:
        return response
    found = [pytree.tree_leaves(teacher.ask(inputs))[0] for inputs, _ in first_samples(task, response.samples)]
    return response.fitted(torch.cat(found))


def _mean(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _pairs(outputs: Any, answer: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two answers, side by side."""
    ours, theirs = (
        [leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor) and leaf.is_floating_point()] for each in (outputs, answer)
    )
    if len(ours) != len(theirs) or not ours:
        raise ModelError(f"the teacher answers with {len(theirs)} tensors of numbers, the student with {len(ours)}.")
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            raise ModelError(
                f"the teacher answers in shape {tuple(other.shape)}, the student in {tuple(one.shape)}. Both must have the same classes."
            )
    return list(zip(ours, theirs, strict=True))
