"""Pruning: weights and neurons, by importance, in one shot or in rounds."""

from pared.prune.blocks import Blocks, Removal, Similarity
from pared.prune.chooser import Plan, cut, plan
from pared.prune.group_lasso import GroupLasso
from pared.prune.growing import GrowingRegularization
from pared.prune.importance import (
    FPGM,
    Activity,
    BatchNormScale,
    ElasticWeightConsolidation,
    Fisher,
    GeometricMedian,
    Given,
    HessianDiagonal,
    Magnitude,
    MeanActivation,
    MemoryAwareSynapses,
    PathIntegral,
    Random,
    Reconstruction,
    SynapticIntelligence,
    Taylor,
    ewc_penalty,
)
from pared.prune.least_squares import RepairedLayer, reconstruct
from pared.prune.movement import Movement
from pared.prune.neurons import Neurons
from pared.prune.obs import obs_prune
from pared.prune.regrow import Regrow
from pared.prune.repair import recalibrate
from pared.prune.weights import Weights, select

__all__ = [
    "FPGM",
    "Activity",
    "BatchNormScale",
    "Blocks",
    "ElasticWeightConsolidation",
    "Fisher",
    "GeometricMedian",
    "Given",
    "GroupLasso",
    "GrowingRegularization",
    "HessianDiagonal",
    "Magnitude",
    "MeanActivation",
    "MemoryAwareSynapses",
    "Movement",
    "Neurons",
    "PathIntegral",
    "Plan",
    "Random",
    "Reconstruction",
    "Regrow",
    "Removal",
    "RepairedLayer",
    "Similarity",
    "SynapticIntelligence",
    "Taylor",
    "Weights",
    "cut",
    "ewc_penalty",
    "obs_prune",
    "plan",
    "recalibrate",
    "reconstruct",
    "select",
]
