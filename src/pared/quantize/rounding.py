"""Weights of few bits after training, without labels: rounded so that the outputs of every layer change little."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pared.core.errors import CaptureError, ModelError
from pared.core.layers import Layer, compressible, join_weight, readers, split_weight
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.graph import Staged
from pared.graph.capture import Inputs, as_inputs
from pared.graph.fold_layers import fold_layers
from pared.quantize.adaround import adaround
from pared.quantize.bias_correction import correct_bias, output_means
from pared.quantize.equalization import equalize
from pared.quantize.gptq import gptq
from pared.quantize.row_rounding import dequantize, group_scales, round_to_nearest, row_scales
from pared.quantize.weight_blocks import Granularity
from pared.training import Task
from pared.training.check import check_weights
from pared.training.evaluate import evaluating
from pared.training.layer_inputs import execution_order, layer_gram
from pared.training.samples import first_inputs


@dataclass(frozen=True)
class Rounding:
    """Round the weights of convolutions and linear layers to a few bits so that the outputs change little; nothing is trained.

    Layers are rounded in the order in which they run, each on the inputs that the rounded layers before it give, from a few training
    samples without labels. Batch norms are folded into their layers first, as the deployed file does anyway, so that what is rounded
    is what is deployed. Weights become exactly float32(integer) · float32(scale), symmetric about 0, and plain tensors: masks and other
    weight rules are baked, and zeros stay. A layer that is never called as a module (the output projection of
    `nn.MultiheadAttention`) is rounded to nearest. Activations stay float. Put it last, since training would move the weights off
    their grids.

    Args:
        bits: of each weight, 2 to 8. 4 is where a good rounding loses little.
        method: "gptq" moves the error of each column to the next ones (Frantar et al. 2023, 2210.17323), which is fast and mostly best;
            "adaround" learns to round up or down (Nagel et al. 2020, 2004.10568); "nearest" is the baseline. The error of a layer is
            never larger than with "nearest", which stands in for rows where it would be.
        granularity: what has a scale of its own: each output ("channel"), which costs four bytes each, the layer ("tensor"), or `group`
            consecutive weights of an output ("group").
        group: weights of a group. With 16, 32, 64 or 128 large linear layers of 4 and 2 bits are deployed packed, see `runtime.export`.
        scales: "mse" takes the scale of least squared error, every input weighted by its mean square, by default, since with few
            bits it pays to cut off the largest weights; "minmax" cuts nothing off.
        samples: training inputs to calibrate on. 256 are plenty for convolutions, which see each sample at many positions; a linear
            layer wants several times as many as it has inputs that vary.
        damping: of "gptq", see there; with few samples for many inputs more is better.
        equalize: move scale between layers first, see `quantize.equalize`. With a scale for each output it changes little; with one for
            the layer it is what saves networks with depthwise convolutions.
        correct_bias: take from the biases what rounding adds to the mean outputs on the samples (Nagel et al. 2019, 1906.04721,
            section 4.2); a layer without a bias gets one. By default, since it costs nothing in the file.
        leave: paths of modules whose weights are not rounded; norms are folded into them, and scale is moved, all the same.

    Raises:
        SettingsError: for a wrong setting, a path in `leave` that isn't there, a model without convolutions and linear layers, or a
            weight that is computed from other parameters (weight_norm, spectral_norm).

    >>> batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    >>> small = Rounding(bits=2)(nn.Linear(4, 2), Task(batches, batches, batches))
    >>> len(small.weight[0].abs().unique()) <= 2
    True
    """

    bits: int = 4
    method: Literal["gptq", "adaround", "nearest"] = "gptq"
    granularity: Granularity = "channel"
    group: int = 32
    scales: Literal["mse", "minmax"] = "mse"
    samples: int = 256
    damping: float = 0.01
    equalize: bool = False
    correct_bias: bool = True
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("quantize.rounding")
        problems.number("bits", self.bits, low=2, high=8, integer=True)
        problems.check(self.method in ("gptq", "adaround", "nearest"), "method", "gptq, adaround or nearest", self.method)
        grains = ("channel", "tensor", "group")
        problems.check(self.granularity in grains, "granularity", "channel, tensor or group", self.granularity)
        problems.number("group", self.group, low=1, integer=True)
        problems.check(self.scales in ("mse", "minmax"), "scales", "mse or minmax", self.scales)
        problems.number("samples", self.samples, low=1, integer=True)
        problems.number("damping", self.damping, above=0, high=1e6)
        problems.check(isinstance(self.equalize, bool), "equalize", "true or false", self.equalize)
        problems.check(isinstance(self.correct_bias, bool), "correct_bias", "true or false", self.correct_bias)
        names = isinstance(self.leave, list | tuple) and all(isinstance(name, str) and name for name in self.leave)
        problems.check(names, "leave", "a list of module paths", self.leave)
        problems.raise_if_any()
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with rounded weights; the samples come from `task.train`.

        Raises:
            WeightsError: if a weight isn't finite.
            DataError: if the training split is empty.
            ModelError: if a layer reads values that aren't finite, or `damping` is too little for its inputs.
            CaptureError: with `equalize`, if `torch.export` can't follow the model.
        """
        check_weights(model)
        network = bake(copy.deepcopy(model)).to(task.machine.device)
        compressible(network, self.leave, "quantize.rounding")
        batches = first_inputs(task, self.samples, "they show what rounding does to the outputs (quantize.rounding)")
        network = self._prepared(network, tuple(part[:2] for part in batches[0]))
        layers = compressible(network, self.leave, "quantize.rounding")
        modules = {path: module for path, module in network.named_modules() if isinstance(module, Layer)}
        wanted = output_means(network, modules, batches) if self.correct_bias else {}
        order = execution_order(network, layers, batches[0])
        for path in order:
            gram = layer_gram(network, path, layers[path], batches)
            if not bool(torch.isfinite(gram).all()):
                raise ModelError(f"quantize.rounding: {path} reads values that aren't finite. Check the inputs and weights.")
            self._round(layers[path], gram, path)
            self._correct(network, layers[path], wanted, batches)
        for path in layers.keys() - set(order):
            self._round(layers[path], None, path)
        return network

    def _prepared(self, network: nn.Module, example: Inputs) -> nn.Module:
        """The network with its norms folded, and with even ranges if wanted; of one with exits, part by part."""
        if isinstance(network, Staged):
            with evaluating(network):
                for index in range(len(network.stages)):
                    network.stages[index] = self._prepared(network.stages[index], example)
                    example = as_inputs(network.stages[index](*example))
                    network.heads[index] = self._prepared(network.heads[index], example)
            return network
        if self.equalize:
            return equalize(network, example)
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            return network
        try:
            return fold_layers(network, example)
        except CaptureError:
            return network

    def _round(self, layer: Layer, gram: Tensor | None, path: str) -> None:
        """Round a layer's weight in place; `gram` has shape (groups, columns, columns)."""
        split = split_weight(layer, layer.weight.detach())
        rows = split.flatten(2)
        scales = self._scales(rows, gram)
        try:
            integers = self._rounding(gram)(rows, scales)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            raise ModelError(
                f"quantize.rounding: the inputs of {path} depend on each other too much for damping={self.damping:g}. "
                "Take a larger damping (0.01 is the default), or more samples."
            ) from None
        with torch.no_grad():
            layer.weight.copy_(join_weight(layer, dequantize(integers, scales).view(split.shape)))

    def _scales(self, rows: Tensor, gram: Tensor | None) -> Tensor:
        importance = rows.new_ones(len(rows), rows.shape[2]) if gram is None else gram.diagonal(dim1=1, dim2=2)
        importance = importance if self.scales == "mse" else None
        limit = 2 ** (self.bits - 1) - 1
        if self.granularity == "channel":
            return row_scales(rows, limit, importance)
        if self.granularity == "group":
            return group_scales(rows, self.group, limit, importance)
        spread = None if importance is None else importance[:, None].expand_as(rows).reshape(-1)
        return row_scales(rows.reshape(1, -1), limit, spread).expand(rows.shape[:2])

    def _rounding(self, gram: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """From weights and scales to integers."""
        limit = 2 ** (self.bits - 1) - 1
        if gram is None or self.method == "nearest":
            return lambda rows, scales: round_to_nearest(rows, scales, -limit, limit)
        if self.method == "adaround":
            return lambda rows, scales: adaround(rows, gram, scales, -limit, limit)
        return lambda rows, scales: gptq(rows, gram, scales, -limit, limit, self.damping)

    def _correct(self, network: nn.Module, layer: Layer, wanted: dict[str, Tensor], batches: list[Inputs]) -> None:
        """Correct the biases of all layers that read the weight of `layer`; one bias of several is corrected once."""
        owners = {path: owner for path, owner, _ in readers(network, layer) if isinstance(owner, Layer) and path in wanted}
        found = output_means(network, owners, batches) if owners else {}
        done = set[int]()
        for path in found:
            owner = owners[path]
            if owner.bias is None or id(owner.bias) not in done:
                correct_bias(owner, wanted[path], found[path])
            done.add(id(owner.bias))
