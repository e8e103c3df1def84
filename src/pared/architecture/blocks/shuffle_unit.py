"""The unit of ShuffleNetV1: grouped 1x1 convolutions with a channel shuffle between (Zhang et al. 2018, 1707.01083)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers
from pared.architecture.blocks.formulas import conv_macs, conv_parameters, norm_parameters, out_size
from pared.architecture.blocks.shuffle import ChannelShuffle


class ShuffleUnit(nn.Module):
    """Grouped 1x1 convolution to outputs / 4 channels, shuffle, 3x3 depthwise convolution, grouped 1x1 convolution (section 3.2, figure 2).

    At stride 1 the input is added; at stride 2 the averaged input is laid beside the result, so the branch gives outputs - inputs channels.
    No activation follows the depthwise convolution.

    Args:
        inputs: channels.
        outputs: channels, a multiple of 4 · groups; equal to `inputs` at stride 1, more than `inputs` at stride 2.
        groups: of the 1x1 convolutions; 3, in the middle of the 1 to 8 that the paper tries.
        stride: 1 or 2.
        first_groups: of the first convolution. None: `groups`. The first unit of the net takes 1, as it has few inputs (section 3.3).
        shuffle: False leaves the shuffle out, for comparison only: then no group learns of another one.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> ShuffleUnit(24, 240, stride=2, first_groups=1)(torch.zeros(1, 24, 8, 8)).shape
    torch.Size([1, 240, 4, 4])
    """

    def __init__(
        self, inputs: int, outputs: int, *, groups: int = 3, stride: int = 1, first_groups: int | None = None, shuffle: bool = True
    ) -> None:
        super().__init__()
        first = groups if first_groups is None else first_groups
        _check(inputs, outputs, groups, stride, first)
        middle, added = _widths(inputs, outputs, stride)
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=first, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.relu1 = nn.ReLU()
        self.shuffle = ChannelShuffle(groups) if shuffle and groups > 1 else nn.Identity()
        self.depthwise = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, added, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(added)
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.relu2 = nn.ReLU()
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)."""
        middle = self.shuffle(self.relu1(self.bn1(self.conv1(images))))
        branch = self.bn3(self.conv3(self.bn2(self.depthwise(middle))))
        shortcut = self.pool(images)
        return self.relu2(torch.cat([shortcut, branch], 1) if self.stride == 2 else shortcut + branch)

    @staticmethod
    def parameters_of(inputs: int, outputs: int, *, groups: int = 3, stride: int = 1, first_groups: int | None = None) -> int:
        """Parameters of such a block, with its norms.

        >>> ShuffleUnit.parameters_of(240, 240)
        10860
        """
        middle, added = _widths(inputs, outputs, stride)
        first = conv_parameters(inputs, middle, 1, groups=groups if first_groups is None else first_groups)
        depthwise = conv_parameters(middle, middle, 3, groups=middle)
        last = conv_parameters(middle, added, 1, groups=groups)
        return first + depthwise + last + 2 * norm_parameters(middle) + norm_parameters(added)

    @staticmethod
    def macs_of(inputs: int, outputs: int, *, groups: int = 3, stride: int = 1, first_groups: int | None = None, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> ShuffleUnit.macs_of(240, 240, size=28)
        7949760
        """
        middle, added = _widths(inputs, outputs, stride)
        out = out_size(size, 3, stride)
        first = conv_macs(inputs, middle, 1, size, groups=groups if first_groups is None else first_groups)
        return first + conv_macs(middle, middle, 3, out, groups=middle) + conv_macs(middle, added, 1, out, groups=groups)


def _widths(inputs: int, outputs: int, stride: int) -> tuple[int, int]:
    """Channels of the bottleneck, and those that the branch gives."""
    return outputs // 4, outputs - inputs if stride == 2 else outputs


def _check(inputs: int, outputs: int, groups: int, stride: int, first_groups: int) -> None:
    problems = whole_numbers("ShuffleUnit", inputs=inputs, outputs=outputs, groups=groups, first_groups=first_groups)
    problems.check(stride in (1, 2), "stride", "1 or 2", stride)
    problems.raise_if_any()
    problems.check(outputs % (4 * groups) == 0, "outputs", f"a multiple of 4 · groups ({4 * groups})", outputs)
    problems.check(inputs % first_groups == 0, "inputs", f"a multiple of first_groups ({first_groups})", inputs)
    problems.check(outputs // 4 % first_groups == 0, "outputs / 4", f"a multiple of first_groups ({first_groups})", outputs / 4)
    if stride == 1:
        problems.check(inputs == outputs, "outputs", f"inputs ({inputs}) at stride 1", outputs)
    else:
        problems.check(outputs > inputs, "outputs", f"more than inputs ({inputs}) at stride 2", outputs)
        problems.check((outputs - inputs) % groups == 0, "outputs - inputs", f"a multiple of groups ({groups})", outputs - inputs)
    problems.raise_if_any()
