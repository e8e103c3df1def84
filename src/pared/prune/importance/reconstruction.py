"""How much of what the next layers compute comes from a neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pared.graph.analysis import Analysis
from pared.prune.importance.protocol import Normalize, Scores, check_samples
from pared.prune.importance.readers import readers
from pared.prune.importance.samples import training_samples
from pared.prune.importance.sums import observe, with_magnitude
from pared.training import Task, sum_over_processes


def energy_shares(second_moments: Tensor, weight_energy: Tensor) -> Tensor:
    """The share of each input in a layer's output energy: E[a²] · Σ w² over the weights that read it, divided by the sum of all.

    Args:
        second_moments: mean squares of the inputs, of shape (n,).
        weight_energy: sums of squares of the weights that read them, of shape (n,).

    >>> energy_shares(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).tolist()
    [0.25, 0.75]
    """
    energy = second_moments * weight_energy
    total = energy.sum()
    return energy / total if total > 0 else energy


@dataclass(frozen=True)
class Reconstruction:
    """The share of the next layers' output energy that a neuron brings in, summed over the layers that read it. Needs no labels.

    Removing input j of a layer with weight W changes its outputs by W_j a_j, in mean square ‖W_j‖² E[a_j²] for a linear layer. That is what
    reconstruction criteria such as ThiNet's (Luo et al., 1707.06342, section 3.2) minimise, here neuron by neuron: products of different
    inputs, and of neighbouring positions in a convolution, are left out. Neurons that nothing with a weight reads (the width of
    queries and keys) are ranked by `Magnitude`, as a class.

    Args:
        samples: how many training samples to look at; their labels aren't.
        normalize: "none" by default: a share of what a layer computes compares over layers; "layer" divides by the mean of a class.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task, or if its training split is empty.

    >>> Reconstruction(samples=256).samples
    256
    """

    samples: int = 512
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        check_samples("importance.reconstruction", self.samples, self.normalize).raise_if_any()

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Run the graph on training data and compare energies."""
        where = "importance.reconstruction"
        batches = training_samples(task, self.samples, analysis.captured.module, where)
        found = readers(analysis)
        squares = {node: torch.zeros(len(reader.atoms) + 1, dtype=torch.float64) for node, reader in found.items()}
        weights = {node: torch.zeros(len(reader.atoms), dtype=torch.float64) for node, reader in found.items()}

        def see(node: fx.Node, arguments: tuple[Any, ...], value: Any) -> None:
            reader = found[node]
            values = arguments[reader.source].double().square().movedim(reader.axis, 0).flatten(start_dim=1)
            squares[node] += torch.cat([values.sum(dim=1), values.new_tensor([values.shape[1]])]).cpu()
            weights[node] = reader.energy(arguments[reader.weight]).cpu()

        device = observe(analysis, (inputs for inputs, _ in batches), found, see, where)
        scores, known = np.zeros(analysis.first.count), np.zeros(analysis.first.count, bool)
        for node, reader in found.items():
            total = sum_over_processes(squares[node], device)
            shares = energy_shares(total[:-1] / total[-1].clamp(min=1), weights[node])
            np.add.at(scores, analysis.root[reader.atoms], shares.numpy())
            known[analysis.root[reader.atoms]] = True
        return with_magnitude(analysis, scores, known, self.normalize)
