"""Quantisation to int8, after training or with it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.graph import Staged, capture
from pared.graph.capture import as_inputs
from pared.graph.fold import read
from pared.quantize.activation_grid import StepGrid
from pared.quantize.aware import train_quantized, weight_bits, weights_of
from pared.quantize.calibration import CalibrationMethod
from pared.quantize.grid import find_grid
from pared.quantize.placement import place_quantizers
from pared.quantize.points import calibrated, place_points
from pared.quantize.preparation import prepare
from pared.quantize.rewriting import rewrite
from pared.quantize.weight_blocks import Blocks
from pared.quantize.weight_grid import LearnedGrid
from pared.training import Train
from pared.training.check import check_weights
from pared.training.samples import Inputs, first_inputs

if TYPE_CHECKING:
    from pared.training import Task


@dataclass(frozen=True)
class Int8:
    """Store weights as int8 and compute in int8 (Jacob et al. 2018, 1712.05877; ranges as in the whitepaper 1806.08342).

    Weights are symmetric with a scale for each output channel; activations are 8 bits, asymmetric, with ranges from a few training
    samples. Convolutions, linear layers, products of activations and what stands between them (residual sums, pools,
    concatenations) run on integers without a float in between; operators without an integer kernel stay float. The file is about a
    quarter, and convolutions run about twice as fast on a processor with AVX2.

    Args:
        calibration: training samples that activation ranges are measured on; some hundreds are enough for steady ranges.
        method: "minmax" takes all values seen; "percentile" leaves out the outermost 0.01 %, "mse" what rounding gains more by:
            "kl" clips by the entropy calibration of TensorRT. All three help where single activations are far larger than all others.
            "ema" takes the running mean of the extremes of each batch, as quantization-aware training does.
        reduce_range: weights of 7 bits, -63 … 63, instead of 8, because integer products in processors without VNNI saturate with 8
            (an error five times larger, at the same speed). False is a little more exact where they don't. None: what is right for the
            processor at hand, see `runtime.saturates`; say it yourself if the file is for another one.
        tune: training with rounded weights and activations, such as "1ep", where rounding alone loses too much. Batch norms are folded
            before it and frozen. Every step of a grid is trained (LSQ, Esser et al. 2020, 1902.08153) and begins at the calibrated
            range, so there are no running means of ranges to wait for.
        skip: paths of modules that stay float, such as ("classifier",).

    Raises:
        SettingsError: naming every field that can't be used.

    >>> from pared.training import Task
    >>> batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    >>> small = Int8()(nn.Linear(4, 2), Task(batches, batches, batches))
    >>> small.weight.dtype, tuple(small(torch.zeros(3, 4)).shape)
    (torch.int8, (3, 2))
    """

    calibration: int = 512
    method: CalibrationMethod = "minmax"
    reduce_range: bool | None = None
    tune: Train | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.skip, list):  # as YAML gives it
            object.__setattr__(self, "skip", tuple(self.skip))
        problems = Problems("quantize.int8")
        problems.number("calibration", self.calibration, low=1, integer=True)
        methods = ("minmax", "ema", "percentile", "mse", "kl")
        problems.check(self.method in methods, "method", "minmax, ema, percentile, mse or kl", self.method)
        known = self.reduce_range is None or isinstance(self.reduce_range, bool)
        problems.check(known, "reduce_range", "true, false or empty", self.reduce_range)
        names = isinstance(self.skip, tuple) and all(isinstance(name, str) and name for name in self.skip)
        problems.check(names, "skip", "a list of module paths", self.skip)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return an int8 copy of `model`; the ranges come from `task.train`.

        Raises:
            WeightsError: if a weight isn't finite.
            DataError: if the training split is empty.
            SettingsError: if `skip` names a module that isn't there, or a network with exits is to be tuned.
            CaptureError: if `torch.export` can't follow the model.
        """
        check_weights(model)
        modules = dict(model.named_modules())
        if unknown := [name for name in self.skip if name not in modules]:
            raise SettingsError([f"quantize.int8: skip must name modules of {type(model).__name__}. Got {name!r}." for name in unknown])
        batches = first_inputs(task, self.calibration, "int8 ranges are measured on them")
        network = bake(copy.deepcopy(model)).to(task.machine.device).eval()
        if isinstance(network, Staged):
            if self.tune is not None:
                raise SettingsError(["quantize.int8: tune must be empty for a network with exits. Train it before it becomes int8."])
            return self._staged(network, batches)
        return self._quantize(network, batches, self.skip, task)

    def _quantize(self, network: nn.Module, batches: Inputs, skip: Collection[str], task: Task | None = None) -> nn.Module:
        if "" in skip:
            return network
        example = tuple(tensor[:2] for tensor in batches[0])
        graph = prepare(capture(network, example).module)
        placement = place_quantizers(graph, skip)
        points = place_points(placement, {})
        affines = calibrated(graph, placement, points, batches, self.method)
        bits = {layer: weight_bits(self.reduce_range) if layer in placement.consumers else 8 for layer in placement.layers}
        if self.tune is None or task is None:
            return rewrite(graph, placement, points, affines, bits)
        plan = self.tune
        rules = {path: _learned(read(graph, path), width) for path, width in weights_of(placement, bits).items()}
        steps = {point: StepGrid(affine) for point, affine in affines.items()}
        found, weights = train_quantized(graph, placement, points, steps, rules, lambda module: task.tune(module, plan))
        return rewrite(graph, placement, points, found, bits, weights)

    def _staged(self, network: Any, batches: Inputs) -> nn.Module:
        """Quantize stages and heads one by one, each calibrated with what really reaches it."""
        for index in range(len(network.stages)):
            stage = self._quantize(network.stages[index], batches, _inside(self.skip, f"stages.{index}"))
            network.stages[index] = stage
            with torch.no_grad():
                batches = [as_inputs(stage(*batch)) for batch in batches]
            network.heads[index] = self._quantize(network.heads[index], batches, _inside(self.skip, f"heads.{index}"))
        return network


def _inside(skip: tuple[str, ...], part: str) -> list[str]:
    """The paths of `skip` that lie in a part, as seen from it; "" if the whole part is skipped."""
    whole = any(name == part or part.startswith(f"{name}.") for name in skip)
    return [""] if whole else [name.removeprefix(f"{part}.") for name in skip if name.startswith(f"{part}.")]


def _learned(weight: Tensor, bits: int) -> LearnedGrid:
    blocks = Blocks("channel")
    return LearnedGrid(find_grid(blocks.split(weight), bits, "minmax"), blocks, weight)
