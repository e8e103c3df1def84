"""Bias correction: what quantisation adds to the mean of a layer's outputs is taken away from its bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pared.core.layers import Layer
from pared.training.check import run
from pared.training.evaluate import evaluating


def output_means(model: nn.Module, layers: Mapping[str, Layer], batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The mean of every output channel of some layers of `model`, over samples, positions and calls: shape (outputs,), double.

    Args:
        model: runs on the batches, in eval mode.
        layers: its layers by path; one that is never called has no entry in the result.
        batches: inputs.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> means = output_means(layer, {"": layer}, [(torch.tensor([[1.0], [3.0]]),)])
    >>> bool(torch.isclose(means[""], 2 * layer.weight[0].double()))
    True
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            assert isinstance(module, Layer)
            rows = _channels_last(module, output.detach()).double()
            totals[path] = totals.get(path, 0.0) + rows.sum(0)
            counts[path] = counts.get(path, 0) + len(rows)

        return hook

    handles = [layer.register_forward_hook(watch(path)) for path, layer in layers.items()]
    try:
        with evaluating(model):
            for inputs in batches:
                run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / counts[path] for path, total in totals.items() if counts[path]}


def correct_bias(layer: Layer, wanted: Tensor, found: Tensor) -> None:
    """Shift a layer's bias, in place, so that its outputs have the mean that they had (Nagel et al. 2019, 1906.04721, section 4.2).

    E[W x] - E[W' x'] is added, which needs inputs but no labels (the paper's appendix D; it also gives a way without inputs). A layer
    without a bias gets one, unless nothing is to be added.

    Args:
        layer: with its new weight W'.
        wanted: the mean of each output before, shape (outputs,).
        found: the mean of each output now.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> correct_bias(layer, torch.tensor([2.0]), torch.tensor([1.5]))
    >>> layer.bias.tolist()
    [0.5]
    """
    shift = (wanted - found).to(layer.weight.device)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() + shift)
        elif bool(shift.any()):
            layer.bias = nn.Parameter(shift.to(layer.weight.dtype), layer.weight.requires_grad)


def _channels_last(layer: Layer, output: Tensor) -> Tensor:
    """The outputs as rows: shape (samples and positions, outputs)."""
    if isinstance(layer, _ConvNd):
        output = output.movedim(-1 - len(layer.kernel_size), -1)
    return output.reshape(-1, output.shape[-1])
