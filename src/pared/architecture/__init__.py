"""Smaller architectures: layers replaced by cheaper ones (lecture, part 4), efficient `blocks`, and the reference networks in `nets`."""

from pared.architecture import blocks, nets
from pared.architecture.low_rank import LowRank
from pared.architecture.separable import Separable, separable_convolution
from pared.architecture.thin_choice import rank_for_energy
from pared.architecture.thin_layers import (
    cp_convolution,
    merged,
    spatial_convolution,
    svd_convolution,
    svd_linear,
    tucker_convolution,
)

__all__ = [
    "LowRank",
    "Separable",
    "blocks",
    "cp_convolution",
    "merged",
    "nets",
    "rank_for_energy",
    "separable_convolution",
    "spatial_convolution",
    "svd_convolution",
    "svd_linear",
    "tucker_convolution",
]
