"""The unit of Xception: depthwise separable convolutions with a residual past them (Chollet 2017, 1610.02357)."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers
from pared.architecture.blocks.depthwise import separable_weights
from pared.architecture.blocks.formulas import conv_macs, conv_parameters, norm_parameters, out_size


class SeparableConv(nn.Module):
    """Depthwise and 1x1 convolution with nothing between: an activation there made Xception worse (section 4.7).

    Args:
        inputs: channels.
        outputs: channels.
        kernel: side of the depthwise kernel, odd; 3 as in the paper.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> import torch
    >>> SeparableConv(2, 4)(torch.zeros(1, 2, 7, 7)).shape
    torch.Size([1, 4, 7, 7])
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3) -> None:
        super().__init__()
        whole_numbers("SeparableConv", inputs=inputs, outputs=outputs, kernel=kernel).raise_if_any()
        self.conv1 = nn.Conv2d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height, width)."""
        return self.pointwise(self.conv1(images))

    @staticmethod
    def parameters_of(inputs: int, outputs: int, *, kernel: int = 3) -> int:
        """Parameters of such a layer; it has no norm.

        >>> SeparableConv.parameters_of(2, 4)
        26
        """
        return separable_weights(inputs, outputs, kernel)

    @staticmethod
    def macs_of(inputs: int, outputs: int, *, kernel: int = 3, size: int) -> int:
        """MACs of such a layer for one square picture of `size` pixels a side.

        >>> SeparableConv.macs_of(2, 4, size=10)
        2600
        """
        return separable_weights(inputs, outputs, kernel) * size * size


class XceptionUnit(nn.Module):
    """Separable convolutions, each with ReLU before and a norm after, then max pooling where the stride is 2; and a shortcut (figure 5).

    The shortcut is the input, or a 1x1 convolution with norm where stride or channels change. No activation follows the sum.

    Args:
        inputs: channels.
        outputs: channels.
        repeats: separable convolutions; 2 in the entry and the exit, 3 in the middle.
        stride: 1, or 2 for a 3x3 pooling.
        relu_first: False leaves out the ReLU before the first convolution, as the first unit of the net does.
        widen_first: whether the first convolution goes from inputs to outputs, as in the entry, or the last, as in the exit.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> import torch
    >>> XceptionUnit(8, 16, stride=2)(torch.zeros(1, 8, 9, 9)).shape
    torch.Size([1, 16, 5, 5])
    """

    def __init__(
        self, inputs: int, outputs: int, *, repeats: int = 2, stride: int = 1, relu_first: bool = True, widen_first: bool = True
    ) -> None:
        super().__init__()
        problems = whole_numbers("XceptionUnit", inputs=inputs, outputs=outputs, repeats=repeats)
        problems.check(stride in (1, 2), "stride", "1 or 2", stride)
        problems.raise_if_any()
        layers: list[nn.Module] = []
        for before, after in _widths(inputs, outputs, repeats, widen_first):
            layers += [nn.ReLU()] if layers or relu_first else []
            layers += [SeparableConv(before, after), nn.BatchNorm2d(after)]
        layers += [nn.MaxPool2d(3, 2, 1)] if stride == 2 else []
        self.rep = nn.Sequential(*layers)
        changes = stride == 2 or inputs != outputs
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()
        self.skipbn = nn.BatchNorm2d(outputs) if changes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)."""
        return self.rep(images) + self.skipbn(self.skip(images))

    @staticmethod
    def parameters_of(inputs: int, outputs: int, *, repeats: int = 2, stride: int = 1, widen_first: bool = True) -> int:
        """Parameters of such a block, with its norms.

        >>> XceptionUnit.parameters_of(728, 728, repeats=3)
        1613976
        """
        pairs = _widths(inputs, outputs, repeats, widen_first)
        total = sum(SeparableConv.parameters_of(before, after) + norm_parameters(after) for before, after in pairs)
        changes = stride == 2 or inputs != outputs
        return total + (conv_parameters(inputs, outputs, 1) + norm_parameters(outputs) if changes else 0)

    @staticmethod
    def macs_of(inputs: int, outputs: int, *, repeats: int = 2, stride: int = 1, widen_first: bool = True, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> XceptionUnit.macs_of(728, 728, repeats=3, size=19)
        581068488
        """
        pairs = _widths(inputs, outputs, repeats, widen_first)
        total = sum(SeparableConv.macs_of(before, after, size=size) for before, after in pairs)
        changes = stride == 2 or inputs != outputs
        return total + (conv_macs(inputs, outputs, 1, out_size(size, 1, stride)) if changes else 0)


def _widths(inputs: int, outputs: int, repeats: int, widen_first: bool) -> list[tuple[int, int]]:
    """Channels before and after each separable convolution."""
    between = outputs if widen_first else inputs
    channels = [inputs, *[between] * (repeats - 1), outputs]
    return list(itertools.pairwise(channels))
