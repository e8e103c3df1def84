"""Training samples to score on, and means over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pared.core.errors import DataError, WeightsError
from pared.training import Task
from pared.training.processes import sum_over_processes
from pared.training.samples import Batch, first_samples, slice_batch


def training_samples(task: Task | None, samples: int, model: nn.Module, where: str) -> Iterator[Batch]:
    """The first training samples (`first_samples`) as batches that the model can take; it is moved to the task's device.

    Under several processes each reads its own batches, so that all together see about `samples`. A graph that was captured with a fixed
    batch gets batches of that size; what is left over at the end is passed over.

    Raises:
        DataError: if there is no task.
    """
    if task is None:
        raise DataError(f"{where}: needs data to score on. Give a task, or use Magnitude().")
    model.to(task.machine.device)
    fixed = fixed_batch(model)
    batches = first_samples(task, samples, shared=True)
    return batches if fixed is None else (_filled(part, fixed) for batch in batches for part in _parts(batch, fixed))


def fixed_batch(model: nn.Module) -> int | None:
    """The batch size that a captured graph was frozen with; None if it takes any."""
    if isinstance(model, fx.GraphModule):
        for node in model.graph.nodes:
            value = node.meta.get("val") if node.op == "placeholder" else None
            if isinstance(value, Tensor) and value.dim():
                size: Any = value.shape[0]  # a symbol that was found to be one number counts as that number
                return size if isinstance(size, int) else size.node.maybe_as_int()
    return None


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    count = len(batch[0][0])
    for start in range(0, max(1, count - size + 1), size):
        yield slice_batch(batch, slice(start, start + size))


def _filled(batch: Batch, size: int) -> Batch:
    count = len(batch[0][0])

    def filled(leaf: Any) -> Any:
        return repeated(leaf, size) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else leaf

    return pytree.tree_map(filled, batch)


def repeated(x: Tensor, size: int) -> Tensor:
    """The first axis repeated until it has `size` entries."""
    return x if len(x) == size else x.repeat(-(-size // len(x)), *[1] * (x.dim() - 1))[:size]


class Mean:
    """The mean of tensors over samples and processes, summed in double precision."""

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
        self.count = 0

    def add(self, sums: Mapping[str, Tensor], count: int) -> None:
        """Add sums over `count` samples."""
        for name, value in sums.items():
            self.sums[name] += value
        self.count += count

    def result(self, where: str) -> dict[str, Tensor]:
        """The means.

        Raises:
            DataError: if there was no sample.
            WeightsError: naming the first tensor that isn't finite.
        """
        device = next((value.device for value in self.sums.values()), torch.device("cpu"))
        count = int(sum_over_processes(torch.tensor(self.count, device=device)))
        if count == 0:
            raise DataError(f"{where}: the training split has no samples to score on.")
        means = {name: sum_over_processes(value) / count for name, value in self.sums.items()}
        for name, value in means.items():
            if not bool(torch.isfinite(value).all()):
                raise WeightsError(f"{where}: the scores of {name} aren't finite. Train or load the model again, or check the data.")
        return means
