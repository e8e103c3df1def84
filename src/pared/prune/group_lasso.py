"""Group lasso: training that lets whole neurons die, and then cuts them out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import Tensor, nn

from pared.core.layers import Layer, compressible
from pared.core.problems import Problems
from pared.graph.analysis import analyse
from pared.graph.capture import capture
from pared.graph.cutting import cut_model
from pared.graph.depth import shorten
from pared.graph.silence import silent_neurons
from pared.prune.groups import Groups, depth_groups, is_plain_convolution, neuron_groups, shape_groups
from pared.prune.masks import alive, set_mask
from pared.prune.proximal import Shrinkage, after_steps, require_steps, soft_threshold_factors
from pared.prune.silence import silent_blocks
from pared.training import Task, Train

Kind = Literal["filters", "channels", "shapes", "depth"]
KINDS = ("filters", "channels", "shapes", "depth")


@dataclass(frozen=True)
class GroupLasso:
    """Structured sparsity learning (Wen et al. 2016, 1608.03665): train on loss + strength · sum of the L2 norms of groups, then cut.

    The penalty is no term of the loss. After every step of the optimiser, in your own loop as well, each group is shortened by step
    size · strength, and one that isn't longer becomes zero (`group_soft_threshold`). So zeros are exact under momentum, weight decay
    and Adam, and no threshold is needed. The step size is `proximal.step_size`: that of the optimiser, at its present learning rate.

    A neuron's group reaches over all layers that are tied to it, and takes in its biases and the scale and shift of its batch norm; a
    neuron that is dead therefore emits zero, and removing it changes nothing. How many neurons stay is decided by the training. A class
    that dies as a whole keeps one neuron. As in the paper all norms count alike; `by_size` is Yuan & Lin's (2006) penalty instead.

    Args:
        strength: λ of the penalty. A group of weights dies where the loss pulls at it by less than this, if the training is long enough.
            0.005 is the paper's for LeNet, with SGD. With Adam what counts is strength · the sum of all learning rates, as that is what
            a group is shortened by in all: about the norm of a neuron's weights should be in reach.
        groups: any of
            "filters": all weights that compute a neuron (rows);
            "channels": all weights that read a neuron (columns); with "filters" the two are one group, that of the tied neuron;
            "shapes": the columns W[:, c, m, k] of convolutions. Dead ones are held at zero by a mask, as no dense engine can leave them
            out, unless a whole input channel is dead, which is cut;
            "depth": all weights of the branch of a residual block. Where they die the block is removed.
        by_size: multiply every norm by the root of how many weights the group has. One strength then presses large filters as much as small
            ones, weight by weight; without, layers of small filters die first. A strength of 0.001 is 0.03 for a group of 900 weights.
        train: the training with the penalty. By default SGD with momentum at the paper's rate, which gives `strength` its unit. Early
            stopping is refused: it would go back to weights before the groups died.
        tune: training after the cut, without penalty ("2ep" or a plan); None leaves the weights as they are.
        leave: module paths whose neurons and shapes aren't penalised.

    Raises:
        SettingsError: if a setting is out of range or a path names no module.
        TrainingError: if a loop of your own takes no step with a PyTorch optimiser on the model's own parameters.

    >>> GroupLasso(groups=("filters", "channels"), train="30ep", tune="5ep").train.epochs
    30
    """

    strength: float = 0.005
    groups: tuple[Kind, ...] = ("filters",)
    by_size: bool = False
    train: Train = field(default_factory=partial(Train, optimizer="sgd", learning_rate=0.01))
    tune: Train | None = None
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("prune.group_lasso")
        problems.number("strength", self.strength, low=0, high=1e6)
        listed = not isinstance(self.groups, str) and len(self.groups) > 0 and all(kind in KINDS for kind in self.groups)
        problems.check(listed, "groups", f"one or more of {', '.join(KINDS)}", self.groups)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.check(isinstance(self.by_size, bool), "by_size", "true or false", self.by_size)
        train = Train.parse(self.train)
        problems.check(train.early_stop is None, "train", "a plan without early_stop", train)
        problems.raise_if_any()
        object.__setattr__(self, "groups", tuple(kind for kind in KINDS if kind in self.groups))
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model`, trained with the penalty, without its dead neurons."""
        shrunk = copy.deepcopy(model).to(task.machine.device)
        self.shrink(shrunk, task)
        result = self.cut(shrunk, task)
        if self.tune is not None:
            task.tune(result, self.tune)
        return result

    def shrink(self, model: nn.Module, task: Task) -> None:
        """Train `model` in place with the penalty, on the task's device; nothing is cut."""
        model.to(task.machine.device)
        found = self.find(model, task) if self.strength > 0 else []
        shrinkages = [Shrinkage(groups.lead, _Shorten(groups, self.strength * groups.sizes() ** (0.5 * self.by_size))) for groups in found]
        with after_steps(shrinkages) as steps:
            task.tune(model, self.train)
        if shrinkages:
            require_steps("prune.group_lasso", steps, self.train, task)

    def cut(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` without what is dead in it; the answers stay the same, and nothing is trained."""
        model = copy.deepcopy(model).to(task.machine.device)
        self._mask_shapes(model)
        example = task.example_inputs()
        if "depth" in self.groups:
            model = shorten(model, example, silent_blocks).model
        return cut_model(model, example, silent_neurons, self.leave).model

    def find(self, model: nn.Module, task: Task) -> list[Groups]:
        """The groups of `model` in the order in which they are shortened: the inner before those that contain them."""
        analysis = analyse(capture(model.to(task.machine.device), task.example_inputs()), self.leave)
        found = shape_groups(self._convolutions(model)) if "shapes" in self.groups else []
        if "filters" in self.groups or "channels" in self.groups:
            found += neuron_groups(analysis, filters="filters" in self.groups, channels="channels" in self.groups)
        if "depth" in self.groups:
            found += depth_groups(analysis.captured)
        return found

    def _convolutions(self, model: nn.Module) -> Mapping[str, Layer]:
        layers = compressible(model, self.leave, "prune.group_lasso")
        return {path: layer for path, layer in layers.items() if is_plain_convolution(layer)}

    def _mask_shapes(self, model: nn.Module) -> None:
        if "shapes" in self.groups:
            for layer in self._convolutions(model).values():
                dead = (layer.weight.detach() == 0).all(dim=0, keepdim=True).expand_as(layer.weight)
                if dead.any():
                    set_mask(model, layer, alive(layer) & ~dead)


@dataclass(frozen=True)
class _Shorten:
    """Group soft-thresholding of groups by step size · strength, which is a number for every group."""

    groups: Groups
    strength: Tensor

    def __call__(self, step: float) -> None:
        self.groups.scale(soft_threshold_factors(self.groups.norms(), step * self.strength))
