"""What a network is for: data, loss, metric, and how it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.core.errors import DataError
from pared.core.problems import Problems
from pared.core.seeds import rng_state, set_rng_state
from pared.training.check import split_batch
from pared.training.fit import Objective, default_objective, fit
from pared.training.journal import Journal, copy_weights, identify, restore_weights
from pared.training.machine import Machine
from pared.training.metric import Accuracy, Metric
from pared.training.plan import Train


class Fit(Protocol):
    """A training loop: trains `model` in place as `train` says."""

    def __call__(self, model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
        """Train; `objective(model, inputs, targets)`, where given, takes the place of the task's loss."""
        ...


def ignore(event: dict[str, Any]) -> None:
    """The default of `Task.report`: nobody listens."""


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that methods need from outside: batches, a loss, a metric, a way to train.

    Args:
        train: what is trained on: anything that can be iterated again and again and gives pairs (inputs, targets), such as a
            DataLoader or a list of batches. Inputs are a tensor or a tuple of tensors, in the units of the deployed file
            (images: pixels in [0, 1]). Without labels (a bare tensor, or None as targets) the teacher's answers take their place.
        valid: what choices are made by.
        test: what is reported.
        loss: (outputs, targets) -> scalar. Without labels: of a network that isn't a classifier the distance to the teacher's answers.
        metric: (outputs, targets) -> one value for each sample, with `name` and `higher_is_better`.
        fit: the training loop; a loop of your own may stand in.
        normalize: applied to the inputs before the model, in training, in evaluation and inside the deployed file.
        augment: (inputs, generator) -> inputs, on training batches only and before `normalize`.
        machine: where it runs.
        teacher: the model that a recipe was given; recipes set it.
        answers: a folder that keeps what the teacher says to data that don't change; None: that of the journal, else only memory.
        journal: where trainings keep their checkpoints; the runner sets it.
        report: called with small dicts while training goes on.
        name: of the data, for tables.

    Raises:
        DataError: if a split is empty or can be read only once.
        SettingsError: naming every other field that can't be used.

    >>> batches = [(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))]
    >>> task = Task(batches, batches, batches)
    >>> [part.shape for part in task.example_inputs()]
    [torch.Size([2, 3])]
    """

    train: Iterable[Any] = field(repr=False)
    valid: Iterable[Any] = field(repr=False)
    test: Iterable[Any] = field(repr=False)
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy
    metric: Metric = field(default_factory=Accuracy)
    fit: Fit = fit
    normalize: nn.Module | None = None
    augment: Callable[[Any, torch.Generator], Any] | None = None
    machine: Machine = field(default_factory=Machine)
    teacher: nn.Module | None = field(default=None, repr=False)
    answers: str | Path | None = None
    journal: Journal | None = None
    report: Callable[[dict[str, Any]], None] = ignore
    name: str = "data"

    def __post_init__(self) -> None:
        wrong = [problem for split in ("train", "valid", "test") if (problem := _split_problem(split, getattr(self, split)))]
        if wrong:
            raise DataError("\n".join(wrong))
        problems = Problems("task")
        for name in ("loss", "fit", "report", "metric"):
            problems.check(callable(getattr(self, name)), name, "callable", getattr(self, name))
        named = hasattr(self.metric, "name") and hasattr(self.metric, "higher_is_better")
        problems.check(named, "metric", "an object with name and higher_is_better", self.metric)
        problems.check(self.augment is None or callable(self.augment), "augment", "callable or None", self.augment)
        problems.check(self.normalize is None or isinstance(self.normalize, nn.Module), "normalize", "an nn.Module or None", self.normalize)
        problems.check(isinstance(self.machine, Machine), "machine", "a Machine", self.machine)
        problems.check(
            self.answers is None or isinstance(self.answers, str | Path), "answers", "the path of a folder or None", self.answers
        )
        problems.raise_if_any()

    @property
    def classifies(self) -> bool:
        """Whether targets are class numbers: the loss is torch's cross entropy."""
        return self.loss is functional.cross_entropy

    def to_device(self, value: Any) -> Any:
        """Move a tensor, or the tensors of a tuple, list or dict, to the machine's device."""
        if isinstance(value, Tensor):
            return value.to(self.machine.device, non_blocking=True)
        if isinstance(value, tuple | list):
            parts = [self.to_device(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # named tuples take their fields one by one
        if isinstance(value, dict):
            return {key: self.to_device(part) for key, part in value.items()}
        return value

    def prepare(self, inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs as the model takes them: normalised, on the machine's device, as a tuple (`model(*task.prepare(inputs))`)."""
        moved = self.to_device(inputs)
        moved = moved if isinstance(moved, tuple) else (moved,)
        if self.normalize is None:
            return moved
        with torch.no_grad():
            normalized = self.normalize.to(self.machine.device)(*moved)
        return normalized if isinstance(normalized, tuple) else (normalized,)

    def example_inputs(self, count: int = 2) -> tuple[Tensor, ...]:
        """Prepared inputs of `count` samples from the validation split; if that has fewer, it starts over.

        The default is 2 because a batch of 1 would let `torch.export` take the batch axis for a constant.
        """
        batches = [split_batch(batch, "valid")[0] for batch in _until(self.valid, count)]
        parts = [part if isinstance(part, tuple) else (part,) for part in batches]
        joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        repeats = -(-count // len(joined[0]))
        return self.prepare(tuple(tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:count] for tensor in joined))

    def tune(self, model: nn.Module, train: Train, objective: Objective | None = None) -> None:
        """Train `model` in place with the task's fit: the one call that methods train by.

        A loop of the user's own has no checkpoints of its epochs, but once it is through its result is in the journal too. It needs to
        know nothing of teachers: where the plan has one, it gets the objective.
        """
        if self.fit is not fit and objective is None and train.teach:
            objective, train = default_objective(self, train), dataclasses.replace(train, teach=0.0)
        if self.journal is None or self.fit is fit:
            self.fit(model, self, train, objective)
            return
        record, identity = self.journal.fit(), identify(model, train)
        state = record.load(identity)
        if state is not None:
            restore_weights(model, state["weights"])
            set_rng_state(state["random"])
            model.eval()
            return
        self.fit(model, dataclasses.replace(self, journal=None), train, objective)
        record.save(identity, {"weights": copy_weights(model), "random": rng_state()})


def _until(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Batches until they hold `count` samples."""
    found = 0
    for batch in batches:
        inputs = split_batch(batch, "valid")[0]
        found += len(inputs[0] if isinstance(inputs, tuple) else inputs)
        yield batch
        if found >= count:
            return


def _split_problem(name: str, split: Any) -> str | None:
    try:
        # asking for a first batch would draw from the random generators, so it is done only where there is no length
        iterator = None if isinstance(split, Sized) else iter(split)
    except TypeError:
        return f"the {name} split must be something to iterate over, such as a DataLoader. Got {type(split).__name__}."
    if iterator is split:
        return f"the {name} split can be read only once. Give a DataLoader or a list of batches instead of an iterator."
    try:
        empty = len(split) == 0 if iterator is None else next(iterator, None) is None
    except TypeError:  # a DataLoader over an IterableDataset has a len that raises
        return None
    return f"the {name} split is empty." if empty else None
