"""What an importance is: scores of single weights, scores of neurons, and the way from the first to the second."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pared.core.errors import WeightsError
from pared.core.problems import Problems
from pared.graph.analysis import Analysis
from pared.training import Task

Scores = NDArray[np.float64]
Normalize = Literal["layer", "none"]
Score = Literal["removal", "guard"]


class Importance(Protocol):
    """Scores by root, of shape (analysis.first.count,); a low score goes first."""

    def __call__(self, analysis: Analysis, task: Task | None) -> Scores:
        """Score all roots of `analysis`."""
        ...


def scores_of(importance: Importance, analysis: Analysis, task: Task | None) -> Scores:
    """The scores that an importance gives, of which none may be NaN.

    Raises:
        WeightsError: naming the importance.
    """
    scores = importance(analysis, task)
    if np.isnan(scores).any():
        raise WeightsError(f"{type(importance).__name__} gives NaN, so neurons can't be ranked. Check the weights and the data.")
    return scores


class WeightImportance(ABC):
    """An importance that gives every single weight a score. That of a neuron is the sum over the weights that compute it (`by_root`).

    Attributes:
        normalize: "layer" divides the scores of neurons by the mean of their layer before tied layers are added and anything is
            compared, "none" leaves them in their own unit. Scores of single weights are never normalised.
    """

    normalize: Normalize

    @abstractmethod
    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """A score for every weight: a tensor of its shape for every floating-point parameter, by each of its names.

        A parameter behind a mask has its plain name too ("0.weight" for "0.parametrizations.weight.original"). The model's values
        don't change.
        """

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Score all roots: `weights` of the captured graph (in eval mode), summed by neuron."""
        return by_root(analysis, self.weights(analysis.captured.module, task), self.normalize)


def by_root(analysis: Analysis, scores: Mapping[str, Tensor], normalize: Normalize = "none") -> Scores:
    """Sum scores of weights to scores of neurons: over the row that computes each, then over all layers that are tied.

    Args:
        analysis: of a captured graph.
        scores: by parameter, of the parameter's shape.
        normalize: "layer" divides every layer's sums by their mean first.

    Returns:
        An array by root.

    >>> from pared.graph.analysis import analyse
    >>> from pared.graph.capture import capture
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> analysis = analyse(capture(model, torch.zeros(2, 2)))
    >>> scores = by_root(analysis, {"0.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), "2.weight": torch.ones(1, 3)})
    >>> scores[list(analysis.classes[0].neurons)].tolist()
    [3.0, 7.0, 11.0]
    """
    return add_rows(analysis, [producer.view(scores[producer.parameter]).sum(dim=1) for producer in analysis.producers], normalize)


def add_rows(analysis: Analysis, rows: Sequence[Tensor], normalize: Normalize) -> Scores:
    """Add one score for each row of each producer of the analysis (tensors of shape (n,), in order) up by root.

    Rows of a weight that is read in several places are rows of several producers, and count once.
    """
    scores = np.zeros(analysis.first.count)
    again = _repeated(analysis)
    for place, (producer, values) in enumerate(zip(analysis.producers, rows, strict=True)):
        if not bool(torch.isfinite(values).all()):
            raise WeightsError(f"{producer.parameter}: scores of its neurons aren't finite. Train or load the model again.")
        if place in again:
            continue
        values = values.cpu().double()
        np.add.at(scores, analysis.root[producer.atoms], (divided_by_mean(values) if normalize == "layer" else values).numpy())
    return scores


def _repeated(analysis: Analysis) -> set[int]:
    """The places of producers that are an earlier one again: the same rows of the same parameter for the same roots."""
    parameters = all_names(analysis.captured.module)
    uses = Counter(id(parameters[producer.parameter]) for producer in analysis.producers)
    known: set[tuple[int, bytes, bytes]] = set()
    found: set[int] = set()
    for place, producer in enumerate(analysis.producers):
        parameter = parameters[producer.parameter]
        if uses[id(parameter)] > 1:
            entries = producer.view(torch.arange(parameter.numel()).reshape(parameter.shape))[:, :1]
            key = id(parameter), entries.contiguous().numpy().tobytes(), analysis.root[producer.atoms].tobytes()
            if key in known:
                found.add(place)
            known.add(key)
    return found


def divided_by_mean(values: Tensor) -> Tensor:
    """Values of mean 1; those without a positive mean stay as they are.

    >>> divided_by_mean(torch.tensor([1.0, 3.0])).tolist()
    [0.5, 1.5]
    """
    mean = values.mean()
    return values / mean if mean > 0 else values


def plain_name(name: str) -> str:
    """The name that a parameter had before a weight rule was put on it.

    >>> plain_name("0.parametrizations.weight.original")
    '0.weight'
    """
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2", name)


def all_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """The floating-point parameters by every name: shared ones by all of theirs, those behind a rule by their plain one too."""
    found = {name: value for name, value in model.named_parameters(remove_duplicate=False) if value.is_floating_point()}
    return {**{plain_name(name): value for name, value in found.items()}, **found}


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """`all_names`, detached, with zeros where a mask holds them at zero."""
    keeps = [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name.endswith(".keep")]
    masks: dict[str, list[Tensor]] = {}
    for name, keep in keeps:
        masks.setdefault(plain_name(re.sub(r"\.\d+\.keep$", ".original", name)), []).append(keep)
    found: dict[str, Tensor] = {}
    for name, parameter in all_names(model).items():
        value = parameter.detach()
        for keep in masks.get(plain_name(name), ()):
            value = torch.where(keep, value, torch.zeros_like(value))
        found[name] = value
    return found


def removal_or_guard(guard: Mapping[str, Tensor], model: nn.Module, score: Score, factor: float = 1.0) -> dict[str, Tensor]:
    """What a weight guards ("guard"), or what its removal costs ("removal"): factor · guard · weight², a quadratic penalty at zero."""
    if score == "guard":
        return dict(guard)
    values = effective_weights(model)
    return {name: factor * guard[name] * values[name].to(guard[name]).square() for name in guard}


def check_choice(problems: Problems, field: str, value: object, *choices: str) -> None:
    """Note a mistake unless `value` is one of the words."""
    problems.check(value in choices, field, " or ".join(choices), value)


def check_samples(where: str, samples: object, normalize: object) -> Problems:
    """The mistakes in the two settings that every importance with data has."""
    problems = Problems(where)
    problems.number("samples", samples, low=1, integer=True)
    check_choice(problems, "normalize", normalize, "layer", "none")
    return problems
