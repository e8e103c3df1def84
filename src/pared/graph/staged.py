"""The shape of a network that is made of consecutive parts and can stop after each of them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Staged(Protocol):
    """A network of consecutive stages with a classifier after each: `logits_k = heads[k](stages[k](… stages[0](x)))`.

    Attributes:
        stages: the parts of the network, in order.
        heads: one classifier for each stage; the last is that of the whole network.
        thresholds: the confidence from which a sample leaves at a head, for every head but the last.
    """

    stages: nn.ModuleList
    heads: nn.ModuleList
    thresholds: Tensor
