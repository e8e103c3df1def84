"""`plan` shows what can be cut out of a network and what can't, and why; `cut` does it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.graph.analysis import Analysis, analyse, describe
from pared.graph.classes import CutClass
from pared.graph.cutting import Cut, cut_model
from pared.graph.tracing import trace_or_capture
from pared.prune.allocation import Room, Scores, by_ranking, class_keys
from pared.prune.importance import Importance, Magnitude
from pared.prune.importance.protocol import scores_of
from pared.prune.neuron_costs import Unit, class_costs, neuron_costs
from pared.training import Task

Keep = float | Mapping[str, float]


@dataclass(frozen=True)
class PlanClass:
    """Neurons that are cut together.

    Attributes:
        layers: the modules that compute them.
        neurons: how many can be removed one by one or in grids.
        grids: "4 x 16" for each grid: rows that keep equally many each, or go as a whole.
        stays: how many further outputs of these layers have to stay.
        exact: whether what is left computes what it did before.
        why: what makes the cut inexact.
    """

    layers: tuple[str, ...]
    neurons: int
    grids: tuple[str, ...]
    stays: int
    exact: bool
    why: tuple[str, ...]


@dataclass(frozen=True)
class FrozenLayer:
    """A layer none of whose outputs can be removed, and why."""

    layer: str
    outputs: int
    why: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What `cut` could remove.

    Attributes:
        classes: what can be cut.
        frozen: layers whose outputs stay, with the reasons.
        unknown: operators that the analysis doesn't follow, with their place in the source; what they touch stays.
        dynamic: whether the graph takes any batch size.
    """

    classes: tuple[PlanClass, ...]
    frozen: tuple[FrozenLayer, ...]
    unknown: tuple[str, ...]
    dynamic: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = ["can be cut:"] if self.classes else ["nothing can be cut"]
        for found in self.classes:
            grids = f", in grids of {', '.join(found.grids)}" if found.grids else ""
            caution = "" if found.exact else " (not exact, cut only when asked)"
            lines.append(f"  {', '.join(found.layers)}: {found.neurons} neurons{grids}{caution}")
            lines += [f"    {reason}" for reason in found.why]
        if self.frozen:
            lines.append("stays as it is:")
            lines += [f"  {layer.layer}: {layer.outputs} outputs: {'; '.join(layer.why)}" for layer in self.frozen]
        if self.unknown:
            lines += ["operators that aren't followed:", *(f"  {place}" for place in self.unknown)]
        return "\n".join(lines)


def plan(model: nn.Module, example_inputs: Tensor | Sequence[Any], *, leave: Sequence[str] = ()) -> Plan:
    """Show what `cut` could remove from `model`, and what it can't and why. Nothing changes.

    Args:
        model: any module that `torch.export` accepts.
        example_inputs: a tensor or a tuple of positional inputs.
        leave: module paths whose outputs keep their width.

    Raises:
        ModelError, CaptureError: if the model can't be run or captured.
        SettingsError: if `leave` names no module.

    >>> import torch
    >>> print(plan(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.zeros(1, 4)))
    can be cut:
      0: 6 neurons
    stays as it is:
      2: 2 outputs: is an output of the model (output)
    """
    analysis = analyse(trace_or_capture(model, example_inputs), tuple(leave))
    classes = tuple(_plan_class(analysis, found) for found in analysis.classes)
    frozen: dict[str, FrozenLayer] = {}
    for producer in analysis.producers:
        roots = analysis.root[producer.atoms]
        if analysis.frozen[roots].all():
            layer = producer.parameter.rpartition(".")[0] or producer.parameter
            frozen.setdefault(layer, FrozenLayer(layer, len(roots), tuple(analysis.reasons(producer.atoms)[:3])))
    unknown = tuple(dict.fromkeys(describe(node) for node in analysis.first.unknown))
    return Plan(classes, tuple(frozen.values()), unknown, analysis.captured.dynamic)


def _plan_class(analysis: Analysis, found: CutClass) -> PlanClass:
    layers = tuple(dict.fromkeys(producer.parameter.rpartition(".")[0] or producer.parameter for producer in found.producers))
    grids = tuple(grid.name for grid in found.grids)
    why = analysis.inexact(np.array(found.neurons))
    return PlanClass(layers, len(found.neurons), grids, found.frozen, not why, tuple(why[:3]))


