"""How each network is trained, pruned and clustered on each data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pared.architecture.nets import lenet5, lenet300
from pared.training import Train


@dataclass(frozen=True)
class Schedule:
    """Epochs, shares and bits.

    Args:
        build: the network.
        epochs: of the dense network, before anything is pruned.
        plan: training after each round of pruning; the dense network to compare with goes on by as many of them.
        rounds: in which the first of `keep` is reached; each further one takes a round more.
        keep: shares of each layer that are tried, each from the one before.
        bits: of linear layers and of convolutions, pairs that are tried.
        tune: training of the shared values.
        teach: share of the teacher in the loss of all training after the dense one; the teacher is the better dense network.
    """

    build: Callable[[], nn.Module]
    epochs: int
    plan: Train
    rounds: int
    keep: tuple[Mapping[str, float], ...]
    bits: tuple[tuple[int, int], ...]
    tune: Train
    teach: float = 0.7

    def taught(self, plan: Train) -> Train:
        """A plan of training with the teacher."""
        return dataclasses.replace(plan, teach=self.teach, temperature=2.0)


def fast_lenet5() -> nn.Module:
    """In the memory format in which its convolutions train in 60 % of the time."""
    return lenet5().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _plan(epochs: int) -> Train:
    return Train(epochs=epochs, weight_decay=1e-4, augment=False)


def _tune(epochs: int) -> Train:
    return Train(epochs=epochs, learning_rate=2e-4, augment=False)


# the paper's shares (1510.00149, tables 2 and 3) or, where 4 bits leave room for them, larger ones; and smaller ones for more bits
_KEEP_300 = ({"fc1": 0.1, "fc2": 0.12, "fc3": 0.3}, {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26})
_KEEP_5 = ({"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19}, {"conv1": 0.66, "conv2": 0.12, "fc1": 0.06, "fc2": 0.19})

SCHEDULES = {
    "lenet300 mnist-10k": Schedule(lenet300, 30, _plan(30), 5, _KEEP_300, ((4, 4), (5, 5)), _tune(10)),
    "lenet300 fashion-mnist": Schedule(lenet300, 8, _plan(8), 4, _KEEP_300, ((4, 4), (5, 5)), _tune(4)),
    "lenet5 mnist-10k": Schedule(fast_lenet5, 10, _plan(4), 4, _KEEP_5, ((4, 5), (4, 6), (5, 6), (5, 8)), _tune(2)),
    "lenet5 fashion-mnist": Schedule(fast_lenet5, 3, _plan(2), 3, _KEEP_5, ((4, 5), (4, 6), (5, 6), (5, 8)), _tune(1)),
}
