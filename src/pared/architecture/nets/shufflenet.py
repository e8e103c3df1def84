"""ShuffleNetV1 and ShuffleNetV2 (Zhang et al. 2018, 1707.01083; Ma et al. 2018, 1807.11164)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pared.architecture.blocks import ShuffleUnit, ShuffleUnitV2
from pared.architecture.blocks.conv_norm import conv_norm
from pared.architecture.nets.initial_weights import init_fan_out
from pared.architecture.nets.settings import check_settings, scaled

_REPEATS = (4, 8, 4)
# channels of the first stage for each number of groups, so that all cost about the same (1707.01083, table 1)
_V1 = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
# channels of the three stages and of the last convolution for the widths of the paper (1807.11164, table 5)
_V2 = {0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024), 2.0: (244, 488, 976, 2048)}


def shufflenet_v1(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0, groups: int = 3) -> nn.Module:
    """ShuffleNetV1: 1,865,728 parameters and 137.5 million MACs at the defaults (table 1 of the paper).

    `width` scales all channels, rounded to multiples of what the groups need: `groups` in the stem, 4 · `groups` in the stages.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels; any, but below 33 the last maps are a single pixel.
        width: factor on all hidden widths.
        groups: of the 1x1 convolutions, 1, 2, 3, 4 or 8; 3, in the middle of the paper's. More groups come with more channels.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> import torch
    >>> shufflenet_v1(classes=10, channels=1, size=28, width=0.25, groups=4)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    known = isinstance(groups, int) and not isinstance(groups, bool) and groups in _V1
    wrong = [] if known else [f"shufflenet_v1: groups must be one of {', '.join(map(str, _V1))}. Got {groups!r}."]
    check_settings("shufflenet_v1", classes=classes, channels=channels, size=size, width=width, smallest=1, also=wrong)
    inputs = groups * scaled(24 // groups, width)
    outputs = 4 * groups * scaled(_V1[groups] // (4 * groups), width)
    layers = _stem(channels, inputs)
    for stage, repeats in enumerate(_REPEATS, 2):
        # the very first convolution isn't grouped: it has few inputs (section 3.3)
        first = ShuffleUnit(inputs, outputs, groups=groups, stride=2, first_groups=1 if stage == 2 else groups)
        others = (ShuffleUnit(outputs, outputs, groups=groups) for _ in range(repeats - 1))
        layers[f"stage{stage}"] = nn.Sequential(first, *others)
        inputs, outputs = outputs, 2 * outputs
    return _headed(layers, inputs, classes)


def shufflenet_v2(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0) -> nn.Module:
    """ShuffleNetV2: 2,278,604 parameters and 144.9 million MACs at the defaults (table 5 of the paper).

    For a `width` of 0.5, 1, 1.5 or 2, channels are those of the paper. For another one the 116, 232 and 464 of the stages are scaled, the
    stem keeps 24 and the last convolution 1024. Tensors bear the names of torchvision's shufflenet_v2, whose weights it takes.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels; any, but below 33 the last maps are a single pixel.
        width: factor on the widths of the stages.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> [sum(parameter.numel() for parameter in shufflenet_v2(width=width).parameters()) for width in (0.5, 1)]
    [1366792, 2278604]
    """
    check_settings("shufflenet_v2", classes=classes, channels=channels, size=size, width=width, smallest=1)
    narrow = 2 * scaled(58, width)
    *stages, last = _V2.get(width, (narrow, 2 * narrow, 4 * narrow, 1024))
    inputs = 24
    layers = _stem(channels, inputs)
    for stage, (outputs, repeats) in enumerate(zip(stages, _REPEATS, strict=True), 2):
        others = (ShuffleUnitV2(outputs, outputs) for _ in range(repeats - 1))
        layers[f"stage{stage}"] = nn.Sequential(ShuffleUnitV2(inputs, outputs, stride=2), *others)
        inputs = outputs
    layers["conv5"] = conv_norm(inputs, last)
    return _headed(layers, last, classes)


def _stem(channels: int, outputs: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(conv1=conv_norm(channels, outputs, 3, stride=2), maxpool=nn.MaxPool2d(3, 2, 1))


def _headed(layers: OrderedDict[str, nn.Module], inputs: int, classes: int) -> nn.Module:
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    return init_fan_out(nn.Sequential(layers))
