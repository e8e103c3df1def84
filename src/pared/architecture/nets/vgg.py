"""VGG networks for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pared.architecture.nets.initial_weights import init_kaiming
from pared.architecture.nets.settings import check_settings, scaled


def vgg16(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """VGG-16 for CIFAR: 13 convolutions with batch normalisation and one linear layer (Li et al. 2017, 1608.08710, section 4.1).

    14,724,042 parameters at the defaults. What is left of the picture after the fourth pooling is averaged.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels, at least 16.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> vgg16().fc.in_features
    512
    """
    check_settings("vgg16", classes=classes, channels=channels, size=size, width=width, smallest=16)
    stages = [[64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3]
    layers, outputs = _convolutions(stages, channels, width, pool_last=False)
    layers["pool5"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(outputs, classes)
    return init_kaiming(nn.Sequential(layers))


def vgg_small(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """VGG-Small of the quantization literature: six convolutions with batch normalisation and one linear layer.

    4,660,106 parameters at the defaults (Cai et al. 2017, 1702.00953, after BinaryConnect, 1511.00363, without its two wide
    linear layers).

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels, at least 8.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> vgg_small().fc.in_features
    8192
    """
    check_settings("vgg_small", classes=classes, channels=channels, size=size, width=width, smallest=8)
    layers, outputs = _convolutions([[128, 128], [256, 256], [512, 512]], channels, width, pool_last=True)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(outputs * (size // 8) ** 2, classes)
    return init_kaiming(nn.Sequential(layers))


def _convolutions(stages: list[list[int]], channels: int, width: float, *, pool_last: bool) -> tuple[OrderedDict[str, nn.Module], int]:
    """3x3 convolutions with batch normalisation and ReLU, max pooling between the stages; and the last number of channels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, number = channels, 0
    for stage, units in enumerate(stages, 1):
        for outputs in (scaled(unit, width) for unit in units):
            number += 1
            layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{number}"] = nn.ReLU()
            inputs = outputs
        if pool_last or stage < len(stages):
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
    return layers, inputs
