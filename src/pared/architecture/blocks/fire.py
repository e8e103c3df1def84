"""Fire: few channels between, and a 1x1 and a 3x3 convolution side by side (SqueezeNet; Iandola et al. 2016, 1602.07360)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers
from pared.architecture.blocks.formulas import conv_macs, conv_parameters


class Fire(nn.Module):
    """1x1 convolution to `squeezed` channels and ReLU, then 1x1 and 3x3 convolutions with ReLU, laid side by side (section 3.2, figure 1).

    The convolutions have biases and there is no batch normalisation, as in the paper.

    Args:
        inputs: channels.
        squeezed: channels between; fewer than the outputs, so that the 3x3 convolution has little to read.
        expanded1: outputs of the 1x1 convolution.
        expanded3: outputs of the 3x3 convolution.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> Fire(96, 16, 64, 64)(torch.zeros(1, 96, 5, 5)).shape
    torch.Size([1, 128, 5, 5])
    """

    def __init__(self, inputs: int, squeezed: int, expanded1: int, expanded3: int) -> None:
        super().__init__()
        whole_numbers("Fire", inputs=inputs, squeezed=squeezed, expanded1=expanded1, expanded3=expanded3).raise_if_any()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.squeeze_activation = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeezed, expanded1, 1)
        self.expand1x1_activation = nn.ReLU()
        self.expand3x3 = nn.Conv2d(squeezed, expanded3, 3, padding=1)
        self.expand3x3_activation = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, expanded1 + expanded3, height, width)."""
        few = self.squeeze_activation(self.squeeze(images))
        return torch.cat([self.expand1x1_activation(self.expand1x1(few)), self.expand3x3_activation(self.expand3x3(few))], 1)

    @staticmethod
    def parameters_of(inputs: int, squeezed: int, expanded1: int, expanded3: int) -> int:
        """Parameters of such a block, with its biases.

        >>> Fire.parameters_of(96, 16, 64, 64)
        11920
        """
        expanded = conv_parameters(squeezed, expanded1, 1, bias=True) + conv_parameters(squeezed, expanded3, 3, bias=True)
        return conv_parameters(inputs, squeezed, 1, bias=True) + expanded

    @staticmethod
    def macs_of(inputs: int, squeezed: int, expanded1: int, expanded3: int, *, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> Fire.macs_of(96, 16, 64, 64, size=54)
        34338816
        """
        expanded = conv_macs(squeezed, expanded1, 1, size) + conv_macs(squeezed, expanded3, 3, size)
        return conv_macs(inputs, squeezed, 1, size) + expanded
