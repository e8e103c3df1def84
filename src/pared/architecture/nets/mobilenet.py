"""MobileNetV1 and MobileNetV2 (Howard et al. 2017, 1704.04861; Sandler et al. 2018, 1801.04381)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pared.architecture.blocks import DepthwiseSeparable, LinearBottleneck
from pared.architecture.blocks.conv_norm import conv_norm
from pared.architecture.nets.initial_weights import init_fan_out
from pared.architecture.nets.settings import check_settings, rounded, scaled

# stride and outputs of each unit (1704.04861, table 1)
_V1 = ((1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512), *[(1, 512)] * 5, (2, 1024), (1, 1024))
# expansion, outputs, repeats, stride of the first (1801.04381, table 2)
_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v1(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0) -> nn.Module:
    """MobileNetV1: 4,231,976 parameters and 568,740,352 MACs at the defaults, which are those of the paper (table 1).

    `width` is the paper's α, `size` stands for its ρ: 192, 160 and 128 pixels need 418, 291 and 186 million MACs.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels; any, but below 33 the last maps are a single pixel.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> [sum(parameter.numel() for parameter in mobilenet_v1(width=width).parameters()) for width in (0.5, 0.25)]
    [1331592, 470072]
    """
    check_settings("mobilenet_v1", classes=classes, channels=channels, size=size, width=width, smallest=1)
    inputs = scaled(32, width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=conv_norm(channels, inputs, 3, stride=2))
    for number, (stride, units) in enumerate(_V1, 1):
        outputs = scaled(units, width)
        layers[f"unit{number}"] = DepthwiseSeparable(inputs, outputs, stride=stride)
        inputs = outputs
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    return init_fan_out(nn.Sequential(layers))


def mobilenet_v2(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0) -> nn.Module:
    """MobileNetV2: 3,504,872 parameters and 300,774,272 MACs at the defaults, which are those of the paper (table 2).

    Widths are rounded to multiples of 8; the last convolution has 1280 channels, more only for a `width` above 1 (section 6.1).
    Tensors bear the names of torchvision's mobilenet_v2, whose weights it takes.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels; any, but below 33 the last maps are a single pixel.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> import torch
    >>> mobilenet_v2(classes=10, channels=1, size=28, width=0.25)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_settings("mobilenet_v2", classes=classes, channels=channels, size=size, width=width, smallest=1)
    inputs, last = rounded(32 * width), rounded(1280 * max(1.0, width))
    features: list[nn.Module] = [conv_norm(channels, inputs, 3, stride=2, activation=nn.ReLU6)]
    for expansion, units, repeats, stride in _V2:
        outputs = rounded(units * width)
        for number in range(repeats):
            features.append(LinearBottleneck(inputs, outputs, expansion=expansion, stride=stride if number == 0 else 1))
            inputs = outputs
    features.append(conv_norm(inputs, last, activation=nn.ReLU6))
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        features=nn.Sequential(*features),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes)),
    )
    return init_fan_out(nn.Sequential(layers))
