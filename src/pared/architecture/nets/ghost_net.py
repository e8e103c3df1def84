"""GhostNet: MobileNetV3's plan with ghost modules in place of 1x1 convolutions (Han et al. 2020, 1911.11907)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pared.architecture.blocks import GhostBottleneck
from pared.architecture.nets.initial_weights import init_fan_out
from pared.architecture.nets.settings import check_settings, rounded

# kernel, expanded, outputs, squeeze-and-excitation, stride; one tuple a stage (table 1)
_STAGES = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    (
        (3, 200, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 480, 112, True, 1),
        (3, 672, 112, True, 1),
    ),
    ((5, 672, 160, True, 2),),
    ((5, 960, 160, False, 1), (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1)),
)
_HEAD = 1280


def ghostnet(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0) -> nn.Module:
    """GhostNet: 5,182,508 parameters and 141.2 million MACs at the defaults, which are those of the paper (table 1).

    Widths are rounded to multiples of 4, except the last 1280, which stays at every `width`. Tensors bear the names of timm's
    ghostnet_100, whose weights it takes.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels; any, but below 33 the last maps are a single pixel.
        width: factor on all hidden widths but the last.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> import torch
    >>> ghostnet(classes=10, channels=1, size=28, width=0.25)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_settings("ghostnet", classes=classes, channels=channels, size=size, width=width, smallest=1)
    stem = inputs = rounded(16 * width, 4)
    stages: list[nn.Module] = []
    expanded = inputs
    for rows in _STAGES:
        blocks: list[nn.Module] = []
        for kernel, units, narrow, excites, stride in rows:
            expanded, outputs = rounded(units * width, 4), rounded(narrow * width, 4)
            reduced = rounded(expanded / 4, 4) if excites else 0
            blocks.append(GhostBottleneck(inputs, expanded, outputs, kernel=kernel, stride=stride, reduced=reduced))
            inputs = outputs
        stages.append(nn.Sequential(*blocks))
    last: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(inputs, expanded, 1, bias=False), bn1=nn.BatchNorm2d(expanded), act=nn.ReLU()
    )
    stages.append(nn.Sequential(nn.Sequential(last)))
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv_stem=nn.Conv2d(channels, stem, 3, 2, 1, bias=False),
        bn1=nn.BatchNorm2d(stem),
        act1=nn.ReLU(),
        blocks=nn.Sequential(*stages),
        pool=nn.AdaptiveAvgPool2d(1),
        conv_head=nn.Conv2d(expanded, _HEAD, 1),
        act2=nn.ReLU(),
        flatten=nn.Flatten(),
        dropout=nn.Dropout(0.2),
        classifier=nn.Linear(_HEAD, classes),
    )
    return init_fan_out(nn.Sequential(layers))
