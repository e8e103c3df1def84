"""Clusters of numbers on a line: Lloyd's algorithm, and the best clustering there is. Pure functions on tensors."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pared.core.errors import WeightsError
from pared.core.problems import Problems

Start = Literal["linear", "density", "forgy"]
Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.intp]

_ROUNDS = 1000
"""Lloyd's algorithm ends by itself, after some hundred rounds with 256 clusters; this only bounds it."""

_EDGES = 4096
"""Places at which the exact search may divide: a second for 256 clusters, and what it leaves out is below a thousandth of the error."""


def initial_centroids(values: Tensor, count: int, how: Start = "linear") -> Tensor:
    """Where Lloyd's algorithm begins (Deep Compression, 1510.00149, section 3.2).

    Args:
        values: any shape, at least one value.
        count: centroids, at least 1.
        how: "linear" spaces them evenly from the least value to the greatest, so that the few large weights, which matter most, have
            some near them; the paper finds it best. "density" takes the quantiles (2i + 1) / (2 · count), so that all clusters begin
            equally full. "forgy" draws values by chance, from torch's generator.

    Returns:
        Shape (count,), ascending, in double precision; values that are drawn may be equal.

    Raises:
        SettingsError: for another count or start.
        WeightsError: for no value, NaN or infinity.

    >>> initial_centroids(torch.tensor([0.0, 0.0, 0.0, 1.0, 4.0]), 3, "linear").tolist()
    [0.0, 2.0, 4.0]
    >>> initial_centroids(torch.tensor([0.0, 0.0, 0.0, 1.0, 4.0]), 3, "density").tolist()
    [0.0, 0.0, 4.0]
    """
    _check(values, count, how)
    flat = values.detach().flatten().double()
    if flat.numel() == 0:
        raise WeightsError("there is no value to choose centroids from.")
    if how == "linear":
        return torch.linspace(float(flat.min()), float(flat.max()), count, dtype=torch.float64, device=flat.device)
    if how == "forgy":
        drawn = torch.randperm(flat.numel())[torch.arange(count) % flat.numel()]
        return flat[drawn.to(flat.device)].sort().values
    places = ((2 * torch.arange(count) + 1) * flat.numel() + 2 * count - 1) // (2 * count) - 1  # in whole numbers: a quantile is exact
    return flat.sort().values[places.to(flat.device)]


def kmeans(values: Tensor, count: int, start: Start | Tensor = "linear") -> Tensor:
    """Lloyd's algorithm: each value joins its nearest centroid, each centroid moves to the mean of its values, until nothing changes.

    On sorted values with running sums a round costs count · log(n), and no table of distances is made. Empty clusters move into those of
    largest squared error, one into each, onto the value that adds most to it, so no centroid is wasted. The squared error never rises,
    and ends where no single move helps; `optimal_kmeans` has the least there is.

    Args:
        values: any shape; no value gives no centroid.
        count: the most centroids.
        start: see `initial_centroids`, or centroids to begin with, of shape (count,).

    Returns:
        Ascending, in the type of the values: exactly `count` if there are as many different values (numbers of 16 bits may fall
        together when means are rounded), else all different values.

    Raises:
        SettingsError: for another count or start.
        WeightsError: for NaN or infinity.

    >>> kmeans(torch.tensor([0.0, 0.25, 4.0, 4.5, 0.5]), 2).tolist()
    [0.25, 4.25]
    """
    _check(values, count, start)
    points, counts = _distinct(values)
    if len(points) <= count:
        return _tensor(points, values)
    begin = initial_centroids(values, count, start) if isinstance(start, str) else start
    return _tensor(_lloyd(points, counts, np.sort(begin.detach().double().cpu().numpy().ravel())), values)


def optimal_kmeans(values: Tensor, count: int) -> Tensor:
    """The clustering of least squared error, by dynamic programming over sorted values (Bellman 1973; Wang & Song 2011, Ckmeans.1d.dp).

    Clusters of numbers are intervals, so the best first j values in m clusters are the best first i in m - 1, and the rest together.
    The best i only grows with j, so each m is done by divide and conquer in n · log(n). With more than 4,096 different values clusters
    end only at 4,096 places, spread half by value and half by number, and Lloyd's algorithm refines the result on all values.

    Args:
        values: any shape; no value gives no centroid.
        count: the most centroids.

    Returns:
        As `kmeans`.

    Raises:
        SettingsError: for another count.
        WeightsError: for NaN or infinity.

    >>> values = torch.tensor([0.0, 1.0, 2.0, 9.0, 10.0, 30.0])
    >>> optimal_kmeans(values, 3).tolist(), kmeans(values, 3).tolist()
    ([1.0, 9.5, 30.0], [1.0, 9.5, 30.0])
    """
    _check(values, count, "linear")
    points, counts = _distinct(values)
    if len(points) <= count:
        return _tensor(points, values)
    edges = _candidate_edges(points, counts, max(_EDGES, 4 * count))
    sizes, sums, squares = _running_sums(points, counts)
    found = edges[_best_edges(sizes[edges], sums[edges], squares[edges], count)]
    centroids = _means(points, counts, found)
    return _tensor(centroids if len(edges) > len(points) else _lloyd(points, counts, centroids), values)


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """The index of the nearest centroid for each value; in the middle between two, that of the lower.

    Args:
        values: any shape.
        centroids: ascending, at least one.

    >>> nearest(torch.tensor([[-1.0, 0.5], [0.6, 9.0]]), torch.tensor([0.0, 1.0]))
    tensor([[0, 0],
            [1, 1]])
    """
    exact = centroids.detach().double()
    return torch.bucketize(values.detach().double(), (exact[1:] + exact[:-1]) / 2)


