"""Smaller architectures (lecture, part 4): cheaper layers, `blocks` of efficient networks, the networks of the papers in `nets`."""

from pared.architecture import blocks, nets
from pared.architecture.low_rank import LowRank, rank_for_energy, svd_convolution, svd_linear

__all__ = ["LowRank", "blocks", "nets", "rank_for_energy", "svd_convolution", "svd_linear"]
