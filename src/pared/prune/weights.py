"""Pruning of single weights by their size: masks while training, exact zeros afterwards."""

from __future__ import annotations

import copy
import decimal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.core.errors import SettingsError, WeightsError
from pared.core.problems import Problems
from pared.core.rules import Mask, add_rule, find_rule
from pared.prune.importance import Magnitude, Random
from pared.training import Task, Train

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def select(scores: Tensor, keep: float) -> Tensor:
    """Mark the `keep` share of the entries with the highest scores.

    Selection is by count, never by a threshold: exactly `keep * scores.numel()` entries, a half rounded up, are marked.
    Of equal scores those that stand first in the flattened tensor are kept, so the answer doesn't depend on a sorting routine.

    Args:
        scores: tensor of any shape.
        keep: share in [0, 1], taken as it is written in decimal (0.29 of 50 is 14.5, thus 15).

    Returns:
        Boolean tensor of the shape of `scores`, True where an entry stays.

    Raises:
        SettingsError: if `keep` is not in [0, 1].
        WeightsError: if a score is NaN.

    >>> select(torch.tensor([3.0, 1.0, 3.0, 2.0]), 0.5)
    tensor([ True, False,  True, False])
    """
    problems = Problems("prune.select")
    problems.number("keep", keep, low=0, high=1)
    problems.raise_if_any()
    return _highest(scores, _round_half_up(keep, scores.numel()))


def keep_by_round(keep: float, rounds: int, schedule: Literal["one-shot", "cubic"]) -> list[float]:
    """The share of weights left after each round of pruning; the last is `keep`.

    "cubic" removes much at first, while there is much to spare, and little at the end: after round t of n the share
    keep + (1 - keep)(1 - t/n)³ is left (Zhu & Gupta 2017, 1710.01878, equation 1). "one-shot" removes everything in the first round.

    >>> keep_by_round(0.2, 2, "cubic")
    [0.3, 0.2]
    """
    if schedule == "one-shot":
        return [keep] * rounds
    shares = [round(keep + (1 - keep) * (1 - done / rounds) ** 3, 12) for done in range(1, rounds)]
    return [*shares, keep]


