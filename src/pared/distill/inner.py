"""The loss of a student that learns from its teacher's inner layers too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pared.core.errors import ModelError, SettingsError
from pared.core.problems import Problems
from pared.distill.adapters import Adapter, WithAdapters
from pared.distill.pairs import Feature, listening, match_layers
from pared.training import Task, evaluating, first_inputs
from pared.training.answers import Teacher
from pared.training.check import run
from pared.training.teaching import Lesson

SAMPLES = 128
"""Training samples by which layers are paired where none are named."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """One pair of layers in one loss.

    Attributes:
        feature: the loss.
        student, teacher: paths.
        adapter: its number in `WithAdapters`, or None.
    """

    feature: Feature
    student: str
    teacher: str
    adapter: int | None


class Inner:
    """An objective: what outputs say, and the features of inner layers besides; its model is the student in `WithAdapters`.

    Args:
        teacher: answers.
        compared: the pairs.
        lesson: the loss of outputs. None: features alone.
    """

    def __init__(self, teacher: Teacher, compared: Sequence[Compared], lesson: Lesson | None) -> None:
        self.teacher, self.compared, self.lesson = teacher, compared, lesson

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        """The loss of one batch."""
        assert isinstance(model, WithAdapters)
        with listening(self.teacher.network, [each.teacher for each in self.compared]) as theirs:
            answer = self.teacher.ask(inputs)
        with listening(model.student, [each.student for each in self.compared]) as ours:
            outputs = run(model, inputs)
        losses = [] if self.lesson is None else [self.lesson(outputs, answer, targets)]
        for each in self.compared:
            features = ours[each.student]
            adapted = features if each.adapter is None else model.adapters[each.adapter](features)
            losses.append(each.feature.weight * each.feature(adapted, theirs[each.teacher]))
        return torch.stack(losses).sum()


def compare(features: Sequence[Feature], teacher: nn.Module, student: nn.Module, task: Task) -> tuple[WithAdapters, list[Compared]]:
    """Find the pairs of layers of every feature, and build the adapters that they need.

    Args:
        features: losses, with layers named or not.
        teacher, student: on the task's device.
        task: gives inputs to try them on.

    Raises:
        SettingsError: for a path that isn't that of a module, or of one whose output can't be read.
        ModelError: if no adapter fits, or a map is asked of a layer without places.
    """
    named = [(feature, _layers(feature, teacher, student, task)) for feature in features]
    problems = Problems("distill.teach")
    for whose, model, paths in (
        ("student", student, [path for _, layers in named for path in layers]),
        ("teacher", teacher, [path for _, layers in named for path in layers.values()]),
    ):
        known = dict(model.named_modules())
        for path in dict.fromkeys(paths):
            problems.check(path in known, "features", f"layers with the path of a module of the {whose}", path)
    problems.raise_if_any()
    pairs = [(feature, ours, theirs) for feature, layers in named for ours, theirs in layers.items()]
    inputs = task.example_inputs()
    shapes = [_shapes(model, paths, inputs) for model, paths in ((student, [p[1] for p in pairs]), (teacher, [p[2] for p in pairs]))]
    adapters: list[nn.Module] = []
    compared = []
    for feature, ours, theirs in pairs:
        one, other = shapes[0][ours], shapes[1][theirs]
        if feature.maps and (min(len(one), len(other)) < 3 or len(one) != len(other)):
            raise ModelError(f"distill.teach: {ours} and {theirs} must have places to be compared by them. Got {one} and {other}.")
        is_adapted = feature.adapts and one[1:] != other[1:]
        compared.append(Compared(feature, ours, theirs, len(adapters) if is_adapted else None))
        if is_adapted:
            adapters.append(Adapter(one, other))
    return WithAdapters(student, adapters).to(task.machine.device), compared


def _layers(feature: Feature, teacher: nn.Module, student: nn.Module, task: Task) -> dict[str, str]:
    if feature.layers is not None:
        return dict(feature.layers)
    parts = first_inputs(task, SAMPLES, "pairs of layers are found by training samples")
    inputs = tuple(torch.cat(each) for each in zip(*parts, strict=True))
    found = match_layers(teacher, student, inputs, maps=feature.maps)[-feature.most :]
    for pair in found:
        _log.info("distill.teach: %s learns from %s (similarity %.2f).", pair.student, pair.teacher, pair.similarity)
    return {pair.student: pair.teacher for pair in found}


def _shapes(model: nn.Module, paths: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, tuple[int, ...]]:
    with evaluating(model), listening(model, paths) as found:
        run(model, inputs)
    missing = [path for path in paths if path not in found]
    if missing:
        with evaluating(model), listening(model, [path for path, _ in model.named_modules() if path]) as called:
            run(model, inputs)
        raise SettingsError(
            f"distill.teach: features must name layers that are called. Got {', '.join(missing)}. Those that are: {', '.join(called)}."
        )
    return {path: tuple(found[path].shape) for path in paths}
