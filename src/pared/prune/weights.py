"""Pruning of single weights, of blocks and of N:M groups: masks while training, exact zeros afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from pared.core.errors import SettingsError
from pared.core.layers import Layer, compressible, readers
from pared.core.problems import Problems
from pared.prune.importance import AnyWeightImportance, Magnitude
from pared.prune.masks import alive, set_mask
from pared.prune.obs import prune_layers
from pared.prune.patterns import Block, NofM, choose_weights, parse_pattern
from pared.prune.selection import choose, keep_by_round, select
from pared.training import Task, Train

__all__ = ["Weights", "choose", "keep_by_round", "select", "weight_scores"]

_TENTH = 0.1
"""The default of `Weights.keep`."""


@dataclass(frozen=True)
class Weights:
    """Remove single weights of convolutions and linear layers, those of least magnitude (Han et al. 2015, 1506.02626).

    Each removed weight is held at zero by a mask through all later steps; `bake` leaves ordinary tensors with exact zeros.
    Biases, norms and embeddings are never pruned. A weight that an earlier step removed counts as removed.

    Args:
        keep: share of the weights (of the blocks, with a block pattern) that stay, counted over all prunable layers or, with scope
            "layer", in each of them. The default of a tenth is what Han et al. reach without loss on LeNet and AlexNet after
            retraining. A mapping from paths of layers to shares prunes each of these to its own, and leaves all others whole, as the
            tables of the papers have it. An N:M pattern sets it to N/M.
        scope: "global" ranks all weights together, so that layers with small weights lose more; "layer" prunes each layer alike.
        rounds: how often to prune and tune in turn; removing little at a time loses less accuracy than everything at once.
        schedule: how the rounds share the work, see `keep_by_round`. With "one-shot" all is removed in the first round and the
            other rounds only tune, so that both can be compared at equal cost.
        tune: training after each round, such as "2ep"; None leaves the weights as they are.
        importance: which weights go first: `Magnitude()`, the absolute value (its order ranks single numbers alike), `Random()`, the
            baseline that any choice has to beat, or any object with a method `weights(model, task)`, see `ScoresWeights`.
        leave: paths of modules whose weights are not pruned, with all that is inside them.
        pattern: "" removes single weights. "1x8" or "8x1" removes whole blocks of outputs × inputs of the im2col matrix
            (outputs, inputs · kernel); a block's score is the sum over its weights, blocks at the edges are smaller. "2:4" keeps 2 of
            each 4 consecutive inputs, at each position of a kernel; an incomplete group keeps its proportion, rounded up. In a grouped
            convolution every group is a matrix of its own.
        repair: "obs" refits the weights that stay, without labels, so that every layer answers nearly as before (SparseGPT, Frantar &
            Alistarh 2023, 2301.00774). How many weights a layer keeps is then up to `importance` and `scope`, which ones to `obs_prune`.
        samples: inputs that "obs" calibrates on. 256 are plenty for convolutions, which see each sample at many positions; a linear
            layer wants several times as many as it has inputs that vary.
        damping: of "obs", see `obs_prune`; with few samples for many inputs more is better.

    Raises:
        SettingsError: for a wrong setting, a path in `leave` that the model doesn't have, one in `keep` that isn't a layer to prune, a
            model without prunable layers, a layer whose weight is computed from other parameters (weight_norm, spectral_norm), or an
            importance that leaves a weight out.
        WeightsError: if a weight is NaN.

    >>> import torch
    >>> from pared.core.rules import bake
    >>> task = Task(*[[(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))]] * 3)
    >>> small = bake(Weights(keep=0.25)(nn.Linear(8, 2), task))
    >>> int(small.weight.count_nonzero())
    4
    >>> small = bake(Weights(keep={"0": 0.25, "1": 1.0})(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 2)), task))
    >>> [int(layer.weight.count_nonzero()) for layer in small]
    [4, 4]
    >>> Weights(pattern="2:4").keep
    0.5
    """

    keep: float | Mapping[str, float] = _TENTH
    scope: Literal["global", "layer"] = "global"
    rounds: int = 1
    schedule: Literal["cubic", "one-shot"] = "cubic"
    tune: Train | None = None
    importance: AnyWeightImportance = field(default_factory=Magnitude)
    leave: tuple[str, ...] = ()
    pattern: str = ""
    repair: Literal["none", "obs"] = "none"
    samples: int = 256
    damping: float = 0.01

    def __post_init__(self) -> None:
        problems = Problems("prune.weights")
        shares = self.keep if isinstance(self.keep, Mapping) else {"": self.keep}
        for path, share in shares.items():
            problems.number(f"keep[{path!r}]" if path else "keep", share, low=0, high=1)
        problems.check(self.scope in ("global", "layer"), "scope", "global or layer", self.scope)
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.check(self.schedule in ("cubic", "one-shot"), "schedule", "cubic or one-shot", self.schedule)
        scores = _scores_weights(self.importance)
        problems.check(scores, "importance", "an importance that scores weights, such as Magnitude() or Random()", self.importance)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.check(self.repair in ("none", "obs"), "repair", "none or obs", self.repair)
        problems.number("samples", self.samples, low=1, integer=True)
        problems.number("damping", self.damping, above=0, high=1e6)
        pattern = Block()
        try:
            pattern = parse_pattern(self.pattern)
        except SettingsError as error:
            problems.found += error.problems
        if isinstance(pattern, NofM):
            rule = f"left out, because {self.pattern} keeps {pattern.share:g}"
            problems.check(self.keep in (_TENTH, pattern.share), "keep", rule, self.keep)
            object.__setattr__(self, "keep", pattern.share)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with masks on its weights, tuned after each round."""
        model = copy.deepcopy(model)
        if self.repair == "obs":
            model.to(task.machine.device)
        layers = compressible(model, self.leave, "prune.weights")
        for shares in self._by_round(layers):
            self._prune(model, task, layers, shares)
            if self.tune is not None:
                task.tune(model, self.tune)
        return model

    def _by_round(self, layers: Mapping[str, Layer]) -> list[float] | list[dict[str, float]]:
        """What stays after each round: of all layers, or of each by itself."""
        if not isinstance(self.keep, Mapping):
            return keep_by_round(self.keep, self.rounds, self.schedule)
        problems = Problems("prune.weights")
        for path in self.keep:
            problems.check(path in layers, "keep", f"of layers that are pruned ({', '.join(layers)})", path)
        problems.raise_if_any()
        rounds = {path: keep_by_round(self.keep.get(path, 1.0), self.rounds, self.schedule) for path in layers}
        return [{path: shares[done] for path, shares in rounds.items()} for done in range(self.rounds)]

    def _prune(self, model: nn.Module, task: Task, layers: Mapping[str, Layer], share: float | Mapping[str, float]) -> None:
        pattern = parse_pattern(self.pattern)
        pattern = pattern.on_the_way(share) if isinstance(pattern, NofM) and not isinstance(share, Mapping) else pattern
        scores = weight_scores(self.importance, model, task, layers)  # first: an importance with data moves the model to its device
        living = {path: alive(layer) for path, layer in layers.items()}
        parts = [({path: layers[path]}, kept) for path, kept in share.items()] if isinstance(share, Mapping) else [(layers, share)]
        masks: dict[str, Tensor] = {}
        for part, kept in parts:
            masks |= choose_weights(part, scores, living, kept, self.scope, pattern)
        if self.repair == "obs":
            prune_layers(model, task, layers, masks, pattern, self.samples, self.damping)
            return
        for path, mask in masks.items():
            set_mask(model, layers[path], mask)