@dataclass(frozen=True)
class Weights:
    """Remove single weights of convolutions and linear layers, those of least magnitude (Han et al. 2015, 1506.02626).

    Each removed weight is held at zero by a mask through all later steps; `bake` leaves ordinary tensors with exact zeros.
    Biases, norms and embeddings are never pruned. A weight that an earlier step removed counts as removed.

    Args:
        keep: share of the weights that stay, counted over all prunable layers or, with scope "layer", in each of them.
            The default of a tenth is what Han et al. reach without loss on LeNet and AlexNet after retraining.
        scope: "global" ranks all weights together, so that layers with small weights lose more; "layer" prunes each layer alike.
        rounds: how often to prune and tune in turn; removing little at a time loses less accuracy than everything at once.
        schedule: how the rounds share the work, see `keep_by_round`. With "one-shot" all is removed in the first round and the
            other rounds only tune, so that both can be compared at equal cost.
        tune: training after each round, such as "2ep"; None leaves the weights as they are.
        importance: which weights go first: `Magnitude()`, the absolute value (its order ranks single numbers alike), or `Random()`, the
            baseline that any choice has to beat.
        leave: paths of modules whose weights are not pruned, with all that is inside them.

    Raises:
        SettingsError: for a wrong setting, a path in `leave` that the model doesn't have, a model without prunable layers, or
            a layer whose weight is computed from other parameters (weight_norm, spectral_norm).
        WeightsError: if a weight is NaN.

    >>> from pared.core.rules import bake
    >>> task = Task(*[[(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))]] * 3)
    >>> small = bake(Weights(keep=0.25)(nn.Linear(8, 2), task))
    >>> int(small.weight.count_nonzero())
    4
    """

    keep: float = 0.1
    scope: Literal["global", "layer"] = "global"
    rounds: int = 1
    schedule: Literal["cubic", "one-shot"] = "cubic"
    tune: Train | None = None
    importance: Magnitude | Random = field(default_factory=Magnitude)
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("prune.weights")
        problems.number("keep", self.keep, low=0, high=1)
        problems.check(self.scope in ("global", "layer"), "scope", "global or layer", self.scope)
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.check(self.schedule in ("cubic", "one-shot"), "schedule", "cubic or one-shot", self.schedule)
        problems.check(isinstance(self.importance, Magnitude | Random), "importance", "Magnitude() or Random()", self.importance)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with masks on its weights, tuned after each round."""
        model = copy.deepcopy(model)
        layers = prunable(model, self.leave)
        for share in keep_by_round(self.keep, self.rounds, self.schedule):
            scores = self._scores(layers)
            alive = {path: _alive(layer) for path, layer in layers.items()}
            for path, mask in choose(scores, alive, share, self.scope).items():
                _set_mask(model, layers[path], mask)
            if self.tune is not None:
                task.tune(model, self.tune)
        return model

    def _scores(self, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        if isinstance(self.importance, Magnitude):
            return {path: layer.weight.detach().abs() for path, layer in layers.items()}
        generator = torch.Generator().manual_seed(self.importance.seed)  # anew in every round, so that what stays was to stay before
        return {path: torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device) for path, layer in layers.items()}


def choose(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], keep: float, scope: Literal["global", "layer"]) -> dict[str, Tensor]:
    """Choose the weights of several layers that stay, among those that are still alive.

    Args:
        scores: importance of each weight, by layer; higher is more important.
        alive: boolean tensors of the same shapes, False where a weight is already removed.
        keep: share of all weights (also the removed ones) that may stay.
        scope: rank all layers together ("global") or each by itself ("layer").

    Returns:
        Boolean tensors of the same shapes. Fewer than the share stay where fewer are alive.

    >>> both = torch.ones(2, dtype=torch.bool)
    >>> choose({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, {"a": both, "b": both}, 0.5, "global")
    {'a': tensor([False, False]), 'b': tensor([True, True])}
    """
    for path, score in scores.items():
        if score.isnan().any():
            raise WeightsError(f"{path}.weight contains NaN, so its weights can't be ranked. Train or load the model again.")
    ranked = {path: score.masked_fill(~alive[path], -torch.inf) for path, score in scores.items()}
    if scope == "layer":
        return {path: select(score, keep) & alive[path] for path, score in ranked.items()}
    device = next(iter(ranked.values())).device
    together = torch.cat([score.flatten().to(device) for score in ranked.values()])
    parts = select(together, keep).split([score.numel() for score in ranked.values()])
    return {path: part.view_as(score).to(score.device) & alive[path] for (path, score), part in zip(ranked.items(), parts, strict=True)}


def prunable(model: nn.Module, leave: tuple[str, ...] = ()) -> dict[str, Layer]:
    """The convolutions and linear layers of `model` by path, without those in `leave`; a shared weight is listed once.

    Raises:
        SettingsError: for an unknown path in `leave`, no layer at all, or a weight that is computed from other parameters.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    problems = Problems("prune.weights")
    for path in leave:
        problems.check(path in paths and path != "", "leave", "the path of a module of the model", path)
    problems.raise_if_any()
    left = {id(_stored(owner, name)) for path in leave for owner in paths[path].modules() for name in _weight_names(owner)}
    layers: dict[str, Layer] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, Layer) or any(path == name or path.startswith(f"{name}.") for name in leave):
            continue
        if _stored(layer, "weight") is None:
            raise SettingsError(
                f"prune.weights: {path}.weight is computed from other parameters (weight_norm, spectral_norm or the like) and can't be "
                f"masked. Take that off first (torch.nn.utils.parametrize.remove_parametrizations), or add it to leave: [{path}]."
            )
        if id(_stored(layer, "weight")) not in left:
            left.add(id(_stored(layer, "weight")))
            layers[path] = layer
    if not layers:
        raise SettingsError(f"prune.weights: {type(model).__name__} has no convolution or linear layer to prune.")
    return layers


def _highest(scores: Tensor, count: int) -> Tensor:
    if scores.isnan().any():
        raise WeightsError("scores contain NaN, so they can't be ranked.")
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)


def _round_half_up(share: float, total: int) -> int:
    # Decimal of the written number: in binary 0.29 * 50 is just below 14.5
    return int((decimal.Decimal(repr(float(share))) * total).to_integral_value(decimal.ROUND_HALF_UP))


def _weight_names(module: nn.Module) -> Iterator[str]:
    yield from module._parameters
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        yield from module.parametrizations


def _stored(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter behind `name`, or None if the tensor is computed from others by anything else than a mask."""
    if parametrize.is_parametrized(module, name):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        rules = module.parametrizations[name]
        own = all(isinstance(rule, Mask) for rule in rules) if isinstance(rules, parametrize.ParametrizationList) else False
        return rules.original if own and isinstance(rules.original, nn.Parameter) else None
    return module._parameters.get(name)


def _alive(layer: Layer) -> Tensor:
    mask = find_rule(layer, "weight", Mask)
    return mask.keep.clone() if isinstance(mask, Mask) else torch.ones_like(layer.weight, dtype=torch.bool)


def _set_mask(model: nn.Module, layer: Layer, keep: Tensor) -> None:
    """Put one mask on the weight wherever the model reads it, or narrow the mask that is there."""
    existing = find_rule(layer, "weight", Mask)
    if isinstance(existing, Mask):
        existing.keep &= keep
        return
    mask, parameter = Mask(keep), _stored(layer, "weight")
    readers = [(owner, name) for owner in model.modules() for name in list(owner._parameters) if owner._parameters[name] is parameter]
    for owner, name in readers:
        if not isinstance(owner, parametrize.ParametrizationList):
            add_rule(owner, name, mask)
