"""Weights of few bits: rounded to a grid after training, or trained on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pared.core.layers import Layer, compressible, stored
from pared.core.problems import Problems
from pared.graph.capture import Inputs, training_mode
from pared.quantize.bit_allocation import CHOICES, bit_errors, choose_bits
from pared.quantize.fold_norms import fold_norms
from pared.quantize.grid import Grid, fake_quantize, find_grid
from pared.quantize.weight_blocks import Blocks, Granularity, blocks_of
from pared.quantize.weight_grid import DoReFaGrid, FixedGrid, LearnedGrid, set_rule
from pared.training import Task, Train, check_weights, first_inputs

_WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class Bits:
    """Put the weights of convolutions and linear layers on grids of few bits (Krishnamoorthi 2018, 1806.08342; LSQ, 1902.08153).

    Every weight becomes step · k with a whole number k; nothing else of the network changes, and activations stay float. With `tune` it
    is quantization-aware training: the forward sees rounded weights, the gradient passes the rounding as if it weren't there. Batch
    norms aren't folded while training, so that their statistics follow the rounded weights; at the end they are, which the deployed
    file does anyway, and the steps take up the factors: so the weights in the file are on their grids. 0 stays 0, so masks stay.

    The file of the engine stays as large as before, since it holds float32; the packed file shrinks to what the integers need.
    For integer arithmetic use `Int8`, which may come after.

    Args:
        weights: bits of each weight, 2 to 8 or 16; with "mixed" each layer gets 2 to 8, so that the mean is within `budget` and the
            outputs move least, see `choose_bits`. 4 is where a step for each output loses little without training.
        granularity: what has a step of its own: each output ("channel"), which costs four bytes and follows outputs of
            different size; the whole weight ("tensor"); or `group` consecutive weights of an output ("group"), which is finer, but
            isn't recognised as a grid by the packed file.
        group: weights of a group. 32 costs one bit for each weight for its float32 step.
        symmetric: as many integers below 0 as above, of which there are 2^bits - 1. False: 2^bits, laid to the weights' range.
        method: "minmax" fits the grid to the largest weights, "mse" to least squared error, by default, since at 4 bits and less
            clipping the few largest gains more than it costs. Both stay fixed in training. "lsq" begins as "mse" and trains the steps.
            "dorefa" needs training; its grid has no 0 and one step for the whole weight, whatever `granularity` and `symmetric` say.
        tune: training with rounded weights, such as "2ep"; None leaves it at rounding.
        first_and_last: the least bits of the layers that run first and last, which suffer most and are small in most networks (the
            practice of LSQ and others). None treats them as all others. With "mixed" they are measured like the others.
        budget: of "mixed": the mean bits of a weight.
        samples: of "mixed": training inputs on which it is measured how far the outputs move.
        leave: paths of modules that stay float.

    Raises:
        SettingsError: for a wrong setting, a path in `leave` that isn't there, a model without convolutions and linear layers, or a
            weight that is computed from other parameters.
        WeightsError: if a weight isn't finite.

    >>> from pared.core.rules import bake
    >>> task = Task(*[[(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))]] * 3)
    >>> small = bake(Bits(weights=2, first_and_last=None)(nn.Linear(8, 1), task))
    >>> len(small.weight.unique()) <= 3
    True
    """

    weights: int | Literal["mixed"] = 4
    granularity: Granularity = "channel"
    group: int = 32
    symmetric: bool = True
    method: Literal["minmax", "mse", "lsq", "dorefa"] = "mse"
    tune: Train | None = None
    first_and_last: int | None = 8
    budget: float = 4.0
    samples: int = 256
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("quantize.bits")
        known = self.weights == "mixed" or _is_width(self.weights)
        problems.check(known, "weights", "2 to 8, 16, or mixed", self.weights)
        grains = ("tensor", "channel", "group")
        problems.check(self.granularity in grains, "granularity", "tensor, channel or group", self.granularity)
        problems.number("group", self.group, low=1, integer=True)
        problems.check(isinstance(self.symmetric, bool), "symmetric", "true or false", self.symmetric)
        methods = ("minmax", "mse", "lsq", "dorefa")
        problems.check(self.method in methods, "method", "minmax, mse, lsq or dorefa", self.method)
        needless = self.method != "dorefa" or self.tune is not None
        problems.check(needless, "tune", "a training, such as 2ep, with the method dorefa", self.tune)
        problems.check(
            self.first_and_last is None or _is_width(self.first_and_last), "first_and_last", "2 to 8, 16 or empty", self.first_and_last
        )
        problems.number("budget", self.budget, low=min(CHOICES), high=max(CHOICES))
        problems.number("samples", self.samples, low=1, integer=True)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with rules on its weights, tuned; `bake` leaves ordinary weights that are on their grids."""
        check_weights(model)
        model = copy.deepcopy(model).to(task.machine.device)
        layers = compressible(model, self.leave, "quantize.bits")
        inputs = task.example_inputs()
        widths = self._mixed(model, layers, task) if self.weights == "mixed" else self._widths(model, layers, inputs)
        rules = {path: self._rule(layer, widths[path]) for path, layer in layers.items() if _fits(layer, widths[path])}
        for path, rule in rules.items():
            set_rule(model, layers[path], rule, path)
        if self.tune is not None:
            task.tune(model, self.tune)
        return fold_norms(model, inputs, rules)

    def _widths(self, model: nn.Module, layers: Mapping[str, Layer], inputs: Inputs) -> dict[str, int]:
        assert isinstance(self.weights, int)
        widths = dict.fromkeys(layers, self.weights)
        if self.first_and_last is not None:
            order = _order(model, layers, inputs)
            for path in (order[0], order[-1]) if order else ():
                widths[path] = max(self.weights, self.first_and_last)
        return widths

    def _mixed(self, model: nn.Module, layers: Mapping[str, Layer], task: Task) -> dict[str, int]:
        batches = first_inputs(task, self.samples, "the bits of each layer are chosen on them")

        def rounded(layer: Layer, bits: int) -> Tensor:
            blocks = self._blocks(layer)
            return blocks.join(fake_quantize(blocks.split(layer.weight), self._grid(layer, bits)), layer.weight.shape)

        errors = bit_errors(model, list(layers), batches, rounded)
        return choose_bits(errors, {path: layer.weight.numel() for path, layer in layers.items()}, self.budget)

    def _rule(self, layer: Layer, bits: int) -> FixedGrid | DoReFaGrid:
        parameter = stored(layer, "weight")
        assert parameter is not None
        if self.method == "dorefa":
            return DoReFaGrid(bits, parameter)
        grid, blocks = self._grid(layer, bits), self._blocks(layer)
        return LearnedGrid(grid, blocks, parameter) if self.method == "lsq" else FixedGrid(grid, blocks)

    def _blocks(self, layer: Layer) -> Blocks:
        return blocks_of(layer, self.granularity, self.group)

    def _grid(self, layer: Layer, bits: int) -> Grid:
        method = "minmax" if self.method == "minmax" else "mse"
        return find_grid(self._blocks(layer).split(layer.weight), bits, method, symmetric=self.symmetric)


def _is_width(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in _WIDTHS


def _fits(layer: Layer, bits: int) -> bool:
    """Whether the weight's type holds all integers of so many bits; else the weight has no more bits than it is to get."""
    return 2 ** (bits - 1) <= 2 / torch.finfo(layer.weight.dtype).eps


def _order(model: nn.Module, layers: Mapping[str, Layer], inputs: Inputs) -> list[str]:
    """The layers in the order in which they run first; those that the forward doesn't call are left out."""
    order: list[str] = []
    paths = {id(layer): path for path, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(lambda layer, _: order.append(paths[id(layer)])) for layer in layers.values()]
    try:
        with training_mode(model, False), torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return order
