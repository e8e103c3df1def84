"""Batches of a data set that lies in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pared.core.errors import DataError


class Batches:
    """A data set in memory, given out in batches of nearly equal size.

    Images are stored as bytes and become numbers in [0, 1] batch by batch. Batch sizes differ by at most one, so that there is
    never a last batch of a single sample, which batch normalisation couldn't take.

    Args:
        inputs: one tensor with the samples along its first axis; uint8 is divided by `full_scale`, anything else given as it is.
        targets: as many class numbers or target tensors.
        batch_size: the most samples in a batch.
        shuffle: give the samples in another order in every epoch. The order depends on `seed` and the epoch alone, so that a
            resumed training sees the batches that an undisturbed one would have seen.
        seed: of the shuffling.
        full_scale: the byte that stands for 1.

    Raises:
        DataError: if there are no samples, or not as many targets as inputs.

    >>> batches = Batches(torch.arange(5, dtype=torch.uint8)[:, None], torch.arange(5), batch_size=3)
    >>> [targets.tolist() for _, targets in batches]
    [[0, 1, 2], [3, 4]]
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, batch_size: int = 128, *, shuffle: bool = False, seed: int = 0, full_scale: float = 255.0
    ) -> None:
        if len(inputs) == 0:
            raise DataError("a data set needs at least one sample. Got none.")
        if len(inputs) != len(targets):
            raise DataError(f"a data set needs one target for each sample. Got {len(inputs)} samples and {len(targets)} targets.")
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1. Got {batch_size!r}.")
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.full_scale = full_scale
        self.epoch = 0

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.inputs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next passes; the training loop calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give (inputs, targets) for all batches; inputs of shape (batch, …)."""
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(self.samples, generator=generator)
        else:
            order = torch.arange(self.samples)
        for chosen in order.tensor_split(len(self)):
            inputs = self.inputs[chosen]
            yield (inputs.to(torch.float32).div_(self.full_scale) if inputs.dtype == torch.uint8 else inputs), self.targets[chosen]
