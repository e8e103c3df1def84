"""Which entries stay: by count, never by a threshold, and over several rounds."""

from __future__ import annotations

import decimal
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pared.core.errors import WeightsError
from pared.core.problems import Problems

Scope = Literal["global", "layer"]


def select(scores: Tensor, keep: float) -> Tensor:
    """Mark the `keep` share of the entries with the highest scores.

    Selection is by count, never by a threshold: exactly `keep * scores.numel()` entries, a half rounded up, are marked.
    Of equal scores those that stand first in the flattened tensor are kept, so the answer doesn't depend on a sorting routine.

    Args:
        scores: tensor of any shape.
        keep: share in [0, 1], taken as it is written in decimal (0.29 of 50 is 14.5, thus 15).

    Returns:
        Boolean tensor of the shape of `scores`, True where an entry stays.

    Raises:
        SettingsError: if `keep` is not in [0, 1].
        WeightsError: if a score is NaN.

    >>> select(torch.tensor([3.0, 1.0, 3.0, 2.0]), 0.5)
    tensor([ True, False,  True, False])
    """
    problems = Problems("prune.select")
    problems.number("keep", keep, low=0, high=1)
    problems.raise_if_any()
    return highest(scores, share_of(keep, scores.numel()))


def highest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` entries with the highest scores; of equal scores those that stand first.

    Raises:
        WeightsError: if a score is NaN.

    >>> highest(torch.tensor([[1.0, 2.0], [2.0, 2.0]]), 2)
    tensor([[False,  True],
            [ True, False]])
    """
    if scores.isnan().any():
        raise WeightsError("scores contain NaN, so they can't be ranked.")
    flat = scores.flatten()
    if not 0 < count < flat.numel():
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    rank = flat.numel() - count  # of the lowest score that stays; on a CPU a selection is seven times as fast as a sort
    last = flat.kthvalue(rank + 1).values if flat.device.type == "cpu" else flat.sort().values[rank]
    above, equal = flat > last, flat == last
    return (above | (equal & (equal.cumsum(0) <= count - above.sum()))).view(scores.shape)


def share_of(share: float, total: int) -> int:
    """How many of `total` a share is, a half rounded up.

    >>> share_of(0.29, 50)
    15
    """
    # Decimal of the written number: in binary 0.29 * 50 is just below 14.5
    return int((decimal.Decimal(repr(float(share))) * total).to_integral_value(decimal.ROUND_HALF_UP))


def keep_by_round(keep: float, rounds: int, schedule: Literal["one-shot", "cubic"]) -> list[float]:
    """The share of weights left after each round of pruning; the last is `keep`.

    "cubic" removes much at first, while there is much to spare, and little at the end, see `cubic`. "one-shot" removes everything
    in the first round.

    >>> keep_by_round(0.2, 2, "cubic")
    [0.3, 0.2]
    """
    if schedule == "one-shot":
        return [keep] * rounds
    return [cubic(keep, done / rounds) for done in range(1, rounds + 1)]


def cubic(keep: float, progress: float) -> float:
    """The share of weights left when the part `progress` of pruning is done: keep + (1 - keep)(1 - progress)³.

    Source: Zhu & Gupta 2017, 1710.01878, equation 1. Before the beginning (below 0) all are left, after the end (above 1) `keep`.

    >>> cubic(0.2, -1), cubic(0.2, 0.5), cubic(0.2, 2)
    (1.0, 0.3, 0.2)
    """
    if progress >= 1:
        return keep
    return round(keep + (1 - keep) * (1 - max(progress, 0.0)) ** 3, 12)


def choose(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], keep: float, scope: Scope) -> dict[str, Tensor]:
    """Choose the entries of several layers that stay, among those that are still alive.

    Args:
        scores: importance of each entry, by layer; higher is more important.
        alive: boolean tensors of the same shapes, False where an entry is already removed.
        keep: share of all entries (also the removed ones) that may stay.
        scope: rank all layers together ("global") or each by itself ("layer").

    Returns:
        Boolean tensors of the same shapes. Fewer than the share stay where fewer are alive.

    Raises:
        WeightsError: naming a layer whose scores contain NaN.

    >>> both = torch.ones(2, dtype=torch.bool)
    >>> choose({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, {"a": both, "b": both}, 0.5, "global")
    {'a': tensor([False, False]), 'b': tensor([True, True])}
    """
    check_scores(scores)
    ranked = {path: score.masked_fill(~alive[path], -torch.inf) for path, score in scores.items()}
    if scope == "layer":
        return {path: select(score, keep) & alive[path] for path, score in ranked.items()}
    device = next(iter(ranked.values())).device
    together = torch.cat([score.flatten().to(device) for score in ranked.values()])
    parts = select(together, keep).split([score.numel() for score in ranked.values()])
    return {path: part.view_as(score).to(score.device) & alive[path] for (path, score), part in zip(ranked.items(), parts, strict=True)}


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Refuse scores with NaN.

    Raises:
        WeightsError: naming the first such layer.
    """
    for path, score in scores.items():
        if score.isnan().any():
            raise WeightsError(f"{path}.weight contains NaN, so its weights can't be ranked. Train or load the model again.")
