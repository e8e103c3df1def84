"""Ghost module: part of the channels is convolved, the rest made from them cheaply (GhostNet; Han et al. 2020, 1911.11907)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers
from pared.architecture.blocks.conv_norm import Activation, conv_norm
from pared.architecture.blocks.formulas import conv_macs, conv_parameters, norm_parameters, out_size
from pared.architecture.blocks.squeeze_excite import SqueezeExcite


class GhostModule(nn.Module):
    """1x1 convolution to outputs / ratio channels, and a depthwise one that makes the others from these (section 3.1, figure 1).

    Where outputs isn't a multiple of the ratio, the convolution rounds up and channels too many are cut off the end.

    Args:
        inputs: channels.
        outputs: channels.
        ratio: outputs for each channel of the 1x1 convolution; 2 as in the paper.
        kernel: side of the depthwise kernel, odd; 3 as in the paper.
        activation: makes the activation after both; None for the module that ends a bottleneck.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> GhostModule(8, 15)(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 15, 5, 5])
    """

    def __init__(self, inputs: int, outputs: int, *, ratio: int = 2, kernel: int = 3, activation: Activation | None = nn.ReLU) -> None:
        super().__init__()
        problems = whole_numbers("GhostModule", inputs=inputs, outputs=outputs, ratio=ratio, kernel=kernel)
        problems.number("ratio", ratio, low=2, integer=True)
        problems.raise_if_any()
        primary, cheap = _split(outputs, ratio)
        self.primary_conv = conv_norm(inputs, primary, activation=activation)
        self.cheap_operation = conv_norm(primary, cheap, kernel, groups=primary, activation=activation)
        self.outputs = outputs
        self.surplus = primary + cheap - outputs

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height, width)."""
        primary = self.primary_conv(images)
        every = torch.cat([primary, self.cheap_operation(primary)], 1)
        return every[:, : self.outputs] if self.surplus else every

    @staticmethod
    def parameters_of(inputs: int, outputs: int, *, ratio: int = 2, kernel: int = 3) -> int:
        """Parameters of such a block, with its norms.

        >>> GhostModule.parameters_of(16, 16)
        232
        """
        primary, cheap = _split(outputs, ratio)
        convolutions = conv_parameters(inputs, primary, 1) + conv_parameters(primary, cheap, kernel, groups=primary)
        return convolutions + norm_parameters(primary) + norm_parameters(cheap)

    @staticmethod
    def macs_of(inputs: int, outputs: int, *, ratio: int = 2, kernel: int = 3, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> GhostModule.macs_of(16, 16, size=112)
        2508800
        """
        primary, cheap = _split(outputs, ratio)
        return conv_macs(inputs, primary, 1, size) + conv_macs(primary, cheap, kernel, size, groups=primary)


def _split(outputs: int, ratio: int) -> tuple[int, int]:
    """Channels that are convolved, and those that are made from them."""
    primary = -(-outputs // ratio)
    return primary, primary * (ratio - 1)


class GhostExcite(nn.Module):
    """`SqueezeExcite` under the names that GhostNet's released weights have.

    Args:
        channels: of input and output.
        reduced: channels between the two convolutions.

    >>> GhostExcite(16, 4)(torch.zeros(1, 16, 5, 5)).shape
    torch.Size([1, 16, 5, 5])
    """

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.relu = nn.ReLU()
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        return images * self.gate(self.conv_expand(self.relu(self.conv_reduce(self.pool(images)))))


class GhostBottleneck(nn.Module):
    """A ghost module up, a depthwise convolution where the stride is 2, a ghost module down that stays linear, and a shortcut (figure 3).

    The shortcut is the input at stride 1 and equal channels, else a depthwise and a 1x1 convolution, both with norms only.

    Args:
        inputs: channels.
        expanded: channels between the two ghost modules.
        outputs: channels.
        kernel: side of the depthwise kernels, odd; 3 as in most of GhostNet.
        stride: 1 or 2.
        reduced: channels within squeeze-and-excitation; 0 (none), as in most of GhostNet.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> GhostBottleneck(16, 48, 24, stride=2)(torch.zeros(1, 16, 9, 9)).shape
    torch.Size([1, 24, 5, 5])
    """

    def __init__(self, inputs: int, expanded: int, outputs: int, *, kernel: int = 3, stride: int = 1, reduced: int = 0) -> None:
        super().__init__()
        problems = whole_numbers("GhostBottleneck", inputs=inputs, expanded=expanded, outputs=outputs, kernel=kernel)
        problems.number("reduced", reduced, low=0, integer=True)
        problems.check(stride in (1, 2), "stride", "1 or 2", stride)
        problems.raise_if_any()
        self.ghost1 = GhostModule(inputs, expanded)
        reduces = stride > 1
        self.conv_dw = nn.Conv2d(expanded, expanded, kernel, stride, kernel // 2, groups=expanded, bias=False) if reduces else nn.Identity()
        self.bn_dw = nn.BatchNorm2d(expanded) if reduces else nn.Identity()
        self.se = GhostExcite(expanded, reduced) if reduced else nn.Identity()
        self.ghost2 = GhostModule(expanded, outputs, activation=None)
        self.shortcut = nn.Sequential()
        if reduces or inputs != outputs:
            depthwise = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
            pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(depthwise, nn.BatchNorm2d(inputs), pointwise, nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)."""
        result = self.ghost2(self.se(self.bn_dw(self.conv_dw(self.ghost1(images)))))
        return result + self.shortcut(images)

    @staticmethod
    def parameters_of(inputs: int, expanded: int, outputs: int, *, kernel: int = 3, stride: int = 1, reduced: int = 0) -> int:
        """Parameters of such a block, with its norms.

        >>> GhostBottleneck.parameters_of(16, 16, 16)
        464
        """

        def depthwise(channels: int) -> int:
            return conv_parameters(channels, channels, kernel, groups=channels) + norm_parameters(channels)

        total = GhostModule.parameters_of(inputs, expanded) + GhostModule.parameters_of(expanded, outputs)
        total += SqueezeExcite.parameters_of(expanded, reduced) + (depthwise(expanded) if stride > 1 else 0)
        if stride > 1 or inputs != outputs:
            total += depthwise(inputs) + conv_parameters(inputs, outputs, 1) + norm_parameters(outputs)
        return total

    @staticmethod
    def macs_of(inputs: int, expanded: int, outputs: int, *, kernel: int = 3, stride: int = 1, reduced: int = 0, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> GhostBottleneck.macs_of(16, 16, 16, size=112)
        5017600
        """
        out = out_size(size, kernel, stride)
        total = GhostModule.macs_of(inputs, expanded, size=size) + GhostModule.macs_of(expanded, outputs, size=out)
        total += SqueezeExcite.macs_of(expanded, reduced) + (
            conv_macs(expanded, expanded, kernel, out, groups=expanded) if stride > 1 else 0
        )
        if stride > 1 or inputs != outputs:
            total += conv_macs(inputs, inputs, kernel, out, groups=inputs) + conv_macs(inputs, outputs, 1, out)
        return total
