"""The loss of rate-aware training: what the network gets wrong, and what its packed file costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.codec import mixing
from pared.core.errors import ModelError
from pared.core.rules import bake
from pared.graph import Staged
from pared.graph.analysis import Analysis, analyse
from pared.graph.capture import capture
from pared.graph.constants import Constant, constant_inputs
from pared.graph.fold import read
from pared.quantize.rate_grid import Charged, RateGrid, levels_of, rate_grids
from pared.training import Objective, Task

EVERY = 40
"""Steps between two looks at the costs: a level moves by 40 learning rates of its own at most, far less than the half that rounds away."""

_LOOKS = 16  # refreshes between two looks at which columns are neighbours
_HEADER = 10  # bytes around the code of a tensor: kind, step, neighbours, length
_SETTLED = 0.6  # the share of the training after which a wanted size should be reached
_AIM = 0.95  # what is aimed at, as a share of the wanted size
_AHEAD = 0.05  # the share of the training in which what is still too large is to go
_GAIN = 16.0  # by how much the logarithm of the price would grow in the whole training if nothing else moved
_HIGHEST = 1e-2
_PRICE, _CORRECTION, _SIZE, _TREND = range(4)


@dataclass(frozen=True)
class Pricing:
    """What bits cost while the training goes on.

    Attributes:
        price: loss for each bit; where a size is wanted, what is begun with.
        ramp: the share of the training in which the price rises to it.
        size: bytes that all coded tensors may have, or None.
        contexts: whether the cost knows rows, columns and neighbours.
    """

    price: float
    ramp: float
    size: float | None
    contexts: bool


class Charge:
    """An objective that adds the price of all bits to another one.

    All that changes from step to step is in buffers of the grids, so that a training that goes on from a checkpoint goes on alike.

    Args:
        model: with rate grids, as it is trained.
        task: whose training batches it is trained on.
        epochs: that the training has.
        pricing: see there.
        base: the objective without it.
    """

    def __init__(self, model: nn.Module, task: Task, epochs: int, pricing: Pricing, base: Objective) -> None:
        self.model, self.pricing, self.base = model, pricing, base
        self.charged = list(rate_grids(model))
        self.lead = self.charged[0].grid
        self.total = max(1, _batches(task) * epochs)
        self.inputs = task.example_inputs(8)
        self.twin, self.analysis = _twin(model, self.inputs)
        self.lead.clock.zero_()
        self.first = float(self.lead.control[_PRICE])  # of an earlier training with a lower price

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        """The loss of one batch."""
        step = int(self.lead.clock)
        if step % EVERY == 0:
            self.refresh(step)
        self.lead.clock += 1
        loss = self.base(model, inputs, targets)
        bits = [each.grid.charge(each.stored) for each in self.charged if each.rules.original.requires_grad]
        return loss + float(self.lead.control[_PRICE]) * torch.stack(bits).sum() if bits else loss

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Look at the present weights: what is dead, what bits cost, and what the price should be."""
        self._fold()
        if step % (EVERY * _LOOKS) == 0:
            for each in self.charged:
                each.grid.look(each.stored)
        for each in self.charged:
            each.grid.refresh(each.stored, contexts=self.pricing.contexts)
        control = self.lead.control
        done = step / self.total
        if self.pricing.size is None:
            control[_PRICE] = self.first + (self.pricing.price - self.first) * min(1.0, done / max(self.pricing.ramp, 1e-9))
            return
        if step % (EVERY * _LOOKS) == 0:
            estimate = sum(float(each.grid.bits) / 8 + _HEADER for each in self.charged)
            control[_CORRECTION] = sum(coded_bytes(each) for each in self.charged) / estimate
        size = math.log(float(control[_CORRECTION]) * sum(float(each.grid.bits) / 8 + _HEADER for each in self.charged))
        if step == 0:
            control[_PRICE], control[_TREND] = self.pricing.price, 0.0
            self.lead.control[_SIZE] = size
        self._steer(size, done)

    def _steer(self, size: float, done: float) -> None:
        """Move the price so that the size goes down a straight line, in logarithms, and then stays."""
        assert self.pricing.size is not None
        control, part = self.lead.control, EVERY / self.total
        control[_TREND] = 0.8 * control[_TREND] + 0.2 * (size - control[_SIZE]) / part
        control[_SIZE] = size
        # logarithms per whole training: what is wanted, and by how much what is seen lags behind
        wanted = (math.log(_AIM * self.pricing.size) - size) / max(_SETTLED - done, _AHEAD)
        lag = (float(control[_TREND]) - wanted) / max(abs(wanted), 1.0)
        control[_PRICE] = min(float(control[_PRICE]) * math.exp(_GAIN * part * min(max(lag, -1.0), 1.0)), _HIGHEST)

    def _fold(self) -> None:
        """Move what dead neurons emit into the next biases, where the training mends what rounding does to it."""
        if self.twin is None or self.analysis is None:
            return
        for name, tensor in (*self.twin.named_parameters(), *self.twin.named_buffers()):
            tensor.copy_(read(self.model, name))
        for constant in constant_inputs(self.analysis, self.twin, self.inputs):
            _apply(self.model.get_submodule(constant.path), constant)


def coded_bytes(charged: Charged) -> int:
    """Bytes of the adaptive code of a parameter, with about what stands before it."""
    matrix = levels_of(charged.stored).to(torch.int64).cpu().numpy()
    width, period = charged.grid.neighbours.tolist()
    return len(mixing.encode(matrix, width, period)) + _HEADER if matrix.any() else _HEADER // 2


def _twin(model: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module | None, Analysis | None]:
    """A plain copy and its analysis, if it can be captured."""
    if isinstance(model, Staged):
        return None, None
    twin = bake(copy.deepcopy(model))
    try:
        return twin, analyse(capture(twin, inputs))
    except ModelError:  # CaptureError among it: then dead neurons stay
        return None, None


def _apply(layer: Any, constant: Constant) -> None:
    """Do to levels what `fold_constants` does to weights."""
    weight, bias = _grid_on(layer, "weight"), _grid_on(layer, "bias")
    if weight is None or (bias is None and bool(constant.shift.any())):
        return
    weight[0][:, constant.inputs] = 0
    if bias is not None:
        stored, grid = bias
        stored += grid.right_inverse(constant.shift.to(stored))


def _grid_on(layer: Any, name: str) -> tuple[Tensor, RateGrid] | None:
    if not parametrize.is_parametrized(layer, name):
        return None
    rules = layer.parametrizations[name]
    return (rules.original, rules[-1]) if isinstance(rules[-1], RateGrid) else None


def _batches(task: Task) -> int:
    try:
        return len(task.train)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in task.train)
