"""MobileNetV3, large and small (Howard et al. 2019, 1905.02244)."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TypeAlias

from torch import nn

from pared.architecture.blocks import InvertedResidual
from pared.architecture.blocks.conv_norm import conv_norm
from pared.architecture.nets.initial_weights import init_fan_out
from pared.architecture.nets.settings import check_settings, rounded

_Row: TypeAlias = tuple[int, int, int, bool, type[nn.Module], int]
_RE, _HS = nn.ReLU, nn.Hardswish
# kernel, expanded, outputs, squeeze-and-excitation, activation, stride (tables 1 and 2)
_LARGE: tuple[_Row, ...] = (
    (3, 16, 16, False, _RE, 1),
    (3, 64, 24, False, _RE, 2),
    (3, 72, 24, False, _RE, 1),
    (5, 72, 40, True, _RE, 2),
    (5, 120, 40, True, _RE, 1),
    (5, 120, 40, True, _RE, 1),
    (3, 240, 80, False, _HS, 2),
    (3, 200, 80, False, _HS, 1),
    (3, 184, 80, False, _HS, 1),
    (3, 184, 80, False, _HS, 1),
    (3, 480, 112, True, _HS, 1),
    (3, 672, 112, True, _HS, 1),
    (5, 672, 160, True, _HS, 2),
    (5, 960, 160, True, _HS, 1),
    (5, 960, 160, True, _HS, 1),
)
_SMALL: tuple[_Row, ...] = (
    (3, 16, 16, True, _RE, 2),
    (3, 72, 24, False, _RE, 2),
    (3, 88, 24, False, _RE, 1),
    (5, 96, 40, True, _HS, 2),
    (5, 240, 40, True, _HS, 1),
    (5, 240, 40, True, _HS, 1),
    (5, 120, 48, True, _HS, 1),
    (5, 144, 48, True, _HS, 1),
    (5, 288, 96, True, _HS, 2),
    (5, 576, 96, True, _HS, 1),
    (5, 576, 96, True, _HS, 1),
)
_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def mobilenet_v3_large(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0) -> nn.Module:
    """MobileNetV3-Large: 5,483,032 parameters and 216,589,760 MACs at the defaults, which are those of the paper (table 1).

    Widths are rounded to multiples of 8. Tensors bear the names of torchvision's mobilenet_v3_large, whose weights it takes.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels; any, but below 33 the last maps are a single pixel.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> import torch
    >>> mobilenet_v3_large(classes=10, channels=1, size=28, width=0.25)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_settings("mobilenet_v3_large", classes=classes, channels=channels, size=size, width=width, smallest=1)
    return _mobilenet_v3(_LARGE, 1280, classes, channels, width)


def mobilenet_v3_small(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0) -> nn.Module:
    """MobileNetV3-Small: 2,542,856 parameters and 56,510,400 MACs at the defaults, which are those of the paper (table 2).

    Widths are rounded to multiples of 8. Tensors bear the names of torchvision's mobilenet_v3_small, whose weights it takes.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels; any, but below 33 the last maps are a single pixel.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> sum(parameter.numel() for parameter in mobilenet_v3_small().parameters())
    2542856
    """
    check_settings("mobilenet_v3_small", classes=classes, channels=channels, size=size, width=width, smallest=1)
    return _mobilenet_v3(_SMALL, 1024, classes, channels, width)


def _mobilenet_v3(rows: tuple[_Row, ...], hidden: int, classes: int, channels: int, width: float) -> nn.Module:
    inputs = rounded(16 * width)
    features: list[nn.Module] = [conv_norm(channels, inputs, 3, stride=2, activation=_HS, norm=_norm)]
    for kernel, units, narrow, excites, activation, stride in rows:
        expanded, outputs = rounded(units * width), rounded(narrow * width)
        reduced = rounded(expanded // 4) if excites else 0
        block = partial(InvertedResidual, kernel=kernel, stride=stride, reduced=reduced, activation=activation, norm=_norm)
        features.append(block(inputs, expanded, outputs))
        inputs = outputs
    last, wide = 6 * inputs, rounded(hidden * width)
    features.append(conv_norm(inputs, last, activation=_HS, norm=_norm))
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        features=nn.Sequential(*features),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(nn.Linear(last, wide), _HS(), nn.Dropout(0.2), nn.Linear(wide, classes)),
    )
    return init_fan_out(nn.Sequential(layers))
