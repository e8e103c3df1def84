"""How long and how a network is trained."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from pared.core.problems import Problems
from pared.core.units import Epochs

if TYPE_CHECKING:
    from pared.training.task import Task

Schedule = Literal["cosine", "linear", "step", "constant"]


@dataclass(frozen=True)
class Train:
    """A plan of training, and the method that carries it out on a copy of a network.

    The defaults suit small image classifiers at batches of about 128: Adam needs no tuning there. The classic plan for
    residual networks is `Train(epochs=160, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, warmup=1)`.

    Args:
        epochs: passes over the training data. 8 is where LeNet-5 on Fashion-MNIST flattens out.
        optimizer: "adam", "adamw" (decoupled weight decay) or "sgd" (with Nesterov momentum).
        learning_rate: the highest that the schedule reaches.
        momentum: of "sgd"; the other optimizers keep their usual betas.
        weight_decay: never applied to parameters with fewer than two axes (biases, scales of normalisation).
        warmup: epochs, also a fraction of one, in which the learning rate climbs linearly from 0.
        schedule: "cosine" or "linear" to 0, "step" (a tenth after half, a hundredth after three quarters), "constant".
        label_smoothing: share of the probability spread over all classes; needs the task's default loss.
        early_stop: stop after this many epochs without a better value on the validation split, and go back to the best
            weights. None: all epochs, last weights.
        augment: False leaves the task's augmentation out.
        teach: share of the teacher's answers in the loss, the rest is the labels': any method that trains with a plan is taught so. It
            needs a task with a teacher, which a recipe sets, and a method that brings no loss of its own. 0: labels only. 0.9 is what
            `distill.Teach` takes.
        temperature: of the teacher's answers, as in `distill.Teach`; without teach it means nothing.

    Raises:
        SettingsError: naming every field that is out of its range.

    >>> Train.parse("2ep").epochs
    2
    """

    epochs: int = 8
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: float = 0.0
    schedule: Schedule = "cosine"
    label_smoothing: float = 0.0
    early_stop: int | None = None
    augment: bool = True
    teach: float = 0.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        problems = Problems("train")
        problems.number("epochs", self.epochs, low=0, integer=True)
        problems.check(self.optimizer in ("adam", "adamw", "sgd"), "optimizer", "adam, adamw or sgd", self.optimizer)
        problems.number("learning_rate", self.learning_rate, above=0, high=1e6)
        problems.number("momentum", self.momentum, low=0, high=1)
        problems.number("weight_decay", self.weight_decay, low=0, high=1e6)
        problems.number("warmup", self.warmup, low=0, high=1e6)
        schedules = ("cosine", "linear", "step", "constant")
        problems.check(self.schedule in schedules, "schedule", "cosine, linear, step or constant", self.schedule)
        problems.number("label_smoothing", self.label_smoothing, low=0, high=1)
        if self.early_stop is not None:
            problems.number("early_stop", self.early_stop, low=1, integer=True)
        problems.check(isinstance(self.augment, bool), "augment", "true or false", self.augment)
        problems.number("teach", self.teach, low=0, high=1)
        problems.number("temperature", self.temperature, above=0, high=1e6)
        problems.check(not (self.teach and self.label_smoothing), "label_smoothing", "0 where teach isn't", self.label_smoothing)
        problems.raise_if_any()

    @classmethod
    def parse(cls, text: str | int | Epochs | Train) -> Train:
        """Accept "2ep", 2 or a plan; all other settings are the defaults."""
        return text if isinstance(text, Train) else cls(epochs=Epochs.parse(text).count)

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Train a copy of `model` with the task's fit and return it."""
        trained = copy.deepcopy(model)
        task.tune(trained, self)
        return trained


def learning_rate_factor(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """What the learning rate is multiplied by at an optimizer step.

    Args:
        step: 0 for the first step.
        total: steps of the whole training.
        warmup: steps of linear climb; the first already has 1/warmup, so that no step is lost.
        schedule: shape of the rest.

    >>> [round(learning_rate_factor(step, 4, 0, "cosine"), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if schedule == "linear":
        return 1 - done
    if schedule == "step":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    return 1.0


def make_optimizer(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The plan's optimizer over the parameters that want a gradient; there must be at least one."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, nesterov=train.momentum > 0)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    on_cpu = all(parameter.device.type == "cpu" for parameter in trainable)
    # fused: a step passes over the weights once instead of ten times; on a GPU PyTorch's default is as good
    return kind(groups, lr=train.learning_rate, fused=True if on_cpu else None)