def cut(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    keep: Keep = 0.5,
    *,
    leave: Sequence[str] = (),
    only: Sequence[str] = (),
    importance: Importance | None = None,
    norms: bool = False,
    round_to: int = 1,
) -> nn.Module:
    """Remove neurons from a copy of `model` so that the share `keep` of every class stays.

    The tensors get smaller: no masks, no hooks, no wrappers. What is left computes what it computed before, up to the
    contribution of what was removed. Where a reshape or a grouped convolution splits channels, whole rows (groups, heads) go or equal
    numbers of each row, whichever loses less.

    Args:
        model: any module that `torch.export` accepts; it isn't changed.
        example_inputs: a tensor or a tuple of positional inputs.
        keep: the share of neurons to keep of each class, or a mapping from module path to share (the rest keeps all).
        leave: module paths whose outputs keep their width; a path covers everything below it.
        only: module paths; where given, only neurons that these compute go, with all that is tied to them.
        importance: which neurons go first; by default those whose weights have the smallest norm.
        norms: cut also where a norm, a mean or a softmax runs over the cut axis; the result then differs and needs fine-tuning.
        round_to: round what stays to a multiple.

    Returns:
        A module of the user's class where its own forward still computes the same, else the rewritten graph as a module; in both cases
        trainable, with the same call signature and state_dict names, in the mode (train or eval) of `model`.

    Raises:
        ModelError, CaptureError: if the model can't be run or captured.
        SettingsError: if a setting is out of range or a path names no module.

    >>> import torch
    >>> small = cut(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.zeros(1, 4), keep=0.5)
    >>> small[0].weight.shape, small[2].weight.shape
    (torch.Size([3, 4]), torch.Size([2, 3]))
    """
    problems = Problems("prune.cut")
    shares = keep if isinstance(keep, Mapping) else {"keep": keep}
    for name, share in shares.items():
        problems.number(name if name == "keep" else f"keep[{name!r}]", share, low=0, high=1)
    problems.number("round_to", round_to, low=1, integer=True)
    for name, paths in (("leave", leave), ("only", only)):
        problems.check(not isinstance(paths, str), name, "a list of module paths", paths)
    problems.raise_if_any()
    chooser = Chooser(keep, importance or Magnitude(), norms=norms, round_to=round_to, only=tuple(only))
    return chooser.cut(model, example_inputs, tuple(leave)).model


