"""Residual networks for small images, 6n + 2 layers deep (He et al. 2015, 1512.03385, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from pared.architecture.nets.initial_weights import init_kaiming
from pared.architecture.nets.settings import check_settings, scaled


class PaddedShortcut(nn.Module):
    """The shortcut without parameters: every `stride`-th pixel, and channels of zeros around the input's (option A).

    Args:
        stride: step between the pixels that are kept.
        before: channels of zeros before the input's.
        after: channels of zeros after them.

    >>> import torch
    >>> PaddedShortcut(2, 1, 1)(torch.ones(1, 2, 4, 4)).shape
    torch.Size([1, 4, 2, 2])
    """

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.after = after

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to (batch, before + channels + after, ⌈height/stride⌉, ⌈width/stride⌉)."""
        return functional.pad(images[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, self.before, self.after])

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"stride={self.stride}, before={self.before}, after={self.after}"


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and the shortcut past them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        added = outputs - inputs
        changes = stride > 1 or added > 0
        self.shortcut = PaddedShortcut(stride, added // 2, added - added // 2) if changes else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(images)))))
        return self.relu2(residual + self.shortcut(images))


class ResNet(nn.Module):
    """A convolution, three stages of `blocks` blocks of 16, 32 and 64 channels, an average over the picture, a linear layer.

    Args:
        blocks: in each stage; the depth is 6 * blocks + 2.
        classes: outputs.
        channels: of the input.
        width: factor on all hidden widths.
    """

    def __init__(self, blocks: int, classes: int, channels: int, width: float) -> None:
        super().__init__()
        units = [scaled(unit, width) for unit in (16, 32, 64)]
        self.conv1 = nn.Conv2d(channels, units[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(units[0])
        self.relu1 = nn.ReLU()
        self.stage1 = _stage(blocks, units[0], units[0], 1)
        self.stage2 = _stage(blocks, units[0], units[1], 2)
        self.stage3 = _stage(blocks, units[1], units[2], 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(units[2], classes)
        init_kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to (batch, classes)."""
        features = self.relu1(self.bn1(self.conv1(images)))
        features = self.stage3(self.stage2(self.stage1(features)))
        return self.fc(self.flatten(self.pool(features)))


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def _resnet(depth: int, classes: int, channels: int, size: int, width: float) -> nn.Module:
    check_settings(f"resnet{depth}", classes=classes, channels=channels, size=size, width=width, smallest=1)
    return ResNet((depth - 2) // 6, classes, channels, width)


def resnet8(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """ResNet-8, one block a stage; takes any size of input.

    >>> import torch
    >>> resnet8(channels=1)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    return _resnet(8, classes, channels, size, width)


def resnet20(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """ResNet-20, three blocks a stage: 269,722 parameters at the defaults; takes any size of input.

    >>> sum(parameter.numel() for parameter in resnet20().parameters())
    269722
    """
    return _resnet(20, classes, channels, size, width)


def resnet32(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """ResNet-32, five blocks a stage: 464,154 parameters at the defaults; takes any size of input.

    >>> sum(parameter.numel() for parameter in resnet32().parameters())
    464154
    """
    return _resnet(32, classes, channels, size, width)


def resnet56(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """ResNet-56, nine blocks a stage: 853,018 parameters at the defaults; takes any size of input.

    >>> sum(parameter.numel() for parameter in resnet56().parameters())
    853018
    """
    return _resnet(56, classes, channels, size, width)


def resnet110(*, classes: int = 10, channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """ResNet-110, 18 blocks a stage: 1,727,962 parameters at the defaults; takes any size of input.

    >>> sum(parameter.numel() for parameter in resnet110().parameters())
    1727962
    """
    return _resnet(110, classes, channels, size, width)
