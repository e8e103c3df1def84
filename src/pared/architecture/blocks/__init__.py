"""The blocks of efficient networks as plain modules, each with its counts of parameters and MACs as formulas."""

from pared.architecture.blocks.depthwise import DepthwiseSeparable, separable_ratio, separable_weights, standard_weights
from pared.architecture.blocks.fire import Fire
from pared.architecture.blocks.formulas import conv_macs, conv_parameters, norm_parameters, out_size
from pared.architecture.blocks.ghost import GhostBottleneck, GhostModule
from pared.architecture.blocks.inverted_residual import InvertedResidual, LinearBottleneck
from pared.architecture.blocks.shuffle import ChannelShuffle, channel_shuffle
from pared.architecture.blocks.shuffle_unit import ShuffleUnit
from pared.architecture.blocks.shuffle_unit_v2 import ShuffleUnitV2
from pared.architecture.blocks.squeeze_excite import SqueezeExcite
from pared.architecture.blocks.xception import SeparableConv, XceptionUnit

__all__ = [
    "ChannelShuffle",
    "DepthwiseSeparable",
    "Fire",
    "GhostBottleneck",
    "GhostModule",
    "InvertedResidual",
    "LinearBottleneck",
    "SeparableConv",
    "ShuffleUnit",
    "ShuffleUnitV2",
    "SqueezeExcite",
    "XceptionUnit",
    "channel_shuffle",
    "conv_macs",
    "conv_parameters",
    "norm_parameters",
    "out_size",
    "separable_ratio",
    "separable_weights",
    "standard_weights",
]
