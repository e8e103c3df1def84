"""What layers see while a network runs: sizes of images, and second moments of what their weights multiply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pared.training import Task, evaluating
from pared.training.layer_inputs import gram_of
from pared.training.samples import first_samples

LARGEST = 4096
"""The most weights of an output of which moments are kept: a matrix of 4096 x 4096 takes 128 MiB."""


def sizes(model: nn.Module, task: Task, layers: Mapping[str, nn.Module]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Lengths of the axes of the images that layers get and give, in one run of `model`; a layer that doesn't run is left out.

    Of linear layers the axes between the first and the last are taken, so that their product is the positions of a sample.
    """
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def look(path: str, layer: Any, given: Tensor, out: Tensor) -> None:
        axes = slice(1, -1) if isinstance(layer, nn.Linear) else slice(-len(layer.kernel_size), None)
        found.setdefault(path, (tuple(given.shape[axes]), tuple(out.shape[axes])))

    _run(model, layers, look, [task.example_inputs()])
    return found


def moments(model: nn.Module, task: Task, layers: Mapping[str, nn.Module], samples: int) -> dict[str, Tensor]:
    """The mean of x xᵀ over what the weight of each layer multiplies, in the first training samples, in double precision.

    For a convolution x is a patch, channels first, as `weight.flatten(1)` has it. Layers with more than `LARGEST` weights for an output,
    and convolutions with groups are left out.

    Returns:
        By path, shape (weights of an output, weights of an output).

    >>> batches = [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, dtype=torch.long))]
    >>> layer = nn.Linear(2, 2)
    >>> moments(layer, Task(batches, batches, batches), {"": layer}, 2)[""].tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(path: str, layer: Any, given: Tensor, out: Tensor) -> None:
        sums[path] = sums.get(path, 0) + gram_of(layer, given)[0]
        counts[path] = counts.get(path, 0) + out.numel() // len(layer.weight)

    fit = {path: layer for path, layer in layers.items() if _is_seen(layer)}
    _run(model, fit, look, (inputs for inputs, _ in first_samples(task, samples)))
    return {path: each / counts[path] for path, each in sums.items()}


def _is_seen(layer: nn.Module) -> bool:
    weight: Any = layer.weight
    return weight.flatten(1).shape[1] <= LARGEST and getattr(layer, "groups", 1) == 1


def _run(model: nn.Module, layers: Mapping[str, nn.Module], look: Any, batches: Any) -> None:
    def hook(path: str) -> Any:
        return lambda module, inputs, named, out: look(path, module, (inputs[0] if inputs else named["input"]).detach(), out.detach())

    handles = [layer.register_forward_hook(hook(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
            for inputs in batches:
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
