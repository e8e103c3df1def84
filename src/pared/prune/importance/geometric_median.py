"""How replaceable a neuron is by the others of its layer: its distance from their geometric median, or from all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.core.problems import Problems
from pared.graph.analysis import Analysis
from pared.prune.importance.protocol import Normalize, Scores, add_rows, check_choice, effective_weights
from pared.training import Task


def geometric_median(rows: Tensor, iterations: int = 1000, tolerance: float = 1e-9) -> Tensor:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration in the form of Vardi and Zhang (2000).

    Their form goes on where the iteration meets one of the rows, which Weiszfeld's own would divide by zero at.

    Args:
        rows: of shape (n, m).
        iterations: at most that many.
        tolerance: stop where a step is shorter than this share of the rows' mean distance.

    Returns:
        A point of shape (m,), in double precision.

    >>> geometric_median(torch.tensor([[0.0], [1.0], [10.0]])).round(decimals=4).tolist()
    [1.0]
    """
    rows = rows.double()
    point = rows.mean(dim=0)
    scale = float(torch.linalg.vector_norm(rows - point, dim=1).mean())
    for _ in range(iterations if scale > 0 else 0):
        distances = torch.linalg.vector_norm(rows - point, dim=1)
        away = distances > 1e-12 * scale
        if not bool(away.any()):
            return point
        inverse = 1 / distances[away]
        target = (rows[away] * inverse[:, None]).sum(dim=0) / inverse.sum()
        pull = float(torch.linalg.vector_norm(((rows[away] - point) * inverse[:, None]).sum(dim=0)))
        here = int((~away).sum())
        stay = min(1.0, here / pull) if pull > 0 else 1.0
        step = (1 - stay) * (target - point)
        point = point + step
        if float(torch.linalg.vector_norm(step)) <= tolerance * scale:
            break
    return point


def distances_to_median(rows: Tensor) -> Tensor:
    """The distance of every row from the geometric median of all: of shape (n,) for rows of shape (n, m).

    >>> distances_to_median(torch.tensor([[0.0], [1.0], [10.0]])).round(decimals=4).tolist()
    [1.0, 0.0, 9.0]
    """
    return torch.linalg.vector_norm(rows.double() - geometric_median(rows), dim=1)


def distances_to_others(rows: Tensor) -> Tensor:
    """The sum of distances of every row to all others: of shape (n,) for rows of shape (n, m).

    >>> distances_to_others(torch.tensor([[0.0], [1.0], [10.0]])).tolist()
    [11.0, 10.0, 19.0]
    """
    return torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)


def _score(distances: Callable[[Tensor], Tensor], analysis: Analysis, normalize: Normalize) -> Scores:
    values = effective_weights(analysis.captured.module)
    return add_rows(analysis, [distances(producer.view(values[producer.parameter])) for producer in analysis.producers], normalize)


@dataclass(frozen=True)
class GeometricMedian:
    """The distance of a neuron's weights from the geometric median of its layer; those nearest to it are the most replaceable.

    The idea of FPGM (He et al., 1811.00250, section 3.2) with the median itself, found by Weiszfeld's iteration. Tied layers add up.

    Args:
        normalize: "layer" by default: distances depend on the layer's fan-in and the size of its weights.

    Raises:
        SettingsError: if a setting is out of range.

    >>> GeometricMedian().normalize
    'layer'
    """

    normalize: Normalize = "layer"

    def __post_init__(self) -> None:
        _check("importance.geometric_median", self.normalize)

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Measure distances; needs no data."""
        return _score(distances_to_median, analysis, self.normalize)


@dataclass(frozen=True)
class FPGM:
    """The sum of distances of a neuron's weights from those of all others in its layer (He et al., 1811.00250, equation 7).

    What the paper computes in the geometric median's place: the neuron with the least sum is the median among the neurons. Small weights
    alone don't make a neuron go, similar ones do. Tied layers add up.

    Args:
        normalize: "layer" by default: distances depend on the layer's fan-in, its width and the size of its weights.

    Raises:
        SettingsError: if a setting is out of range.

    >>> FPGM().normalize
    'layer'
    """

    normalize: Normalize = "layer"

    def __post_init__(self) -> None:
        _check("importance.fpgm", self.normalize)

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """Measure distances; needs no data."""
        return _score(distances_to_others, analysis, self.normalize)


def _check(where: str, normalize: object) -> None:
    problems = Problems(where)
    check_choice(problems, "normalize", normalize, "layer", "none")
    problems.raise_if_any()
