"""torch-pruning's group-norm pruner with sparse learning, set up as its own benchmark on CIFAR does."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pared.core.errors import ModelError
from pared.core.problems import Problems
from pared.graph import count
from pared.lab.against_group_norm.arms import fast
from pared.training import Task, Train

STEPS = 400
"""Into which its benchmark divides the way to a network without neurons; it stops at the first that is small enough."""


@dataclass(frozen=True)
class GroupNorm:
    """Sparse learning, then pruning by the norm of groups, over all groups at once (Fang et al. 2023, 2301.12900).

    While learning, the gradient of every weight of a group is given strength · γ · weight more, where γ grows from 1 for the group's
    strongest channel to 16 for its weakest. Then the channels of least norm go, one four-hundredth at a time, until few enough
    multiply-adds are left; the last layer stays. Fine-tuning is up to the caller.

    Args:
        train: the sparse learning; its weight decay should be 0, as the penalty takes its place. None leaves it out.
        strength: of the penalty; 5e-4 is the benchmark's for a ResNet-56.
        normalizer: what norms are divided by in every group: "max" is the benchmark's with sparse learning, "mean" without.

    Raises:
        SettingsError: if a setting is out of range.
        ModelError: if torch-pruning isn't installed (when it is called).

    >>> GroupNorm(strength=1e-4).normalizer
    'max'
    """

    train: Train | None = field(default_factory=partial(Train, optimizer="sgd", learning_rate=0.01))
    strength: float = 5e-4
    normalizer: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        problems = Problems("lab.against_group_norm")
        problems.number("strength", self.strength, low=0, high=1e6)
        problems.check(self.normalizer in ("max", "mean"), "normalizer", "max or mean", self.normalizer)
        problems.raise_if_any()

    def learn(self, model: nn.Module, task: Task) -> nn.Module:
        """A copy of `model` after sparse learning."""
        model = copy.deepcopy(model)
        if self.train is not None:
            pruner = self._pruner(model, task)
            with before_steps(model, pruner):
                task.tune(model, self.train)
        return model

    def cut(self, model: nn.Module, task: Task, keep: float) -> nn.Module:
        """A copy of `model` with at most the share `keep` of its multiply-adds.

        Raises:
            ModelError: if that can't be reached.
        """
        tp, model = torch_pruning(), copy.deepcopy(model).eval()
        pruner, example = self._pruner(model, task), task.example_inputs()
        whole, target = self._macs(tp, model, example), keep * count(model, example).macs
        for _ in range(STEPS):
            pruner.step()
            # its counter is quick and differs by about a percent; the one that both tools are held to decides
            if self._macs(tp, model, example) <= 1.05 * keep * whole and count(model, example).macs <= target:
                return fast(model)
        raise ModelError(f"lab.against_group_norm: torch-pruning didn't reach {keep:.3g} of the multiply-adds in {STEPS} steps.")

    def _pruner(self, model: nn.Module, task: Task) -> Any:
        tp = torch_pruning()
        return tp.pruner.GroupNormPruner(
            model,
            task.example_inputs(1)[0],
            importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer=self.normalizer),
            reg=self.strength,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[[layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]],
        )

    def _macs(self, tp: Any, model: nn.Module, example: tuple[Any, ...]) -> float:
        return tp.utils.count_ops_and_params(model, example[0][:1])[0]


def torch_pruning() -> Any:
    """The package.

    Raises:
        ModelError: if it isn't installed.
    """
    try:
        import torch_pruning
    except ImportError:
        advice = "pip install torch-pruning"
        raise ModelError(f"lab.against_group_norm compares with torch-pruning, which isn't installed: {advice}") from None
    return torch_pruning


@contextlib.contextmanager
def before_steps(model: nn.Module, pruner: Any) -> Iterator[None]:
    """Let `pruner` add its penalty to the gradients before every step of an optimiser that holds the weights of `model`."""
    own = {id(parameter) for parameter in model.parameters()}

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            pruner.regularize(model)

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def obstacle(model: nn.Module, task: Task, keep: float) -> str:
    """What keeps torch-pruning from cutting `model`: the kind of the error, or nothing."""
    try:
        GroupNorm().cut(model, task, keep)
    except RuntimeError as error:  # the network that it leaves doesn't run
        return type(error).__name__
    return ""