def _scores_weights(importance: object) -> bool:
    return hasattr(importance, "weights") and not isinstance(importance, type)


def weight_scores(importance: AnyWeightImportance, model: nn.Module, task: Task, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The importance of every weight of `layers`, by their paths and in their shapes.

    Raises:
        SettingsError: if the importance leaves a layer out, or gives it a tensor of another shape.

    >>> import torch
    >>> layer, task = nn.Linear(2, 1), Task(*[[(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))]] * 3)
    >>> bool((weight_scores(Magnitude(), layer, task, {"": layer})[""] == layer.weight.abs()).all())
    True
    """
    if isinstance(importance, Magnitude):
        return {path: layer.weight.detach().abs() for path, layer in layers.items()}
    given = importance.weights(model, task)
    scores: dict[str, Tensor] = {}
    for path, layer in layers.items():
        names = [f"{owner}.{name}".lstrip(".") for owner, _, name in readers(model, layer)]
        masked = [f"{owner}.parametrizations.{name}.original".lstrip(".") for owner, _, name in readers(model, layer)]
        found = next((given[name] for name in (*names, *masked) if name in given), None)
        problem: Any = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
        problems = Problems("prune.weights")
        fits = found is not None and found.shape == layer.weight.shape
        problems.check(fits, "importance", f"one that scores {names[0]} of shape {tuple(layer.weight.shape)}", problem)
        problems.raise_if_any()
        assert found is not None
        scores[path] = found.detach().to(layer.weight.device)
    return scores
