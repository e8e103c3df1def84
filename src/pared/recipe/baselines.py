"""The comparisons that could embarrass a result: the same small network trained from scratch, and cutting at random."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from pared.core.method import Method, Recipe
from pared.prune import Random
from pared.recipe.methods import method_name
from pared.recipe.stages import Stage, Workshop, stages_of
from pared.training import Task, Train
from pared.training.fresh import reinitialize

SCRATCH = "The same small architecture with new random weights, trained as long as the original, then deployed alike."
RANDOM = "The same recipe, but what is removed is chosen at random instead of by importance."


@dataclass(frozen=True)
class Fresh:
    """Train a network from new random weights: its architecture, masks included, is all that is left of it.

    Args:
        train: the plan, that of the original network.
    """

    train: Train

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with new weights, trained."""
        fresh = copy.deepcopy(model)
        reinitialize(fresh)
        task.tune(fresh, self.train)
        return fresh


def random_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe with every importance replaced by `Random()`, or None if nothing in it is chosen by importance."""
    steps = tuple(dataclasses.replace(step, importance=Random()) if hasattr(step, "importance") else step for step in recipe.steps)  # type: ignore[type-var]
    return Recipe(*steps, train=recipe.train) if steps != recipe.steps else None


def number_formats(recipe: Recipe) -> int:
    """Where the number formats begin: the index of the first step of the quantize family, or the number of steps."""
    return next((at for at, step in enumerate(recipe.steps) if _is_number_format(step)), len(recipe.steps))


def random_stages(recipe: Recipe) -> list[Stage]:
    """The stages of the random baseline; none if the recipe prunes nothing."""
    changed = random_recipe(recipe)
    return stages_of(changed.steps, [method_name(step) for step in changed.steps], "random-") if changed is not None else []


def scratch_stages(recipe: Recipe, original: nn.Module, small: nn.Module) -> list[Stage]:
    """The stages of the scratch baseline, which begins with `small`, the network before its number format changes.

    There are none if the original's plan of training isn't known, or if `small` has the original's architecture.
    """
    if recipe.train is None or _shapes(original) == _shapes(small):
        return []
    formats = [step for step in recipe.steps[number_formats(recipe) :] if _is_number_format(step)]
    steps = (Fresh(recipe.train), *formats)
    return stages_of(steps, ["train", *(method_name(step) for step in formats)], "scratch-")


def run_stages(workshop: Workshop, stages: list[Stage], model: nn.Module) -> nn.Module:
    """Carry out stages one after another."""
    for stage in stages:
        model, _ = workshop.carry_out(stage, model)
    return model


def _is_number_format(step: Method) -> bool:
    return method_name(step).startswith("quantize.")


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of all parameters, and of the masks, which change no shape but the architecture."""
    masks = [(name, int(buffer.sum())) for name, buffer in model.named_buffers() if buffer.dtype == torch.bool]
    return [tuple(parameter.shape) for parameter in model.parameters()] + [(len(name), kept) for name, kept in masks]
