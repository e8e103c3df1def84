"""What every command needs: a task, a model, their shapes, and a way to print results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from pared.architecture.load import load_model
from pared.core.errors import DataError
from pared.core.seeds import seed_everything
from pared.data import load
from pared.training import Task


@dataclass(frozen=True)
class Shape:
    """What an image model must fit: classes, channels, side in pixels."""

    classes: int
    channels: int
    size: int


def load_task(name: str, seed: int, batch_size: int = 128) -> Task:
    """The task of --data, after seeding everything."""
    seed_everything(seed)
    return load(name, seed=seed, batch_size=batch_size)


def shape_of(task: Task) -> Shape:
    """Read the shapes off a task's data.

    Raises:
        DataError: if its inputs are not images.
    """
    inputs, targets = next(iter(task.valid))
    first = inputs[0] if isinstance(inputs, tuple | list) else inputs
    shape = tuple(first.shape[1:])
    if len(shape) != 3:
        # a model of the user's own takes what it takes
        return Shape(_classes(task, targets), shape[0] if shape else 1, shape[-1] if shape else 1)
    if shape[1] != shape[2]:
        raise DataError(f"{task.name}: images must be square for a model chosen by name. Got {shape[1]}x{shape[2]}.")
    return Shape(_classes(task, targets), shape[0], shape[1])


def model_for(spec: str, task: Task, weights: Path | None, seed: int) -> nn.Module:
    """The model of MODEL in the shapes of the task, with weights or freshly initialised from the seed."""
    shape = shape_of(task)
    seed_everything(seed)
    return load_model(spec, classes=shape.classes, channels=shape.channels, size=shape.size, weights=weights)


def use_threads(threads: int | None) -> None:
    """Set the threads of training."""
    if threads is not None:
        torch.set_num_threads(threads)


def print_json(content: Any) -> None:
    """Print a result for scripts."""
    typer.echo(json.dumps(content, indent=2))


def _classes(task: Task, targets: Any) -> int:
    known: Any = getattr(task.train, "targets", None)
    if isinstance(known, torch.Tensor) and not known.is_floating_point():
        return int(known.max()) + 1
    if isinstance(targets, torch.Tensor) and not targets.is_floating_point():
        return max(int(labels.max()) for _, labels in task.valid) + 1
    return int(targets.shape[-1]) if isinstance(targets, torch.Tensor) and targets.dim() > 1 else 1
