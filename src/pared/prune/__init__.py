"""Pruning: weights and neurons, by importance, in one shot or in rounds."""

from pared.prune.chooser import Plan, cut, plan
from pared.prune.importance import Activity, Magnitude, Random
from pared.prune.neurons import Neurons
from pared.prune.weights import Weights, select

__all__ = ["Activity", "Magnitude", "Neurons", "Plan", "Random", "Weights", "cut", "plan", "select"]
