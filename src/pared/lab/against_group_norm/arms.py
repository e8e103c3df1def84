"""The networks that are compared, and what is measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pared.graph import count
from pared.measure import file_metric, latency, sample_inputs
from pared.measure.deployed import deploy
from pared.training import Task, Train


@dataclass(frozen=True)
class Arm:
    """A network, and the seconds that it took to make."""

    model: nn.Module
    seconds: float


def projected(network: nn.Module) -> nn.Module:
    """Give every shortcut that changes width a convolution of 1x1 with batch norm (option B of He et al. 2015), in place.

    >>> from pared.architecture.nets import resnet8
    >>> projected(resnet8()).stage2[0].shortcut[0].weight.shape
    torch.Size([32, 16, 1, 1])
    """
    for block in [module for module in network.modules() if hasattr(module, "shortcut")]:
        first: Any = block.conv1
        if not isinstance(block.shortcut, nn.Identity):
            convolution = nn.Conv2d(first.in_channels, first.out_channels, 1, first.stride, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            block.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(first.out_channels))
    return network


def fast(network: nn.Module) -> nn.Module:
    """Put weights in the memory format in which convolutions train in two thirds of the time on a processor, in place.

    Networks with a strided 1x1 convolution of fewer than 8 inputs go the other way: in this format PyTorch 2.13 writes beyond its memory
    in their backward pass.
    """
    unsafe = any(
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1) and module.in_channels < 8
        for module in network.modules()
    )
    return network.to(memory_format=torch.contiguous_format if unsafe else torch.channels_last)  # type: ignore[call-overload]


def sgd(epochs: int, learning_rate: float, *, weight_decay: float = 5e-4, warmup: float = 0.0) -> Train:
    """Of every training here: SGD with Nesterov momentum, and a cosine to 0."""
    return Train(epochs=epochs, optimizer="sgd", learning_rate=learning_rate, weight_decay=weight_decay, warmup=warmup)


def measured(arms: Mapping[str, Arm], task: Task, folder: Path) -> dict[str, dict[str, Any]]:
    """Of every arm: errors and milliseconds of the deployed file, multiply-adds, parameters, seconds of making it.

    All files are timed together, in turn: one picture, one thread.
    """
    files = {name: deploy(arm.model, task, folder / f"{name.replace(', ', '-').replace(' ', '-')}.onnx") for name, arm in arms.items()}
    times = latency(files, sample_inputs(task, "valid", 1)[0])
    return {name: {**_figures(arms[name], files[name], task), "ms": round(times[name].median, 4)} for name in arms}


def _figures(arm: Arm, file: Path, task: Task) -> dict[str, Any]:
    counted = count(arm.model, task.example_inputs())
    errors = {split: round(100 * (1 - file_metric(file, task, split)), 2) for split in ("valid", "test")}
    return {**errors, "macs": counted.macs, "params": counted.params, "seconds": round(arm.seconds, 1)}
