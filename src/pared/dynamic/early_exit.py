"""A network that stops when it is sure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn

from pared.core.errors import ModelError
from pared.dynamic.deploy import to_onnx
from pared.dynamic.thresholds import NEVER
from pared.graph import count
from pared.training import Task, evaluating, split_batch


class EarlyExit(nn.Module):
    """Consecutive stages with a classifier after each; in eval mode a sample leaves at the first classifier that is sure of it.

    In training mode the forward returns the logits of all exits, a list of tensors of shape (batch, classes). In eval mode it returns one
    tensor of that shape, in the order of the inputs: after each stage the samples whose highest softmax output reaches the exit's
    threshold leave, and the next stage is given only the others. Where nobody is left the rest of the network isn't run.

    Args:
        stages: the parts of a network; the first takes the inputs, each other one the activation before it.
        heads: as many classifiers, from the activation after their stage to logits; the last is often `nn.Identity()`.
        thresholds: one confidence for each head but the last; None: no sample leaves early.

    Raises:
        ModelError: if the numbers of stages, heads and thresholds don't fit.

    >>> network = EarlyExit([nn.Linear(4, 3), nn.Linear(3, 2)], [nn.Linear(3, 2), nn.Identity()])
    >>> len(network(torch.zeros(5, 4))), network.eval()(torch.zeros(5, 4)).shape
    (2, torch.Size([5, 2]))
    """

    thresholds: Tensor

    def __init__(self, stages: Sequence[nn.Module], heads: Sequence[nn.Module], thresholds: Tensor | None = None) -> None:
        super().__init__()
        if thresholds is None:
            thresholds = torch.full((max(0, len(stages) - 1),), NEVER)
        if not stages or len(heads) != len(stages) or thresholds.shape != (len(stages) - 1,):
            raise ModelError(
                f"a network with exits needs as many heads as stages and one threshold fewer. Got {len(stages)} stages, {len(heads)} heads "
                f"and thresholds of shape {tuple(thresholds.shape)}."
            )
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.register_buffer("thresholds", thresholds)

    def forward(self, *inputs: Tensor) -> Tensor | list[Tensor]:
        """All logits in training mode; in eval mode those at which each sample leaves.

        Raises:
            ModelError: when it is exported: which stages run depends on the sample. `to_onnx` writes such a network.
        """
        if torch.compiler.is_exporting() and not self.training:
            raise ModelError("a network with exits can't be cut any more: put the steps that remove neurons before dynamic.exits.")
        return self.all_logits(*inputs) if self.training else self.leave(*inputs)[0]

    def all_logits(self, *inputs: Tensor) -> list[Tensor]:
        """The logits of every exit for every sample, whatever the mode."""
        logits, activation = [], inputs
        for stage, head in zip(self.stages, self.heads, strict=True):
            activation = (stage(*activation),)
            logits.append(head(*activation))
        return logits

    def leave(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The logits at which each sample leaves, and the number of that exit (0 is the first), both in the order of the inputs."""
        activation = self.stages[0](*inputs)
        logits = self.heads[0](activation)
        exits = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        waiting = torch.arange(len(logits), device=logits.device)
        latest = logits
        for number, (stage, head) in enumerate(itertools.islice(zip(self.stages, self.heads, strict=True), 1, None), start=1):
            # not (sure) rather than (unsure): a sample whose logits are NaN goes on
            stays = ~(latest.softmax(1).amax(1) >= self.thresholds[number - 1])
            if not stays.any():
                break
            waiting, activation = waiting[stays], stage(activation[stays])
            latest = head(activation)
            logits = logits.index_copy(0, waiting, latest)
            exits = exits.index_fill(0, waiting, number)
        return logits, exits

    def to_onnx(self, example_inputs: tuple[Any, ...]) -> onnx.ModelProto:
        """The network as one ONNX model whose later stages stand in nested `If` nodes, see `pared.dynamic.deploy`."""
        return to_onnx(self, example_inputs)

    def exit_macs(self, *inputs: Tensor) -> list[int]:
        """The MACs that one sample costs which leaves at the first exit, the second, …: all stages and heads up to there."""
        total, costs, activation = 0, [], inputs
        with evaluating(self):
            for stage, head in zip(self.stages, self.heads, strict=True):
                total += count(stage, activation).macs
                activation = (stage(*activation),)
                total += count(head, activation).macs
                costs.append(total)
        return costs

    def mean_macs(self, task: Task, split: Literal["train", "valid", "test"] = "test") -> float:
        """The mean over the samples of a split of the MACs that were really computed for each."""
        self.to(task.machine.device)
        costs = torch.tensor(self.exit_macs(*task.example_inputs()), dtype=torch.float64)
        with evaluating(self):
            exits = [self.leave(*task.prepare(split_batch(batch, split)[0]))[1].cpu() for batch in getattr(task, split)]
        return costs[torch.cat(exits)].mean().item()
