"""LeNet-300-100 and LeNet-5 as the pruning papers use them."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from pared.architecture.nets.initial_weights import init_glorot
from pared.architecture.nets.settings import check_settings, scaled


def lenet300(*, classes: int = 10, channels: int = 1, size: int = 28, width: float = 1.0) -> nn.Module:
    """LeNet-300-100: two hidden layers with ReLU (Han et al. 2015, 1506.02626; Frankle and Carbin 2019, 1803.03635).

    266,610 parameters and 266,200 MACs at the defaults.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels.
        width: factor on both hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> import torch
    >>> lenet300()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_settings("lenet300", classes=classes, channels=channels, size=size, width=width, smallest=1)
    first, second = scaled(300, width), scaled(100, width)
    layers: dict[str, nn.Module] = OrderedDict(
        flatten=nn.Flatten(),
        fc1=nn.Linear(channels * size * size, first),
        relu1=nn.ReLU(),
        fc2=nn.Linear(first, second),
        relu2=nn.ReLU(),
        fc3=nn.Linear(second, classes),
    )
    return init_glorot(nn.Sequential(layers))


def lenet5(*, classes: int = 10, channels: int = 1, size: int = 28, width: float = 1.0) -> nn.Module:
    """LeNet-5 in the variant of Caffe, which the pruning papers mean: no nonlinearity after the convolutions but max pooling.

    431,080 parameters and 2,293,000 MACs at the defaults.

    Args:
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels, at least 16.
        width: factor on all hidden widths.

    Raises:
        ModelError: naming a setting that it can't be built with.

    >>> import torch
    >>> lenet5()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_settings("lenet5", classes=classes, channels=channels, size=size, width=width, smallest=16)
    first, second, hidden = scaled(20, width), scaled(50, width), scaled(500, width)
    side = ((size - 4) // 2 - 4) // 2  # a 5x5 convolution without padding takes 4 pixels, pooling halves
    layers: dict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, first, 5),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(first, second, 5),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * side * side, hidden),
        relu1=nn.ReLU(),
        fc2=nn.Linear(hidden, classes),
    )
    return init_glorot(nn.Sequential(layers))
