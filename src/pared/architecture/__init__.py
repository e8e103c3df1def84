"""Smaller architectures: layers replaced by cheaper ones (lecture, part 4), and the reference networks in `nets`."""

from pared.architecture.low_rank import LowRank, rank_for_energy, svd_convolution, svd_linear

__all__ = ["LowRank", "rank_for_energy", "svd_convolution", "svd_linear"]
