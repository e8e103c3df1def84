"""Depthwise separable convolution: one filter a channel, then 1x1 across channels (lecture, part 4; Howard et al. 2017, 1704.04861)."""

from __future__ import annotations

from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers
from pared.architecture.blocks.formulas import conv_macs, conv_parameters, norm_parameters, out_size


def standard_weights(inputs: int, outputs: int, kernel: int = 3) -> int:
    """Weights of a standard convolution: kernel² · inputs · outputs.

    >>> standard_weights(inputs=2, outputs=4, kernel=3)
    72
    """
    return conv_parameters(inputs, outputs, kernel)


def separable_weights(inputs: int, outputs: int, kernel: int = 3) -> int:
    """Weights of a depthwise and a pointwise convolution in its place: kernel² · inputs + inputs · outputs.

    The lecture's slide: 72 weights become 18 + 8.

    >>> separable_weights(inputs=2, outputs=4, kernel=3)
    26
    """
    return conv_parameters(inputs, inputs, kernel, groups=inputs) + conv_parameters(inputs, outputs, 1)


def separable_ratio(outputs: int, kernel: int = 3) -> float:
    """What share of a standard convolution's weights, and of its MACs, the separable one has: 1 / outputs + 1 / kernel².

    The number of inputs cancels (Howard et al. 2017, 1704.04861, section 3.1). Without biases and norms.

    >>> round(separable_ratio(outputs=4, kernel=3), 3), round(26 / 72, 3)
    (0.361, 0.361)
    """
    return 1 / outputs + 1 / kernel**2


class DepthwiseSeparable(nn.Module):
    """The unit of MobileNetV1: depthwise convolution, norm, ReLU, 1x1 convolution, norm, ReLU (1704.04861, section 3.1, figure 3).

    Args:
        inputs: channels.
        outputs: channels.
        kernel: side of the depthwise kernel, odd; 3 as in the paper.
        stride: of the depthwise convolution.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> import torch
    >>> DepthwiseSeparable(2, 4, stride=2)(torch.zeros(1, 2, 7, 7)).shape
    torch.Size([1, 4, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        whole_numbers("DepthwiseSeparable", inputs=inputs, outputs=outputs, kernel=kernel, stride=stride).raise_if_any()
        self.depthwise = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)."""
        filtered = self.relu1(self.bn1(self.depthwise(images)))
        return self.relu2(self.bn2(self.pointwise(filtered)))

    @staticmethod
    def parameters_of(inputs: int, outputs: int, *, kernel: int = 3) -> int:
        """Parameters of such a block, with its norms.

        >>> DepthwiseSeparable.parameters_of(2, 4)
        38
        """
        return separable_weights(inputs, outputs, kernel) + norm_parameters(inputs) + norm_parameters(outputs)

    @staticmethod
    def macs_of(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> DepthwiseSeparable.macs_of(2, 4, size=10)
        2600
        """
        out = out_size(size, kernel, stride)
        return conv_macs(inputs, inputs, kernel, out, groups=inputs) + conv_macs(inputs, outputs, 1, out)
