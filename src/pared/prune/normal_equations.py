"""Damped least squares from sums over equations, with a damping that holds on equations left out."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPINGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Tried where none is given: from a hardly damped solution to one that hardly leaves where it started."""

CHUNK = 2048  # equations that are held at a time
SMALLEST = 1e-4  # of the largest scale of a norm: what it makes smaller can't be made up for by the layer before it


def ridge(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Solve least squares from its sums: the x that minimises |A x - b|² + damping Σ gramᵢᵢ xᵢ², for gram = AᵀA and cross = Aᵀb.

    Every unknown is damped on the scale of its own column, so that units don't matter, and a bias (a column of ones) is damped like a
    weight. An unknown whose column is zero becomes 0. The penalty makes the solution unique where columns depend on each other: it is
    shared among them (Hoerl & Kennard 1970).

    Args:
        gram: (…, n, n), symmetric.
        cross: (…, n, m).
        damping: greater than 0.

    Returns:
        (…, n, m), of the type of `gram`.

    >>> ridge(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[8.0], [0.0]]), 1.0).tolist()
    [[1.0], [0.0]]
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    scaled = gram * scale[..., :, None] * scale[..., None, :] + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solved = torch.cholesky_solve(cross * scale[..., None], torch.linalg.cholesky(scaled))
    return solved * scale[..., None]


class Sums:
    """What is known of a set of equations, added up in double precision: AᵀA, Aᵀb and the squares of b, by group.

    Attributes:
        gram: (groups, unknowns, unknowns).
        cross: (groups, unknowns, outputs of a group).
        error: (groups, outputs of a group): of no change at all.
        count: of equations.
    """

    def __init__(self) -> None:
        self.gram = self.cross = self.error = torch.zeros(())
        self.count = 0

    def add(self, rows: Tensor, wanted: Tensor) -> None:
        """More equations: rows (groups, n, unknowns) times the unknowns should be what is wanted (groups, n, outputs)."""
        for part, want in zip(rows.split(CHUNK, dim=1), wanted.split(CHUNK, dim=1), strict=True):
            part, want = double(part), double(want)
            self.gram = part.mT @ part + self.gram.to(part)
            self.cross = part.mT @ want + self.cross.to(part)
            self.error = (want**2).sum(dim=1) + self.error.to(part)
        self.count += rows.shape[1]

    def __add__(self, other: Sums) -> Sums:
        total = Sums()
        total.gram, total.cross, total.error = self.gram + other.gram, self.cross + other.cross, self.error + other.error
        total.count = self.count + other.count
        return total

    def error_of(self, change: Tensor) -> Tensor:
        """The summed squared error of every output (groups, outputs) where the unknowns are `change` (groups, unknowns, outputs)."""
        return self.error - 2 * (change * self.cross).sum(dim=1) + (change * (self.gram @ change)).sum(dim=1)


class HalvedSums:
    """The equations of one layer in two halves, by samples, so that a solution of one can be tried on the other.

    Args:
        scale: what the layer's outputs are multiplied by where they are compared; what isn't (nearly 0) is not solved for.
    """

    def __init__(self, scale: Tensor | None = None) -> None:
        self.scale = scale
        self.halves = Sums(), Sums()

    def add(self, rows: Tensor, missing: Tensor, with_shift: bool) -> None:
        """Equations of a batch, in the order of its samples.

        Args:
            rows: (groups, n, inputs).
            missing: (n, outputs), where the outputs are compared.
            with_shift: whether a column of ones stands for a bias.
        """
        groups, middle = rows.shape[0], rows.shape[1] // 2
        if self.scale is not None:
            scale = self.scale.to(missing)
            counts = scale.abs() > SMALLEST * scale.abs().max()
            missing = torch.where(counts, missing / torch.where(counts, scale, 1), 0)
        if with_shift:
            rows = torch.cat([rows, rows.new_ones(groups, rows.shape[1], 1)], dim=2)
        wanted = missing.unflatten(1, (groups, -1)).transpose(0, 1)
        self.halves[0].add(rows[:, :middle], wanted[:, :middle])
        self.halves[1].add(rows[:, middle:], wanted[:, middle:])

    def solve(self, damping: float | None) -> tuple[Tensor, Sums]:
        """The change (groups, unknowns, outputs), and the sums of both halves.

        Without a damping, each half is solved with all of `DAMPINGS` and its solutions tried on the other half. The damping that leaves the
        smallest error in all is taken for all equations together; an output that fares no better with it than unchanged stays unchanged.
        """
        whole = self.halves[0] + self.halves[1]
        if damping is not None:
            return ridge(whole.gram, whole.cross, damping), whole
        if not all(half.count for half in self.halves):
            return ridge(whole.gram, whole.cross, DAMPINGS[-1]), whole
        left_out = {tried: self._left_out(tried) for tried in DAMPINGS}
        best = min(DAMPINGS, key=lambda tried: float(self.weighed(left_out[tried]).sum()))
        change = ridge(whole.gram, whole.cross, best)
        return torch.where((left_out[best] < whole.error)[:, None], change, 0), whole

    def _left_out(self, damping: float) -> Tensor:
        """The summed squared error of every output, where each half is solved by the other."""
        first, second = self.halves
        return second.error_of(ridge(first.gram, first.cross, damping)) + first.error_of(ridge(second.gram, second.cross, damping))

    def weighed(self, errors: Tensor) -> Tensor:
        """Squared errors (groups, outputs) of a layer as they are where the outputs are compared."""
        return errors if self.scale is None else errors * self.scale.to(errors).reshape(errors.shape) ** 2


def double(values: Tensor) -> Tensor:
    """In double precision; on the CPU where a device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()
