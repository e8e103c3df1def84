"""Fixed splits: the same samples on every machine and with every seed."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.core.errors import DataError


def check_range(targets: Tensor, classes: int, name: str) -> Tensor:
    """Return `targets` as int64.

    Raises:
        DataError: naming the file if a label isn't in 0 … classes - 1.
    """
    targets = targets.to(torch.int64)
    wrong = targets[(targets < 0) | (targets >= classes)]
    if wrong.numel():
        raise DataError(f"{name}: label {int(wrong[0])} is out of range 0 to {classes - 1}. Get the file again.")
    return targets


def every_nth(targets: Tensor, nth: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Split samples class by class: of all samples, sorted by class, every n-th from `offset` on is taken out.

    Nothing random is in it, and every class gives its share to within one sample.

    Args:
        targets: class numbers, shape (samples,).
        nth: one in how many is taken out.
        offset: where counting starts, from 0 to nth - 1.

    Returns:
        The positions of the samples kept and of those taken out, each in ascending order.

    >>> every_nth(torch.tensor([1, 0, 1, 0]), 2)
    (tensor([2, 3]), tensor([0, 1]))
    """
    by_class = torch.argsort(targets, stable=True)
    taken = torch.zeros(len(targets), dtype=torch.bool)
    taken[by_class[offset::nth]] = True
    return torch.nonzero(~taken).flatten(), torch.nonzero(taken).flatten()
