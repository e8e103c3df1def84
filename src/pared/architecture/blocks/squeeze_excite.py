"""Squeeze-and-excitation: channels weighted by what the whole picture holds (Hu et al. 2018, 1709.01507)."""

from __future__ import annotations

from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers
from pared.architecture.blocks.formulas import conv_parameters


class SqueezeExcite(nn.Module):
    """The mean of each channel, two 1x1 convolutions with biases and ReLU between, a hard sigmoid; its result scales the channels.

    MobileNetV3's form (Howard et al. 2019, 1905.02244, section 5.3): the hard sigmoid needs no exponential.

    Args:
        channels: of input and output.
        reduced: channels between the two convolutions.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> import torch
    >>> SqueezeExcite(16, 4)(torch.zeros(1, 16, 5, 5)).shape
    torch.Size([1, 16, 5, 5])
    """

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        whole_numbers("SqueezeExcite", channels=channels, reduced=reduced).raise_if_any()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        return images * self.gate(self.fc2(self.relu(self.fc1(self.pool(images)))))

    @staticmethod
    def parameters_of(channels: int, reduced: int) -> int:
        """Parameters of such a block; 0 where `reduced` is 0, which means that there is none.

        >>> SqueezeExcite.parameters_of(16, 4)
        148
        """
        return conv_parameters(channels, reduced, 1, bias=True) + conv_parameters(reduced, channels, 1, bias=True) if reduced else 0

    @staticmethod
    def macs_of(channels: int, reduced: int) -> int:
        """MACs of the two convolutions, each on one pixel; scaling the channels isn't counted, as in the papers.

        >>> SqueezeExcite.macs_of(16, 4)
        128
        """
        return 2 * channels * reduced
