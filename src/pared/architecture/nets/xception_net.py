"""Xception: depthwise separable convolutions with residuals (Chollet 2017, 1610.02357)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pared.architecture.blocks import SeparableConv, XceptionUnit
from pared.architecture.nets.initial_weights import init_fan_out
from pared.architecture.nets.settings import check_settings, scaled


def xception(*, classes: int = 1000, channels: int = 3, size: int = 299, width: float = 1.0) -> nn.Module:
    """Xception: 22,855,952 parameters and 8,357,403,496 MACs at the defaults, which are those of the paper (figure 5).

    Tensors bear the names of timm's xception (also called legacy_xception), whose weights it takes.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels, at least 7; the first two convolutions have no padding.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> import torch
    >>> xception(classes=10, channels=1, size=28, width=0.1)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_settings("xception", classes=classes, channels=channels, size=size, width=width, smallest=7)
    stem, second, entry1, entry2, middle, exit1, exit2, exit3 = (
        scaled(units, width) for units in (32, 64, 128, 256, 728, 1024, 1536, 2048)
    )
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def add(number: int, convolution: nn.Module, outputs: int) -> None:
        layers[f"conv{number}"] = convolution
        layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
        layers[f"act{number}"] = nn.ReLU()

    add(1, nn.Conv2d(channels, stem, 3, 2, bias=False), stem)
    add(2, nn.Conv2d(stem, second, 3, bias=False), second)
    layers["block1"] = XceptionUnit(second, entry1, stride=2, relu_first=False)  # its input is rectified already
    layers["block2"] = XceptionUnit(entry1, entry2, stride=2)
    layers["block3"] = XceptionUnit(entry2, middle, stride=2)
    for number in range(4, 12):
        layers[f"block{number}"] = XceptionUnit(middle, middle, repeats=3)
    layers["block12"] = XceptionUnit(middle, exit1, stride=2, widen_first=False)
    add(3, SeparableConv(exit1, exit2), exit2)
    add(4, SeparableConv(exit2, exit3), exit3)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(exit3, classes)
    return init_fan_out(nn.Sequential(layers))
