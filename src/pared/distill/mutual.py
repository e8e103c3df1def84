"""Deep mutual learning: networks that learn together and from each other."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.core.problems import Problems
from pared.training import Objective, Task, Train
from pared.training.check import run
from pared.training.fit import output_loss
from pared.training.fresh import reinitialize
from pared.training.teaching import Lesson


class Peers(nn.Module):
    """Networks that are trained together; it answers as the first."""

    def __init__(self, peers: list[nn.Module]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)

    def forward(self, *inputs: Tensor) -> Any:
        """What the first says."""
        return self.peers[0](*inputs)


@dataclass(frozen=True)
class Mutual:
    """Train a network along with peers, each taught by what all others say at the moment (Zhang et al. 2018, 1706.00384).

    The loss is the sum over networks of (1 - weight) · task.loss(labels) + weight · mean over the others of T² · KL(other || this one). No
    teacher is needed. All learn at the same time from one forward pass (the paper's takes turns). The network comes back alone.

    Args:
        peers: how many networks besides the one given; they have its architecture, with new random weights. 1 is the paper's.
        weight: share of the others. 0.5 is the paper's loss, at twice its learning rate.
        temperature: T. 1 is the paper's.
        train: the training plan.
        others: networks to learn along with instead; copied. Not to be written in a recipe file.

    Raises:
        SettingsError: for a wrong setting.
        DataError: without labels, and without a teacher in their place.

    >>> batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    >>> Mutual(train=Train(epochs=1))(nn.Linear(4, 3), Task(batches, batches, batches)).out_features
    3
    """

    peers: int = 1
    weight: float = 0.5
    temperature: float = 1.0
    train: Train = field(default_factory=partial(Train, epochs=8))
    others: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("distill.mutual")
        problems.number("peers", self.peers, low=1, high=1000, integer=True)
        problems.number("weight", self.weight, low=0, high=1)
        problems.number("temperature", self.temperature, above=0, high=1e6)
        fine = isinstance(self.others, list | tuple) and all(isinstance(each, nn.Module) for each in self.others)
        problems.check(fine, "others", "a list of networks", self.others)
        plan = Train.parse(self.train)
        problems.check(not plan.label_smoothing, "train", "a plan without label_smoothing", self.train)
        problems.raise_if_any()
        object.__setattr__(self, "train", plan)
        object.__setattr__(self, "others", tuple(self.others))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model`, trained."""
        others = [copy.deepcopy(each) for each in self.others] or [copy.deepcopy(model) for _ in range(self.peers)]
        if not self.others:
            for each in others:
                reinitialize(each)
        together = Peers([copy.deepcopy(model), *others])
        task.tune(together, dataclasses.replace(self.train, teach=0.0), self._objective(task))  # the objective teaches by itself
        return together.peers[0]

    def _objective(self, task: Task) -> Objective:
        loss_of = output_loss(task, self.train)
        response = Lesson(task, self.temperature, 1.0)

        def objective(model: nn.Module, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
            assert isinstance(model, Peers)
            loss = loss_of(inputs, targets)
            said = [run(peer, inputs) for peer in model.peers]
            heard = [pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, _last(each)) for each in said]
            losses = []
            for at, outputs in enumerate(said):
                exits = outputs if isinstance(outputs, list) else [outputs]
                labels = torch.stack([loss(each) for each in exits]).mean()
                others = torch.stack([response(outputs, each, targets) for number, each in enumerate(heard) if number != at]).mean()
                losses.append((1 - self.weight) * labels + self.weight * others)
            return torch.stack(losses).sum()

        return objective


def _last(outputs: Any) -> Any:
    """Of a network with exits the last one speaks."""
    return outputs[-1] if isinstance(outputs, list) else outputs
