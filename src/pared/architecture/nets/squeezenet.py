"""SqueezeNet: Fire modules, no linear layer (Iandola et al. 2016, 1602.07360)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pared.architecture.blocks import Fire
from pared.architecture.nets.initial_weights import init_kaiming
from pared.architecture.nets.settings import check_settings, scaled

# squeezed, 1x1 and 3x3 channels of fire2 to fire9
_FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


def squeezenet1_0(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0) -> nn.Module:
    """SqueezeNet 1.0: 1,248,424 parameters and 818,924,576 MACs at the defaults, which are those of the paper (table 1).

    The poolings round up (ceil mode), as in Caffe, where it was trained: rounding down would lose a row and a column of each map.
    Tensors bear the names of torchvision's squeezenet1_0, whose weights it takes.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels, at least 21.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> import torch
    >>> squeezenet1_0(classes=10, channels=1, size=28, width=0.25)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_settings("squeezenet1_0", classes=classes, channels=channels, size=size, width=width, smallest=21)
    first = nn.Conv2d(channels, scaled(96, width), 7, 2)
    return _squeezenet(first, pools_before=(0, 3, 7), classes=classes, width=width)


def squeezenet1_1(*, classes: int = 1000, channels: int = 3, size: int = 224, width: float = 1.0) -> nn.Module:
    """SqueezeNet 1.1, of the authors' repository: 1,235,496 parameters and 349,151,936 MACs at the defaults.

    A 3x3 first convolution and earlier poolings: 2.3 times fewer MACs than `squeezenet1_0`. Tensors bear torchvision's names.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels, at least 17.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> sum(parameter.numel() for parameter in squeezenet1_1().parameters())
    1235496
    """
    check_settings("squeezenet1_1", classes=classes, channels=channels, size=size, width=width, smallest=17)
    first = nn.Conv2d(channels, scaled(64, width), 3, 2)
    return _squeezenet(first, pools_before=(0, 2, 4), classes=classes, width=width)


def _squeezenet(first: nn.Conv2d, *, pools_before: tuple[int, ...], classes: int, width: float) -> nn.Module:
    features: list[nn.Module] = [first, nn.ReLU()]
    inputs = first.out_channels
    for number, (squeezed, expanded) in enumerate(_FIRES):
        if number in pools_before:
            features.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        outputs = scaled(expanded, width)
        features.append(Fire(inputs, scaled(squeezed, width), outputs, outputs))
        inputs = 2 * outputs
    last = nn.Conv2d(inputs, classes, 1)
    classifier = nn.Sequential(nn.Dropout(0.5), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(OrderedDict(features=nn.Sequential(*features), classifier=classifier, flatten=nn.Flatten()))
    init_kaiming(net)
    nn.init.normal_(last.weight, std=0.01)  # as the authors' release has it
    return net
