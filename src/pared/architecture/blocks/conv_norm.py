"""The triple of which most blocks are made: convolution, batch normalisation, activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import nn

Activation: TypeAlias = Callable[[], nn.Module]
Norm: TypeAlias = Callable[[int], nn.Module]


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Activation | None = nn.ReLU,
    norm: Norm = nn.BatchNorm2d,
) -> nn.Sequential:
    """A convolution without bias that keeps the size at stride 1, a norm and an activation.

    Args:
        inputs: channels.
        outputs: channels.
        kernel: side of the kernel, odd.
        stride: of the convolution.
        groups: of the convolution.
        activation: makes the last module; None leaves the output linear.
        norm: makes the norm for a number of channels.

    >>> [type(part).__name__ for part in conv_norm(3, 8, 3)]
    ['Conv2d', 'BatchNorm2d', 'ReLU']
    """
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, norm(outputs), *([] if activation is None else [activation()]))
