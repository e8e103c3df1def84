"""For methods that change their masks while training goes on: where training is, and the loss that they hook into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pared.training import Task, Train, rank_and_world
from pared.training.fit import default_objective

_BUFFER = "batches_seen"


@dataclass(frozen=True)
class Clock:
    """Where a training is, before one of its batches.

    Attributes:
        seen: batches before this one.
        total: batches of the whole training, in this process.
    """

    seen: int
    total: int

    @property
    def progress(self) -> float:
        """The part of the training that is done, from 0 to less than 1."""
        return self.seen / self.total


Step = Callable[[Clock, Callable[[], Tensor]], Tensor]
"""Called for each batch with the clock and a function that computes the loss; returns the loss."""


def tune_with(model: nn.Module, task: Task, train: Train, step: Step) -> None:
    """Train `model` in place by the task's fit, with `step` around the loss of each batch.

    It is one training, so the learning rate goes on from epoch to epoch. Batches are counted in a buffer of the model, which is
    removed afterwards: a checkpoint holds it, so a training that is resumed goes on counting. A loop of the user's own only has to
    call the objective for each batch that it trains on.
    """
    ordinary = default_objective(task, train)
    model.register_buffer(_BUFFER, torch.zeros((), dtype=torch.int64))
    totals: list[int] = []

    def objective(given: nn.Module, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        if not torch.is_grad_enabled():  # somebody only wants to know the loss
            return ordinary(given, inputs, targets)
        if not totals:  # not before: processes are started by the fit
            totals.append(max(1, train.epochs * _batches(task)))
        seen = model.get_buffer(_BUFFER)
        loss = step(Clock(int(seen), totals[0]), lambda: ordinary(given, inputs, targets))
        seen += 1
        return loss

    try:
        task.tune(model, replace(train, label_smoothing=0.0, teach=0.0), objective)  # the objective does both by itself
    finally:
        del model._buffers[_BUFFER]


def _batches(task: Task) -> int:
    """How many batches of an epoch this process sees."""
    try:
        count = len(task.train)  # type: ignore[arg-type]
    except TypeError:
        count = sum(1 for _ in task.train)
    return max(1, count // rank_and_world()[1])
