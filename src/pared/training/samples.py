"""The first samples of the training split, for everything that looks at data without training on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pared.core.errors import DataError
from pared.training.check import split_batch
from pared.training.processes import rank_and_world

if TYPE_CHECKING:
    from pared.training.task import Task

Batch = tuple[tuple[Tensor, ...], Any]
Inputs = list[tuple[Tensor, ...]]

_END = object()


def first_samples(task: Task, samples: int, *, shared: bool = False) -> Iterator[Batch]:
    """The first samples of the training split, batch by batch: prepared, on the task's device, and not augmented.

    A split that shuffles by torch's global generator is shuffled the same way each time, and nobody else's random numbers change. One
    that shuffles by epoch (pared's `Batches`) gives the order of the epoch that it is at. No batch is read that isn't needed.

    Args:
        task: its training split is read.
        samples: how many; the last batch is cut short, empty batches are passed over.
        shared: of several processes each takes batches of its own, so that all together see about `samples`. False: all see the same.

    Yields:
        Pairs of inputs, as a tuple, and targets: tensors of any nest, or anything else, which is given as it is.

    Raises:
        DataError: if the split doesn't give pairs, or inputs that aren't tensors.

    >>> import torch
    >>> from pared.training import Task
    >>> batches = [(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))] * 2
    >>> [(inputs[0].shape, targets.tolist()) for inputs, targets in first_samples(Task(batches, batches, batches), 5)]
    [(torch.Size([4, 3]), [0, 1, 0, 1]), (torch.Size([1, 3]), [0])]
    """
    for inputs, targets in _first(task, samples, shared):
        yield task.prepare(inputs), task.to_device(targets)


def first_inputs(task: Task, samples: int, purpose: str) -> Inputs:
    """The inputs of `first_samples` as a list; the same in all processes. Targets aren't looked at.

    Args:
        task: its training split is read.
        samples: how many.
        purpose: what they are for, as the end of a sentence.

    Raises:
        DataError: if there are none.

    >>> import torch
    >>> from pared.training import Task
    >>> batches = [(torch.zeros(4, 3), None)]
    >>> [len(inputs[0]) for inputs in first_inputs(Task(batches, batches, batches), 3, "they are counted")]
    [3]
    """
    batches = [task.prepare(inputs) for inputs, _ in _first(task, samples, shared=False)]
    if not batches:
        raise DataError(f"the train split has no samples: {purpose}.")
    return batches


def slice_batch(batch: Batch, part: slice) -> Batch:
    """Some samples of a batch: of every tensor whose first axis is the batch. What has no such axis stays as it is.

    >>> import torch
    >>> slice_batch(((torch.zeros(4, 3),), {"class": torch.arange(4), "scale": torch.tensor(2.0)}), slice(1, 3))[1]
    {'class': tensor([1, 2]), 'scale': tensor(2.)}
    """
    count = len(batch[0][0])

    def sliced(leaf: Any) -> Any:
        return leaf[part] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else leaf

    return pytree.tree_map(sliced, batch)


def _first(task: Task, samples: int, shared: bool) -> Iterator[Batch]:
    """The batches of `first_samples`, as the split gives them."""
    rank, world = rank_and_world() if shared else (0, 1)
    left = -(-samples // world)
    for batch in _undisturbed(task.train, rank, world):
        inputs, targets = split_batch(batch, "train")
        inputs, targets = slice_batch((inputs if isinstance(inputs, tuple) else (inputs,), targets), slice(0, left))
        if len(inputs[0]) == 0:
            continue
        yield inputs, targets
        left -= len(inputs[0])
        if left <= 0:
            return


def _undisturbed(batches: Iterable[Any], start: int, step: int) -> Iterator[Any]:
    """Every `step`-th batch, drawn in a random state of its own, which is left whenever one is given out."""
    iterator = state = None
    while True:
        with torch.random.fork_rng(devices=[]):
            if iterator is None or state is None:
                torch.manual_seed(0)
                iterator = itertools.islice(batches, start, None, step)  # a DataLoader draws a number when it begins
            else:
                torch.set_rng_state(state)
            batch, state = next(iterator, _END), torch.get_rng_state()
        if batch is _END:
            return
        yield batch
