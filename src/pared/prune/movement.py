"""Movement pruning: what stays is learnt while training, by where the weights want to go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pared.core.layers import compressible
from pared.core.problems import Problems
from pared.core.rules import Mask
from pared.prune.masks import alive, set_mask, swap_rule
from pared.prune.selection import Scope, choose, cubic
from pared.prune.training_masks import Clock, tune_with
from pared.training import Task, Train


class Scored(Mask):
    """A mask with a trainable score for each weight, which gets the gradient that a factor on the weight would get.

    The gradient of a score is that of the masked weight times the weight (straight through the choice of the highest). The scores
    are flat: training plans apply no weight decay to parameters with a single axis.

    Args:
        keep: boolean tensor of the weight's shape.
        like: gives device and dtype.

    >>> rule = Scored(torch.tensor([True, False]), torch.zeros(2))
    >>> rule(torch.tensor([2.0, 3.0])).sum().backward()
    >>> rule.scores.grad.tolist()
    [2.0, 3.0]
    """

    def __init__(self, keep: Tensor, like: Tensor) -> None:
        super().__init__(keep)
        self.scores = nn.Parameter(torch.zeros(keep.numel(), dtype=like.dtype, device=like.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight; the second part is zero and only carries the gradient of the scores."""
        masked = super().forward(weight)
        if not torch.is_grad_enabled():
            return masked
        return masked + weight.detach() * (self.scores - self.scores.detach()).view_as(weight)


@dataclass(frozen=True)
class Movement:
    """Train a network and remove on the way the weights that move towards zero (Sanh et al. 2020, 2005.07683).

    Every weight gets a score that falls while the weight is pulled to zero, also while it is masked. The highest scores stay, counted
    anew at every batch; removed weights keep their value and may come back. What stays falls from all to `keep` along a cubic curve
    (equation 1 of Zhu & Gupta 2017, 1710.01878). The scores are trained by the plan's optimiser together with the weights and without
    weight decay, and are gone afterwards: an ordinary mask is left.

    It is made for fine-tuning, where weights hardly change their size, so that size says little about what the new task needs.

    Args:
        keep: share of the weights that stay, exactly, counted as in `Weights`.
        train: the training, in one piece. Early stopping is refused: it would go back to a network with too many weights.
        scope: "global" ranks all weights together, "layer" prunes each layer alike.
        begin: the part of the training before the first weight goes; scores begin at zero and first have to say something.
        end: the part of the training after which `keep` is reached, and the network only heals.
        leave: paths of modules whose weights are not pruned.

    Raises:
        SettingsError: for a wrong setting, a path that the model doesn't have, or a model without prunable layers.

    >>> from pared.core.rules import bake
    >>> task = Task(*[[(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))] * 4] * 3)
    >>> small = bake(Movement(keep=0.25, train="1ep")(nn.Linear(8, 2), task))
    >>> int(small.weight.count_nonzero())
    4
    """

    keep: float = 0.1
    train: Train = field(default_factory=partial(Train, epochs=5))
    scope: Scope = "global"
    begin: float = 0.1
    end: float = 0.75
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", Train.parse(self.train))
        problems = Problems("prune.movement")
        problems.number("keep", self.keep, low=0, high=1)
        problems.number("train.epochs", self.train.epochs, low=1, integer=True)
        problems.check(self.train.early_stop is None, "train.early_stop", "empty", self.train.early_stop)
        problems.check(self.scope in ("global", "layer"), "scope", "global or layer", self.scope)
        problems.number("begin", self.begin, low=0, high=1)
        problems.number("end", self.end, above=0, high=1)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        if not problems.found:
            problems.check(self.begin < self.end, "begin", f"less than end ({self.end:g})", self.begin)
        problems.raise_if_any()
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a trained copy of `model` with masks on its weights."""
        model = copy.deepcopy(model)
        layers = compressible(model, self.leave, "prune.movement")
        living = {path: alive(layer) for path, layer in layers.items()}
        rules: dict[str, Scored] = {}
        for path, layer in layers.items():
            mask = set_mask(model, layer, living[path])
            rules[path] = Scored(mask.keep, layer.weight)
            swap_rule(model, mask, rules[path])

        def remove(share: float) -> None:
            device = next(iter(rules.values())).keep.device
            scores = {path: rule.scores.detach().view(rule.keep.shape) for path, rule in rules.items()}
            masks = choose(scores, {path: each.to(device) for path, each in living.items()}, share, self.scope)
            for path, rule in rules.items():
                rule.keep = masks[path]

        def step(clock: Clock, loss: Callable[[], Tensor]) -> Tensor:
            remove(cubic(self.keep, (clock.progress - self.begin) / (self.end - self.begin)))
            return loss()

        tune_with(model, task, self.train, step)
        remove(self.keep)  # by the last scores, and also where a loop was shorter than planned
        for rule in rules.values():
            swap_rule(model, rule, Mask(rule.keep))
        return model
