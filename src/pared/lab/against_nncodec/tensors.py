"""The integers that are packed: weights of EfficientNet-Lite0 at three steps, and of pruned and clustered networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pared import data
from pared.architecture.nets import lenet5, resnet20
from pared.core.rules import bake
from pared.core.seeds import seed_everything
from pared.lab.repair_without_labels.networks import efficientnet
from pared.prune import Weights
from pared.quantize import Clusters
from pared.training import Task, Train

Integers = dict[str, np.ndarray]


def step(qp: int) -> float:
    """The distance of levels that nncodec has at a quantisation parameter: it doubles every four.

    >>> step(0), step(-32), step(-38)
    (1.0, 0.00390625, 0.00146484375)
    """
    return (4 + (qp & 3)) / 4 * 2.0 ** (qp >> 2)


def levels(model: nn.Module, distance: float) -> Integers:
    """Weights of more than one axis, divided by a step and rounded to the nearest integer."""
    return {name: np.rint(weight / distance).astype(np.float32) + np.float32(0) for name, weight in _weights(model)}  # no minus zeros


def ranks(model: nn.Module) -> Integers:
    """Weights of few values as the places of these in order, counted from zero's.

    >>> layer = nn.Linear(2, 2)
    >>> layer.weight = nn.Parameter(torch.tensor([[0.0, -0.3], [0.2, 0.7]]))
    >>> ranks(layer)["weight"].tolist()
    [[0.0, -1.0], [1.0, 2.0]]
    """
    found = {}
    for name, weight in _weights(model):
        table = np.unique(np.append(weight, 0))
        found[name] = (np.searchsorted(table, weight) - np.searchsorted(table, 0)).astype(np.float32)
    return found


def _weights(model: nn.Module) -> list[tuple[str, np.ndarray]]:
    return [(name, tensor.detach().double().numpy()) for name, tensor in model.state_dict().items() if tensor.dim() > 1]


def clustered(build: Callable[[], nn.Module], keep: float, epochs: int, seed: int) -> nn.Module:
    """A network trained on the digits, pruned by magnitude in four rounds and clustered to 32 values a layer (256 in convolutions)."""
    seed_everything(seed)
    torch.set_num_threads(1)
    task = _enlarged(data.load("digits", seed))
    network = build()
    task.tune(network, Train(epochs=epochs))
    network = Weights(keep=keep, rounds=4, tune=Train(epochs=max(epochs // 4, 1)))(network, task)
    return bake(Clusters(bits=5, convolution_bits=8, tune=Train(epochs=1, learning_rate=1e-4))(network, task))


def _enlarged(task: Task) -> Task:
    """Digits of 28 x 28 pixels, which the networks are made for, from those of 8 x 8."""

    def part(batches: Iterable[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(functional.interpolate(inputs, size=28, mode="bilinear"), targets) for inputs, targets in batches]

    return dataclasses.replace(task, train=part(task.train), valid=part(task.valid), test=part(task.test))


def _lite0(qp: int) -> Callable[[int, int], Integers]:
    return lambda epochs, seed: levels(efficientnet().model, step(qp))


SETS: Mapping[str, Callable[[int, int], Integers]] = {
    "EfficientNet-Lite0, qp -38": _lite0(-38),
    "EfficientNet-Lite0, qp -32": _lite0(-32),
    "EfficientNet-Lite0, qp -26": _lite0(-26),
    "LeNet-5, 8 %, clustered": lambda epochs, seed: ranks(clustered(lenet5, 0.08, epochs, seed)),
    "ResNet-20, 20 %, clustered": lambda epochs, seed: ranks(clustered(lambda: resnet20(channels=1, size=28), 0.2, epochs, seed)),
}
"""By name: (epochs, seed) -> integers by the name of their tensor."""
