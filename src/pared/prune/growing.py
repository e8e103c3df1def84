"""Growing regularisation: neurons that are to go are pressed to zero little by little, and then cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor, nn

from pared.core.problems import Problems
from pared.graph.analysis import Analysis, analyse
from pared.graph.axes import neuron_axes
from pared.graph.capture import capture
from pared.graph.cutting import cut_model, follow
from pared.prune.groups import Groups, Part, along
from pared.prune.importance import AnyImportance, Magnitude, Scores
from pared.prune.importance.protocol import scores_of
from pared.prune.proximal import Shrinkage, after_steps, require_steps
from pared.prune.training_masks import Clock, tune_with
from pared.training import Task, Train


def growing_penalty(progress: float, ceiling: float, growing: float) -> float:
    """The penalty when the part `progress` of the training is done: a straight line from 0 to `ceiling`, then level.

    >>> [growing_penalty(progress, 1.0, 0.5) for progress in (0.0, 0.25, 0.5, 0.9)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return ceiling * min(1.0, progress / growing)


@dataclass(frozen=True)
class GrowingRegularization:
    """Press the least important neurons to zero by a penalty that grows, then cut them (GReg-1, Wang et al. 2021, 2012.09243, section 3.2).

    Which neurons go is settled before the training: the share `keep` of every class stays. While training, penalty/2 · the squares of
    the weights that compute the others (with bias, and scale and shift of batch norm) is added to the objective, and the penalty
    climbs from 0 to `ceiling`. The rest of the network takes over meanwhile, so that less is lost than by removing the same neurons at
    once. The penalty is applied after each step of the optimiser, as a division by 1 + step size · penalty: it can't overshoot, is
    the same under any optimiser, and works in your own loop.

    Args:
        keep: the share of neurons that stays in every class; at 1 there is nothing to do, so only `tune` trains.
        importance: which neurons go. The paper ranks filters by their L1 norm, as `Magnitude(order=1)`.
        ceiling: the highest penalty. 1 is the paper's.
        growing: the part of the training in which the penalty climbs; in the rest it stays at the ceiling and the network settles. The
            paper adds 0.0001 every 5 steps, 50,000 steps in all, and settles for 40,000; the default is about that share, for any length.
        train: the training with the penalty. SGD by default, at a constant rate as in the paper (0.001 there, for ImageNet). Early
            stopping is refused: it would go back to weights before the penalty.
        tune: training after the cut ("2ep" or a plan); None leaves the weights as they are.
        round_to: round what stays to the nearest multiple, where the class is larger than that; 8 as in `Neurons`.
        leave: module paths whose outputs keep their width.

    Raises:
        SettingsError: if a setting is out of range or a path names no module.
        TrainingError: if a loop of your own takes no step with a PyTorch optimiser on the model's own parameters.

    >>> GrowingRegularization(keep=0.3, tune="2ep").tune.epochs
    2
    """

    keep: float = 0.5
    importance: AnyImportance = field(default_factory=partial(Magnitude, order=1))
    ceiling: float = 1.0
    growing: float = 0.6
    train: Train = field(default_factory=partial(Train, optimizer="sgd", learning_rate=0.01, schedule="constant"))
    tune: Train | None = None
    round_to: int = 8
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("prune.growing_regularization")
        problems.number("keep", self.keep, low=0, high=1)
        problems.check(callable(self.importance), "importance", "an importance such as Magnitude()", self.importance)
        problems.number("ceiling", self.ceiling, low=0, high=1e6)
        problems.number("growing", self.growing, above=0, high=1)
        problems.number("round_to", self.round_to, low=1, integer=True)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        train = Train.parse(self.train)
        problems.check(train.early_stop is None, "train", "a plan without early_stop", train)
        problems.raise_if_any()
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a smaller copy of `model`."""
        model, example = copy.deepcopy(model).to(task.machine.device), task.example_inputs()
        analysis = analyse(capture(model, example), self.leave)
        choice = _Choice(scores_of(self.importance, analysis, task), self.keep, self.round_to)
        groups = chosen_groups(analysis, choice)
        if groups is not None:
            self._train(model, task, groups)
        result = cut_model(model, example, choice, self.leave).model
        if self.tune is not None:
            task.tune(result, self.tune)
        return result

    def _train(self, model: nn.Module, task: Task, groups: Groups) -> None:
        penalty = [0.0]

        def step(clock: Clock, loss: Callable[[], Tensor]) -> Tensor:
            penalty[0] = growing_penalty(clock.progress, self.ceiling, self.growing)
            return loss()

        def press(size: float) -> None:
            groups.scale(groups.lead.detach().new_full((groups.count,), 1 / (1 + size * penalty[0])))

        with after_steps([Shrinkage(groups.lead, press)]) as steps:
            tune_with(model, task, self.train, step)
        require_steps("prune.growing_regularization", steps, self.train, task)


@dataclass(frozen=True)
class _Choice:
    """The neurons of lowest score of every class; asked again, with the same scores, it chooses the same."""

    scores: Scores
    keep: float
    round_to: int

    def __call__(self, analysis: Analysis) -> list[int]:
        scores = self.scores.copy()
        scores[analysis.frozen] = np.inf
        exact = [found for found in analysis.classes if not analysis.inexact(np.array(found.neurons))]
        return [neuron for found in exact for neuron in found.choose(scores, self.keep, self.round_to)]


def chosen_groups(analysis: Analysis, choose: _Choice) -> Groups | None:
    """The weights that compute the neurons that a cut would remove, as one group; None if it would remove none."""
    plan, _ = follow(analysis, choose)
    parts = []
    for axis in neuron_axes(analysis):
        stays = plan.keep[plan.root[axis.roots]]
        if axis.computes and axis.plain and not stays.all() and axis.parameter.requires_grad:
            parts.append(Part(axis.parameter, along(stays.astype(np.int64), axis)))
    return Groups(1, tuple(parts)) if parts else None
