"""The processes that train together: which one this is, and sums over all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are.

    >>> rank_and_world()
    (0, 1)
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_over_processes(values: Tensor, device: torch.device | None = None) -> Tensor:
    """The sum of a tensor over all processes, on the tensor's own device; the tensor itself if there is but one process.

    Args:
        values: of the same shape in all processes, which must all call this.
        device: where the processes exchange it, such as that of a model; the tensor's own if None.

    >>> sum_over_processes(torch.tensor([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    if rank_and_world()[1] == 1:
        return values
    moved = values.to(device or values.device).contiguous().clone()
    torch.distributed.all_reduce(moved)
    return moved.to(values.device)