@dataclass(frozen=True)
class Chooser:
    """Which neurons go: so many of every class, those of least importance.

    Attributes:
        keep: a share, or a mapping from module path to share (the rest keeps all).
        importance: scores by root.
        scope: whether the share is one of each class ("layer") or of all classes in one ranking ("global").
        floor: the least share that a class keeps.
        cap: the largest share that a class keeps.
        only: module paths; where given, only classes that these compute are cut.
        per: what a ranking over classes divides scores by: nothing ("neuron"), or the multiply-adds or parameters of a neuron.
        norms: whether to cut inexact classes too.
        round_to: round what stays to a multiple.
        task: the data that an importance may need.
        sizes: for every class by key, the count that shares refer to (default: the present one); rounds of pruning set it.
        stay: how many stay of each class by key, where that is settled already; all of a class that isn't named.
    """

    keep: Keep
    importance: Importance
    scope: Literal["layer", "global"] = "layer"
    floor: float = 0.0
    cap: float = 1.0
    only: tuple[str, ...] = ()
    per: Literal["neuron"] | Unit = "neuron"
    norms: bool = False
    round_to: int = 1
    task: Task | None = None
    sizes: Mapping[str, int] | None = None
    stay: Mapping[str, int] | None = None

    def cut(self, model: nn.Module, example_inputs: Tensor | Sequence[Any], leave: tuple[str, ...] = ()) -> Cut:
        """Cut a copy of `model`."""
        return cut_model(model, example_inputs, self, leave)

    def __call__(self, analysis: Analysis) -> list[int]:
        """The roots to remove."""
        stay = self.counts(analysis) if self.stay is None else self.stay
        scores = self._scores(analysis)
        removed: list[int] = []
        for key, found in zip(class_keys(analysis.classes), analysis.classes, strict=True):
            now = len(found.neurons)
            if stay.get(key, now) < now:
                removed += found.choose(scores, stay[key] / now)
        return removed

    def counts(self, analysis: Analysis) -> dict[str, int]:
        """How many neurons stay of each class that may be cut, by key.

        Raises:
            SettingsError: if a path names no layer that computes neurons.
            WeightsError: if scores that are compared are NaN.
        """
        _check_paths("keep", self.keep if isinstance(self.keep, Mapping) else (), analysis)
        _check_paths("only", self.only, analysis)
        classes = self._candidates(analysis)
        rooms = self.rooms(analysis)
        if self.scope == "layer" or isinstance(self.keep, Mapping):
            return {key: rooms[key].rounded(self._share(found), self.round_to) for key, found in classes.items()}
        scores = self._scores(analysis)
        scales = [one_scale(scores[list(found.neurons)], self.importance) for found in classes.values()]
        if self.per != "neuron":
            scales = self._per_cost(scales, analysis, list(classes.values()))
        counts = by_ranking(scales, list(rooms.values()), self.keep)
        return {key: room.rounded(count / room.size, self.round_to) for (key, room), count in zip(rooms.items(), counts, strict=True)}

    def _per_cost(self, scales: list[Scores], analysis: Analysis, classes: list[CutClass]) -> list[Scores]:
        """What a ranking buys by its budget: importance per cost.

        Scores on one scale are divided by what a neuron of the class costs. Scores that only compare within a class count as shares of
        its importance, and costs as shares of its cost, so that what the whole class costs is left to divide by.
        """
        assert self.per != "neuron"
        costs = neuron_costs(analysis, self.per)
        alone = getattr(self.importance, "normalize", "layer") == "layer"
        prices = [class_costs(found, costs) / (1 if alone else len(found.neurons)) for found in classes]
        return [scale / max(price, 1e-300) for scale, price in zip(scales, prices, strict=True)]  # what costs nothing is cut last

    def rooms(self, analysis: Analysis) -> dict[str, Room]:
        """What each class that may be cut may come to, by key."""
        rooms = {}
        for key, found in self._candidates(analysis).items():
            now = len(found.neurons)
            rooms[key] = Room.between((self.sizes or {}).get(key, now), now, self.floor, self.cap)
        return rooms

    def _candidates(self, analysis: Analysis) -> dict[str, CutClass]:
        keyed = zip(class_keys(analysis.classes), analysis.classes, strict=True)
        return {key: found for key, found in keyed if self._may_cut(found, analysis)}

    def _scores(self, analysis: Analysis) -> Scores:
        scores = scores_of(self.importance, analysis, self.task).copy()
        scores[analysis.frozen] = np.inf
        return scores

    def _may_cut(self, found: CutClass, analysis: Analysis) -> bool:
        wanted = not self.only or any(_names_layer(path, found) for path in self.only)
        named = not isinstance(self.keep, Mapping) or any(_names_layer(path, found) for path in self.keep)
        return wanted and named and (self.norms or not analysis.inexact(np.array(found.neurons)))

    def _share(self, found: CutClass) -> float:
        if not isinstance(self.keep, Mapping):
            return float(self.keep)
        return min(float(share) for path, share in self.keep.items() if _names_layer(path, found))


def one_scale(scores: Scores, importance: Importance) -> Scores:
    """The scores of one class, comparable with those of others.

    An importance with a field `normalize` has decided on that itself; the scores of any other are divided by their mean, as sizes of
    weights and of gradients differ from layer to layer by orders of magnitude.

    >>> one_scale(np.array([1.0, 3.0]), lambda analysis, task: np.ones(1)).tolist()
    [0.5, 1.5]
    """
    if hasattr(importance, "normalize"):
        return scores
    mean = float(np.abs(scores).mean())
    return scores / mean if mean > 0 else scores


def _names_layer(path: str, found: CutClass) -> bool:
    layers = [producer.parameter.rpartition(".")[0] for producer in found.producers]
    return any(layer == path or layer.startswith(f"{path}.") for layer in layers)


def _check_paths(field: str, paths: Iterable[str], analysis: Analysis) -> None:
    layers = {producer.parameter.rpartition(".")[0] for producer in analysis.producers}
    wrong = [path for path in paths if not any(layer == path or layer.startswith(f"{path}.") for layer in layers)]
    if wrong:
        known = ", ".join(sorted(layers)[:20])
        raise SettingsError([f"{field}: no layer {path!r} computes neurons. Layers are {known}." for path in wrong])
