"""Weights and activations of few bits, trained as such, and deployed as integers."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.graph import Staged, capture
from pared.graph.fold import read
from pared.quantize.activation_grid import LimitGrid, StepGrid
from pared.quantize.affine import Affine
from pared.quantize.aware import train_quantized, weight_bits, weights_of
from pared.quantize.grid import find_grid
from pared.quantize.placement import Placement, place_quantizers
from pared.quantize.points import calibrated, place_points
from pared.quantize.preparation import prepare
from pared.quantize.rewriting import rewrite
from pared.quantize.weight_blocks import Blocks
from pared.quantize.weight_grid import DoReFaGrid, FixedGrid, LearnedGrid
from pared.training import Task, Train
from pared.training.check import check_weights
from pared.training.samples import first_inputs

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Integers:
    """Weights and activations of 2 to 8 bits, computed on integers: LSQ (Esser et al. 2020, 1902.08153), PACT or DoReFa.

    Quantizers stand where `Int8` puts them. What only layers read has `activations` bits; a residual sum or a pool keeps 8, and the layer
    behind it rounds once more; products of two activations have 8 too. Batch norms are folded before training and frozen.

    No engine has kernels for less than 8 bits of activations: the deployed file holds the integers in bytes and runs on the kernels of
    int8, no faster than those; the log says so. What fewer bits buy is the packed file, which takes about `weights` bits a weight. With
    float activations, linear layers of 4 and 2 bits do have a kernel of their own: see `Bits`.

    Args:
        weights: bits of weights, -2^(bits-1) … 2^(bits-1) - 1. With "dorefa" and "pact" the 2^bits odd numbers.
        activations: bits of what layers read.
        method: "lsq" trains the steps of weights and activations, mostly best; "pact" trains the limits of activations (Choi et al. 2018,
            1805.06085) on DoReFa's weights, as in the paper; "dorefa" (Zhou et al. 2016, 1606.06160) trains neither. Values that may be
            negative have no place between 0 and a limit: with "pact" they have steps, with "dorefa" a fixed grid. These two need `tune`.
        tune: training with rounded weights and activations, such as "5ep"; None leaves it at rounding, which at 4 bits loses much.
        first_and_last: the least bits, of weights and of inputs, of the layers that run first and last (the practice of all three papers).
            None treats them as all others.
        calibration: training samples that the grids of activations begin with, those of least squared error.
        reduce_range: weights of at most 7 bits; None: where this processor's products saturate, see `Int8`. "dorefa" and "pact", whose
            odd numbers are twice as large, have one bit less at most.
        skip: paths of modules that stay float.

    Raises:
        SettingsError: for a wrong setting, and when called if `skip` names a module that isn't there, or for a network with exits.

    >>> batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    >>> small = Integers(weights=2, activations=2, first_and_last=None)(nn.Linear(4, 2), Task(batches, batches, batches))
    >>> small.weight.dtype, len(small.weight.unique()) <= 4
    (torch.int8, True)
    """

    weights: int = 4
    activations: int = 4
    method: Literal["lsq", "pact", "dorefa"] = "lsq"
    tune: Train | None = None
    first_and_last: int | None = 8
    calibration: int = 512
    reduce_range: bool | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("quantize.integers")
        problems.number("weights", self.weights, low=2, high=8, integer=True)
        problems.number("activations", self.activations, low=2, high=8, integer=True)
        problems.check(self.method in ("lsq", "pact", "dorefa"), "method", "lsq, pact or dorefa", self.method)
        needed = self.method == "lsq" or self.tune is not None
        problems.check(needed, "tune", f"a training, such as 5ep, with the method {self.method}", self.tune)
        if self.first_and_last is not None:
            problems.number("first_and_last", self.first_and_last, low=2, high=8, integer=True)
        problems.number("calibration", self.calibration, low=1, integer=True)
        known = self.reduce_range is None or isinstance(self.reduce_range, bool)
        problems.check(known, "reduce_range", "true, false or empty", self.reduce_range)
        names = isinstance(self.skip, list | tuple) and all(isinstance(name, str) and name for name in self.skip)
        problems.check(names, "skip", "a list of module paths", self.skip)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "skip", tuple(self.skip))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` on integers; grids begin with samples of `task.train`.

        Raises:
            WeightsError: if a weight isn't finite.
            DataError: if the training split is empty.
            CaptureError: if `torch.export` can't follow the model.
        """
        check_weights(model)
        modules = dict(model.named_modules())
        problems = Problems("quantize.integers")
        for name in self.skip:
            problems.check(name in modules, "skip", f"modules of {type(model).__name__}", name)
        problems.raise_if_any()
        if isinstance(model, Staged):
            raise SettingsError(["quantize.integers: a network with exits has no grids of few bits yet. Use quantize.int8."])
        batches = first_inputs(task, self.calibration, "the grids of activations begin with them")
        network = bake(copy.deepcopy(model)).to(task.machine.device).eval()
        graph = prepare(capture(network, tuple(tensor[:2] for tensor in batches[0])).module)
        placement = place_quantizers(graph, self.skip)
        widths, inputs = self._widths(graph, placement)
        points = place_points(placement, inputs)
        affines = calibrated(graph, placement, points, batches, "mse")
        rules = {path: self._rule(read(graph, path), bits) for path, bits in weights_of(placement, widths).items()}
        if min(self.weights, self.activations) < 8:
            _log.info(
                "weights of %d and activations of %d bits run on int8 kernels: the packed file is what shrinks",
                self.weights,
                self.activations,
            )
        if self.tune is None:
            weights = {path: rule.integers(read(graph, path).detach()) for path, rule in rules.items()}
        else:
            plan, quantizers = self.tune, {point: self._quantizer(affine) for point, affine in affines.items()}
            affines, weights = train_quantized(graph, placement, points, quantizers, rules, lambda module: task.tune(module, plan))
        most = 2 ** (weight_bits(self.reduce_range) - 1) - 1
        return rewrite(graph, placement, points, affines, widths, {path: filled(*pair, most) for path, pair in weights.items()})

    def _widths(self, graph: fx.GraphModule, placement: Placement) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """The bits of weights and of inputs, by layer; what products of two activations read has 8."""
        inputs = {node: self.activations for node in graph.graph.nodes if node in placement.consumers and node in placement.layers}
        weights = dict.fromkeys(placement.layers, self.weights)
        computing = list(inputs)
        if self.first_and_last is not None and computing:
            for layer in (computing[0], computing[-1]):
                weights[layer] = max(self.weights, self.first_and_last)
                inputs[layer] = max(self.activations, self.first_and_last)
        most = weight_bits(self.reduce_range) - (self.method != "lsq")
        return {layer: min(bits, most) if layer in placement.consumers else 8 for layer, bits in weights.items()}, inputs

    def _rule(self, weight: Tensor, bits: int) -> FixedGrid | DoReFaGrid:
        if self.method != "lsq":
            return DoReFaGrid(bits, weight)
        blocks = Blocks("channel")
        grid = find_grid(blocks.split(weight), bits)
        return LearnedGrid(grid._replace(lowest=grid.lowest - 1), blocks, weight)  # the paper's: with 2 bits one more of three integers

    def _quantizer(self, affine: Affine) -> StepGrid | LimitGrid:
        if self.method != "lsq" and affine.zero_point == 0:
            return LimitGrid(affine, (affine.levels - 1).bit_length(), learned=self.method == "pact")
        quantizer = StepGrid(affine)
        quantizer.ratio.requires_grad_(self.method != "dorefa")
        return quantizer


def filled(integers: Tensor, scales: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The same weights with larger integers and smaller scales: multiplied by the greatest power of two that leaves none above `most`.

    The engine rounds biases to multiples of the scales of weights and inputs, which with few bits would be too coarse. The packed file
    sees as many different values as before.

    Args:
        integers: int8.
        scales: of the outputs.
        most: the largest magnitude.

    >>> filled(torch.tensor([[1, -3]], dtype=torch.int8), torch.tensor([16.0]), 63)
    (tensor([[ 16, -48]], dtype=torch.int8), tensor([1.]))
    """
    peak = int(integers.to(torch.int32).abs().max()) if integers.numel() else 0
    factor = 2 ** ((most // peak).bit_length() - 1) if 0 < peak <= most else 1
    return integers * factor, scales / factor