def _check(values: Tensor, count: int, start: object) -> None:
    problems = Problems("quantize.kmeans")
    problems.number("count", count, low=1, integer=True)
    known = start.numel() == count if isinstance(start, Tensor) else start in ("linear", "density", "forgy")
    problems.check(known, "start", f"linear, density, forgy or {count} centroids", start)
    problems.raise_if_any()
    if not bool(torch.isfinite(values).all()):
        raise WeightsError("values to be clustered contain NaN or infinity.")


def _distinct(values: Tensor) -> tuple[Floats, Floats]:
    """The different values, ascending, and how many there are of each."""
    points, counts = np.unique(values.detach().double().cpu().numpy(), return_counts=True)
    return points, counts.astype(np.float64)


def _tensor(centroids: Floats, like: Tensor) -> Tensor:
    return torch.unique(torch.from_numpy(centroids).to(like.device, like.dtype))


def _running_sums(points: Floats, counts: Floats) -> tuple[Floats, Floats, Floats]:
    """Sums of counts, values and squares of the first i points, for all i from 0; values are centred, so that little cancels."""
    centred = points - (points * counts).sum() / counts.sum()
    sizes, sums, squares = (np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, centred * counts, centred**2 * counts))
    return sizes, sums, squares


def _means(points: Floats, counts: Floats, edges: Whole) -> Floats:
    """The mean of each cluster that isn't empty; cluster i holds the points from edges[i] to before edges[i + 1]."""
    begins = edges[:-1][np.diff(edges) > 0]
    return np.add.reduceat(points * counts, begins) / np.add.reduceat(counts, begins)


def _lloyd(points: Floats, counts: Floats, centroids: Floats) -> Floats:
    shift = (points * counts).sum() / counts.sum()
    sizes, sums, _ = _running_sums(points, counts)
    edges = np.zeros(len(centroids) + 1, dtype=np.intp)
    for _ in range(_ROUNDS):
        middles = np.searchsorted(points, (centroids[1:] + centroids[:-1]) / 2, side="right")
        before, edges = edges, np.concatenate([[0], middles, [len(points)]])
        if np.array_equal(before, edges):
            break
        held = np.diff(sizes[edges])
        centroids = np.where(held > 0, shift + np.diff(sums[edges]) / np.maximum(held, 1), centroids)
        if (empty := held == 0).any():
            places = _worst_points(points, counts, centroids, edges)[: empty.sum()]
            centroids[np.flatnonzero(empty)[: len(places)]] = points[places]
            centroids = np.sort(centroids)
    return _means(points, counts, edges)


def _worst_points(points: Floats, counts: Floats, centroids: Floats, edges: Whole) -> Whole:
    """The point that adds most to the squared error in each cluster that has one, clusters of largest error first."""
    errors = counts * (points - np.repeat(centroids, np.diff(edges))) ** 2
    begins = edges[:-1][np.diff(edges) > 0]
    totals, most = np.add.reduceat(errors, begins), np.maximum.reduceat(errors, begins)
    lengths = np.diff([*begins, len(points)])
    worst = np.minimum.reduceat(np.where(errors == np.repeat(most, lengths), np.arange(len(points)), len(points)), begins)
    order = np.argsort(-totals, kind="stable")
    return worst[order[totals[order] > 0]]


def _candidate_edges(points: Floats, counts: Floats, most: int) -> Whole:
    """All places between points, or at most about `most` of them where there are more."""
    if len(points) <= most:
        return np.arange(len(points) + 1)
    position = (points - points[0]) / (points[-1] - points[0]) + (np.cumsum(counts) - counts) / counts.sum()
    bins = np.floor(position * (most / 2)).astype(np.intp)
    return np.concatenate([[0], np.flatnonzero(np.diff(bins)) + 1, [len(points)]])


def _best_edges(sizes: Floats, sums: Floats, squares: Floats, count: int) -> Whole:
    """The edges of `count` clusters of least squared error, from running sums at the n + 1 places that an edge may have."""

    def cost(i: Whole, j: Whole) -> Floats:
        return np.maximum(squares[j] - squares[i] - (sums[j] - sums[i]) ** 2 / (sizes[j] - sizes[i]), 0.0)

    last = len(sizes) - 1
    every = np.arange(1, last + 1)
    least = np.concatenate([[0.0], cost(np.zeros_like(every), every)])  # of the first j in one cluster
    begins = [np.zeros(last + 1, dtype=np.intp)]
    for first in range(1, count):  # clusters before the last one, which can begin there at the earliest
        begin, following = np.full(last + 1, first), np.full(last + 1, np.inf)
        stride = 1 << (last - first).bit_length()
        while stride:  # one level of divide and conquer at a time: both neighbours are known, and bound where the last cluster begins
            ends = np.arange(first + stride, last + 1, 2 * stride)
            low, high, after = begin[ends - stride], ends - 1, ends + stride
            inside = after <= last
            high[inside] = np.minimum(high[inside], begin[after[inside]])
            lengths = high - low + 1
            starts = np.cumsum(lengths) - lengths
            i, j = np.arange(lengths.sum()) + np.repeat(low - starts, lengths), np.repeat(ends, lengths)
            costs = least[i] + cost(i, j)
            if len(ends):
                following[ends] = np.minimum.reduceat(costs, starts)
                begin[ends] = np.minimum.reduceat(np.where(costs == following[j], i, last), starts)
            stride //= 2
        least = following
        begins.append(begin)
    edges = [last]
    for begin in reversed(begins):
        edges.append(int(begin[edges[-1]]))
    return np.array(edges[::-1])
