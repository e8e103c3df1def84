"""What a method is, and the recipe that strings methods together."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pared.core.errors import SettingsError

if TYPE_CHECKING:
    from torch import nn

    from pared.training import Task, Train


@runtime_checkable
class Method(Protocol):
    """A way to compress a network: a frozen dataclass that is called with a model and a task.

    It returns a new model and leaves the one it was given as it is.
    """

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a compressed copy of `model`."""
        ...


@dataclass(frozen=True, init=False)
class Recipe:
    """Methods carried out one after another; the model given to the recipe is the teacher of all of them.

    Weight rules (masks) hold through later steps and are baked into ordinary weights at the end.

    Args:
        *steps: methods, in order.
        train: how the original is trained when a model comes without weights; `compress` uses it, calling the recipe does not.

    Raises:
        SettingsError: if a step is not a method.

    >>> import pared
    >>> recipe = pared.Recipe(pared.prune.Weights(keep=0.5), pared.quantize.Int8())
    >>> len(recipe.steps)
    2
    """

    steps: tuple[Method, ...]
    train: Train | None = None

    def __init__(self, *steps: Method, train: Train | None = None) -> None:
        wrong = [step for step in steps if isinstance(step, type) or not (dataclasses.is_dataclass(step) and callable(step))]
        if wrong:
            raise SettingsError([f"recipe: a step must be a method such as pared.prune.Neurons(). Got {step!r}." for step in wrong])
        object.__setattr__(self, "steps", tuple(steps))
        object.__setattr__(self, "train", train)

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Carry out all steps on a copy of `model` and bake the weight rules."""
        from pared.core.rules import bake

        task = dataclasses.replace(task, teacher=model)
        result = copy.deepcopy(model)
        for step in self.steps:
            result = step(result, task)
        return bake(result)
