"""Weight sharing: the weights of a layer take few different values, which are trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pared.core.errors import WeightsError
from pared.core.layers import Layer, compressible, join_weight, split_weight, stored
from pared.core.problems import Problems
from pared.core.rules import find_rule
from pared.quantize.kmeans import Start, kmeans, nearest, optimal_kmeans
from pared.quantize.shared import Shared, share, unshare
from pared.training import Task, Train


@dataclass(frozen=True)
class Clusters:
    """Cluster the weights of each convolution and linear layer, share one value in each cluster, and train the shared values.

    Weight sharing of Deep Compression (Han et al. 2016, 1510.00149, section 3): k-means on a layer's weights, then training in which
    the gradient of a shared value is the sum over its weights and no weight changes its cluster. Zeros are left out of the clustering
    and are held at exactly zero, so a layer that was pruned before stays as sparse and has at most 2^bits values besides. Other
    parameters stay as they are. The clusters hold through all later steps; `bake` leaves ordinary tensors of few different values.
    Neither weights nor neurons can be pruned from clusters, so that comes first.

    Gradients are sums, of thousands of weights in a large layer, so SGD wants a far smaller learning rate than for the weights
    themselves; Adam, the default of a plan, doesn't mind.

    Args:
        bits: of linear layers: their non-zero weights share 2^bits values. 5 is the paper's for LeNet-5, AlexNet and VGG-16.
        convolution_bits: of convolutions, which bear less; 8 in the paper.
        rows: how many outputs share a table of values, for finer clusters of larger tables; None: all of a layer, as in the paper.
        start: "linear", "density" or "forgy": where Lloyd's algorithm begins, see `initial_centroids`. The paper finds "linear" best,
            since it serves the few large weights. "optimal": the least squared error there is, see `optimal_kmeans`.
        tune: training afterwards, such as "2ep"; None leaves the shared values at the means of their weights.
        centroids_only: tune nothing but the shared values. By default biases and norms are tuned with them, as is every parameter
            that isn't clustered.
        leave: paths of modules whose weights aren't clustered, with all that is inside them.

    Raises:
        SettingsError: for a wrong setting, a path in `leave` that the model doesn't have, a model without a layer to cluster, or a
            weight that is computed from other parameters (weight_norm, spectral_norm, a grid of bits).
        WeightsError: if a weight is NaN or infinite.

    The 4 × 4 weights of the lecture's slide, whose best four clusters are known:

    >>> from pared.core.rules import bake
    >>> layer, task = nn.Linear(4, 4), Task(*[[(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]] * 3)
    >>> slide = [[0.5, 1.3, 4.3, -0.1], [0.1, -0.2, -1.2, 0.3], [1.0, 3.0, -0.4, 0.1], [-0.5, -0.1, -3.4, -5.0]]
    >>> layer.weight = nn.Parameter(torch.tensor(slide))
    >>> small = bake(Clusters(bits=2, start="optimal")(layer, task))
    >>> [round(value, 4) for value in small.weight.unique().tolist()]
    [-4.2, -0.2875, 0.775, 3.65]
    >>> round((small.weight - layer.weight).square().sum().item(), 3)
    4.021
    """

    bits: int = 5
    convolution_bits: int = 8
    rows: int | None = None
    start: Literal["linear", "density", "forgy", "optimal"] = "linear"
    tune: Train | None = None
    centroids_only: bool = False
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("quantize.clusters")
        problems.number("bits", self.bits, low=1, high=8, integer=True)
        problems.number("convolution_bits", self.convolution_bits, low=1, high=8, integer=True)
        if self.rows is not None:
            problems.number("rows", self.rows, low=1, integer=True)
        starts = ("linear", "density", "forgy", "optimal")
        problems.check(self.start in starts, "start", "linear, density, forgy or optimal", self.start)
        problems.check(isinstance(self.centroids_only, bool), "centroids_only", "true or false", self.centroids_only)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` whose weights share their values, tuned."""
        model = copy.deepcopy(model)
        layers = compressible(model, self.leave, "quantize.clusters", _behind)
        for layer in layers.values():
            if isinstance(rule := find_rule(layer, "weight", Shared), Shared):
                unshare(model, layer, rule)  # the clusters of an earlier step
        for path, layer in layers.items():
            if not bool(torch.isfinite(layer.weight).all()):
                raise WeightsError(f"quantize.clusters: {path or 'the model'}.weight contains NaN or infinity. Load other weights.")
        for layer in layers.values():
            bits = self.bits if isinstance(layer, nn.Linear) else self.convolution_bits
            share(model, layer, Shared(cluster_index(layer, 2**bits, self.rows, self.start)))
        if self.tune is not None:
            with _frozen(model, layers) if self.centroids_only else nullcontext():
                task.tune(model, self.tune)
        return model


def cluster_index(layer: Layer, count: int, rows: int | None = None, start: Start | Literal["optimal"] = "linear") -> Tensor:
    """Which shared value each weight of a layer takes.

    Args:
        layer: with finite weights.
        count: the most values that the non-zero weights of a table share.
        rows: outputs of each table; None: one table. Tables of a grouped convolution run across its groups.
        start: as in `Clusters`.

    Returns:
        32-bit whole numbers of the weight's shape: 0 where the weight is zero, the tables one after another from 1, none left out.

    >>> layer = nn.Linear(4, 1)
    >>> layer.weight = nn.Parameter(torch.tensor([[0.0, -1.0, -1.2, 5.0]]))
    >>> cluster_index(layer, 2)
    tensor([[0, 1, 1, 2]], dtype=torch.int32)
    """
    split = split_weight(layer, layer.weight.detach())
    matrix = split.flatten(2).flatten(0, 1)  # outputs × (inputs · kernel)
    index = torch.zeros(matrix.shape, dtype=torch.int32, device=matrix.device)
    used = 0
    for part, found in zip(matrix.split(rows or max(1, len(matrix))), index.split(rows or max(1, len(matrix))), strict=True):
        values = part[part != 0]
        if len(values):
            centroids = optimal_kmeans(values, count) if start == "optimal" else kmeans(values, count, start)
            # numbered anew, because a centroid that was rounded to 16 bits may have no weight
            taken, numbers = nearest(values, centroids).unique(return_inverse=True)
            found[part != 0] = (numbers + used + 1).to(torch.int32)
            used += len(taken)
    return join_weight(layer, index.view(split.shape))


def _behind(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter behind a weight, also where it is a table of shared values."""
    if find_rule(module, name, Shared) is None:
        return stored(module, name)
    return module.get_parameter(f"parametrizations.{name}.original")


@contextmanager
def _frozen(model: nn.Module, layers: dict[str, Layer]) -> Iterator[None]:
    """Nothing is trained but the shared values."""
    tables = {id(_behind(layer, "weight")) for layer in layers.values()}
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in tables]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
