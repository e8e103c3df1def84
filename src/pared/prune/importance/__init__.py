"""How much a weight or a neuron matters. Every importance is a frozen dataclass; a low score goes first.

A score of a neuron stands for a root of the analysis: a channel or hidden unit with everything that is tied to it.
"""

from typing import TypeAlias

from pared.prune.importance.activity import Activity, active_fractions
from pared.prune.importance.batch_norm_scale import BatchNormScale
from pared.prune.importance.ewc import ElasticWeightConsolidation, ewc_penalty
from pared.prune.importance.fisher import Fisher, fisher_diagonal
from pared.prune.importance.geometric_median import FPGM, GeometricMedian, distances_to_median, distances_to_others, geometric_median
from pared.prune.importance.given import Given
from pared.prune.importance.gradients import per_sample_gradients
from pared.prune.importance.hessian import HessianDiagonal, hutchinson
from pared.prune.importance.magnitude import Magnitude, row_norms
from pared.prune.importance.mas import MemoryAwareSynapses
from pared.prune.importance.mean_activation import MeanActivation
from pared.prune.importance.protocol import Importance, Scores, WeightImportance, by_root
from pared.prune.importance.random import Random
from pared.prune.importance.reconstruction import Reconstruction, energy_shares
from pared.prune.importance.synaptic import PathIntegral, SynapticIntelligence, synaptic_importance
from pared.prune.importance.taylor import Taylor

# what a recipe file can name; in Python any WeightImportance, and any Importance, will do
AnyWeightImportance: TypeAlias = (
    Magnitude | Random | Taylor | Fisher | ElasticWeightConsolidation | SynapticIntelligence | MemoryAwareSynapses | HessianDiagonal
)
AnyImportance: TypeAlias = AnyWeightImportance | Activity | MeanActivation | BatchNormScale | GeometricMedian | FPGM | Reconstruction

__all__ = [
    "FPGM", "Activity", "AnyImportance", "AnyWeightImportance", "BatchNormScale", "ElasticWeightConsolidation", "Fisher",
    "GeometricMedian", "Given", "HessianDiagonal", "Importance", "Magnitude", "MeanActivation", "MemoryAwareSynapses", "PathIntegral",
    "Random", "Reconstruction", "Scores", "SynapticIntelligence", "Taylor", "WeightImportance", "active_fractions", "by_root",
    "distances_to_median", "distances_to_others", "energy_shares", "ewc_penalty", "fisher_diagonal", "geometric_median", "hutchinson",
    "per_sample_gradients", "row_norms", "synaptic_importance",
]  # fmt: skip
