"""Conv-2, Conv-4 and Conv-6: the small convolutional nets of the lottery ticket papers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pared.architecture.nets.initial_weights import init_glorot
from pared.architecture.nets.settings import check_settings, scaled

_STAGES = (64, 128, 256)


def conv2(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """Conv-2: two 3x3 convolutions, then three linear layers (Frankle and Carbin 2019, 1803.03635, figure 2).

    4,301,642 parameters at the defaults.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels, at least 2.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> conv2().fc1.in_features
    16384
    """
    return _conv_net("conv2", 1, classes, channels, size, width)


def conv4(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """Conv-4: as `conv2`, with four convolutions; 2,425,930 parameters at the defaults, inputs of at least 4 pixels.

    >>> conv4().fc1.in_features
    8192
    """
    return _conv_net("conv4", 2, classes, channels, size, width)


def conv6(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """Conv-6: as `conv2`, with six convolutions; 2,262,602 parameters at the defaults, inputs of at least 8 pixels.

    >>> conv6().fc1.in_features
    4096
    """
    return _conv_net("conv6", 3, classes, channels, size, width)


def _conv_net(name: str, stages: int, classes: int, channels: int, size: int, width: float) -> nn.Module:
    check_settings(name, classes=classes, channels=channels, size=size, width=width, smallest=2**stages)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, side, hidden = channels, size, scaled(256, width)
    for stage in range(stages):
        outputs = scaled(_STAGES[stage], width)
        for number in (2 * stage + 1, 2 * stage + 2):
            layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
            layers[f"relu{number}"] = nn.ReLU()
            inputs = outputs
        layers[f"pool{stage + 1}"] = nn.MaxPool2d(2)
        side //= 2
    layers["flatten"] = nn.Flatten()
    for number, (before, after) in enumerate([(inputs * side * side, hidden), (hidden, hidden)], 1):
        layers[f"fc{number}"] = nn.Linear(before, after)
        layers[f"fc_relu{number}"] = nn.ReLU()
    layers["fc3"] = nn.Linear(hidden, classes)
    return init_glorot(nn.Sequential(layers))
