"""How much of something a target allows."""

from __future__ import annotations

from collections.abc import Callable

FINEST = 1 / 2048
"""The search ends where the share is known so well: less than a channel of the widest layers."""


def bisect(cost: Callable[[float], float], target: float, first: float = 0.5, near: float = 0.01) -> float:
    """The largest share in [0, 1] whose cost is at most `target`; 0 if none is.

    The cost must not fall where the share grows.

    Args:
        cost: of a share.
        target: what it may be.
        first: the share that is tried first.
        near: a cost so close below the target (as a share of it) is near enough.

    >>> round(bisect(lambda share: share**2, 0.25), 3)
    0.5
    """
    if cost(1.0) <= target:
        return 1.0
    low, high, share = 0.0, 1.0, first
    while high - low > FINEST:
        value = cost(share)
        if (1 - near) * target <= value <= target:
            return share
        low, high = (share, high) if value <= target else (low, share)
        share = (low + high) / 2
    return low
