"""Inverted residuals with linear bottlenecks: wide inside, narrow outside (MobileNetV2 and V3)."""

from __future__ import annotations

from torch import Tensor, nn

from pared.architecture.blocks.checks import whole_numbers
from pared.architecture.blocks.conv_norm import Activation, Norm, conv_norm
from pared.architecture.blocks.formulas import conv_macs, conv_parameters, norm_parameters, out_size
from pared.architecture.blocks.squeeze_excite import SqueezeExcite


class InvertedResidual(nn.Module):
    """1x1 convolution up, depthwise convolution, 1x1 convolution down that stays linear (Sandler et al. 2018, 1801.04381, section 3.3).

    MobileNetV3 adds squeeze-and-excitation after the depthwise convolution and another activation (Howard et al. 2019, 1905.02244,
    figure 4). No activation follows the last norm: ReLU would lose information in so few channels. The input is added at stride 1 and equal
    channels only. Without expansion (`expanded` equal to `inputs`) the first convolution is left out.

    Args:
        inputs: channels.
        expanded: channels of the depthwise convolution.
        outputs: channels.
        kernel: side of the depthwise kernel, odd; 3 as in MobileNetV2.
        stride: of the depthwise convolution.
        reduced: channels within squeeze-and-excitation; 0 (none), as in MobileNetV2.
        activation: makes the activations; ReLU6, as in MobileNetV2.
        norm: makes the norm for a number of channels.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> import torch
    >>> InvertedResidual(16, 64, 24, kernel=5, stride=2, reduced=16, activation=nn.Hardswish)(torch.zeros(1, 16, 9, 9)).shape
    torch.Size([1, 24, 5, 5])
    """

    def __init__(
        self,
        inputs: int,
        expanded: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        reduced: int = 0,
        activation: Activation = nn.ReLU6,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        problems = whole_numbers("InvertedResidual", inputs=inputs, expanded=expanded, outputs=outputs, kernel=kernel, stride=stride)
        problems.number("reduced", reduced, low=0, integer=True)
        problems.raise_if_any()
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(conv_norm(inputs, expanded, activation=activation, norm=norm))
        layers.append(conv_norm(expanded, expanded, kernel, stride=stride, groups=expanded, activation=activation, norm=norm))
        if reduced:
            layers.append(SqueezeExcite(expanded, reduced))
        layers.append(conv_norm(expanded, outputs, activation=None, norm=norm))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)."""
        result = self.block(images)
        return images + result if self.residual else result

    @staticmethod
    def parameters_of(inputs: int, expanded: int, outputs: int, *, kernel: int = 3, reduced: int = 0) -> int:
        """Parameters of such a block, with its norms.

        >>> InvertedResidual.parameters_of(24, 144, 24)
        8832
        """
        expand = conv_parameters(inputs, expanded, 1) + norm_parameters(expanded) if expanded != inputs else 0
        depthwise = conv_parameters(expanded, expanded, kernel, groups=expanded) + norm_parameters(expanded)
        project = conv_parameters(expanded, outputs, 1) + norm_parameters(outputs)
        return expand + depthwise + SqueezeExcite.parameters_of(expanded, reduced) + project

    @staticmethod
    def macs_of(inputs: int, expanded: int, outputs: int, *, kernel: int = 3, stride: int = 1, reduced: int = 0, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> InvertedResidual.macs_of(24, 144, 24, size=56)
        25740288
        """
        out = out_size(size, kernel, stride)
        expand = conv_macs(inputs, expanded, 1, size) if expanded != inputs else 0
        depthwise = conv_macs(expanded, expanded, kernel, out, groups=expanded)
        return expand + depthwise + SqueezeExcite.macs_of(expanded, reduced) + conv_macs(expanded, outputs, 1, out)


class LinearBottleneck(nn.Module):
    """MobileNetV2's inverted residual, given by its factor of expansion (1801.04381, section 3.3, table 1).

    It computes what `InvertedResidual` computes with a 3x3 kernel and ReLU6. Its layers bear the names that released weights of MobileNetV2
    have, and those of `InvertedResidual` the names of MobileNetV3's.

    Args:
        inputs: channels.
        outputs: channels.
        expansion: the depthwise convolution has `expansion` times `inputs` channels; 6 in most of MobileNetV2.
        stride: of the depthwise convolution.

    Raises:
        SettingsError: naming all settings that are wrong.

    >>> import torch
    >>> LinearBottleneck(16, 24, stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 24, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, expansion: int = 6, stride: int = 1) -> None:
        super().__init__()
        whole_numbers("LinearBottleneck", inputs=inputs, outputs=outputs, expansion=expansion, stride=stride).raise_if_any()
        expanded = expansion * inputs
        expand = [conv_norm(inputs, expanded, activation=nn.ReLU6)] if expansion != 1 else []
        depthwise = conv_norm(expanded, expanded, 3, stride=stride, groups=expanded, activation=nn.ReLU6)
        self.conv = nn.Sequential(*expand, depthwise, nn.Conv2d(expanded, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, ⌈height/stride⌉, ⌈width/stride⌉)."""
        result = self.conv(images)
        return images + result if self.residual else result

    @staticmethod
    def parameters_of(inputs: int, outputs: int, *, expansion: int = 6) -> int:
        """Parameters of such a block, with its norms.

        >>> LinearBottleneck.parameters_of(32, 16, expansion=1)
        896
        """
        return InvertedResidual.parameters_of(inputs, expansion * inputs, outputs)

    @staticmethod
    def macs_of(inputs: int, outputs: int, *, expansion: int = 6, stride: int = 1, size: int) -> int:
        """MACs of such a block for one square picture of `size` pixels a side.

        >>> LinearBottleneck.macs_of(32, 16, expansion=1, size=112)
        10035200
        """
        return InvertedResidual.macs_of(inputs, expansion * inputs, outputs, stride=stride, size=size)
