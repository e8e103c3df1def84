"""The unit of ShuffleNetV2: half the channels pass by, then a shuffle (Ma et al. 2018, 1807.11164)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers
from pared.architecture.blocks.formulas import conv_macs, conv_parameters, norm_parameters, out_size
from pared.architecture.blocks.shuffle import ChannelShuffle


class ShuffleUnitV2(nn.Module):
    """Half of the channels go through 1x1, 3x3 depthwise and 1x1 convolutions, the others pass (section 3.2, figure 3).

    At stride 2 two branches read all channels. The halves are laid side by side and shuffled by two groups. No
    activation follows the depthwise convolutions.

    Args:
        inputs: channels; equal to `outputs` at stride 1.
        outputs: channels, even.
        stride: 1 or 2.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> ShuffleUnitV2(24, 116, stride=2)(torch.zeros(1, 24, 8, 8)).shape
    torch.Size([1, 116, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        _check(inputs, outputs, stride)
        half = outputs // 2
        self.branch1 = nn.Sequential(*(_depthwise(inputs, stride) + _pointwise(inputs, half) if stride == 2 else []))
        first = _pointwise(inputs if stride == 2 else half, half)
        self.branch2 = nn.Sequential(*first, *_depthwise(half, stride), *_pointwise(half, half))
        self.shuffle = ChannelShuffle(2)
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)."""
        passed, computed = images.chunk(2, 1) if self.stride == 1 else (images, images)
        return self.shuffle(torch.cat([self.branch1(passed), self.branch2(computed)], 1))

    @staticmethod
    def parameters_of(inputs: int, outputs: int, *, stride: int = 1) -> int:
        """Parameters of such a block, with its norms.

        >>> ShuffleUnitV2.parameters_of(116, 116)
        7598
        """
        half = outputs // 2
        read = inputs if stride == 2 else half
        depthwise = conv_parameters(half, half, 3, groups=half) + norm_parameters(half)
        branch = conv_parameters(read, half, 1) + depthwise + conv_parameters(half, half, 1) + 2 * norm_parameters(half)
        if stride == 1:
            return branch
        reduced = conv_parameters(inputs, inputs, 3, groups=inputs) + norm_parameters(inputs)
        return branch + reduced + conv_parameters(inputs, half, 1) + norm_parameters(half)

    @staticmethod
    def macs_of(inputs: int, outputs: int, *, stride: int = 1, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> ShuffleUnitV2.macs_of(116, 116, size=28)
        5684000
        """
        half, out = outputs // 2, out_size(size, 3, stride)
        read = inputs if stride == 2 else half
        branch = conv_macs(read, half, 1, size) + conv_macs(half, half, 3, out, groups=half) + conv_macs(half, half, 1, out)
        return branch if stride == 1 else branch + conv_macs(inputs, inputs, 3, out, groups=inputs) + conv_macs(inputs, half, 1, out)


def _pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]


def _check(inputs: int, outputs: int, stride: int) -> None:
    problems = whole_numbers("ShuffleUnitV2", inputs=inputs, outputs=outputs)
    problems.check(stride in (1, 2), "stride", "1 or 2", stride)
    problems.raise_if_any()
    problems.check(outputs % 2 == 0, "outputs", "even", outputs)
    problems.check(stride == 2 or inputs == outputs, "outputs", f"inputs ({inputs}) at stride 1", outputs)
    problems.raise_if_any()
