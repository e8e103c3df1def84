"""Normalisation and augmentation of whole batches of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.core.errors import SettingsError
from pared.core.problems import Problems


class Normalize(nn.Module):
    """(images - mean) / std, channel by channel.

    Args:
        mean: one number a channel, in the units of the pixels.
        std: likewise, greater than 0.

    Raises:
        SettingsError: if the lengths differ or a std isn't positive.

    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 2, 2)).unique()
    tensor([2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or not all(value > 0 for value in std):
            raise SettingsError(f"normalize: mean and std must have one number a channel, std greater than 0. Got {mean!r} and {std!r}.")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise `images` of shape (batch, channels, height, width)."""
        return (images - self.mean) / self.std


@dataclass(frozen=True)
class CropAndFlip:
    """Shift every image by up to `padding` pixels (what comes in is black), and mirror half of them.

    It works on the whole batch at once, by one gather.

    Args:
        padding: pixels in each direction. 4 is usual for 32x32 photos, 2 for 28x28 drawings.
        flip: mirror left to right; not for digits.

    Raises:
        SettingsError: naming the field that is out of its range.

    >>> images = torch.rand(8, 1, 28, 28)
    >>> CropAndFlip(2)(images, torch.Generator().manual_seed(0)).shape
    torch.Size([8, 1, 28, 28])
    """

    padding: int
    flip: bool = True

    def __post_init__(self) -> None:
        problems = Problems("crop_and_flip")
        problems.number("padding", self.padding, low=0, integer=True)
        problems.check(isinstance(self.flip, bool), "flip", "true or false", self.flip)
        problems.raise_if_any()

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment `images` of shape (batch, channels, height, width); draws from `generator`, which is on their device."""
        batch, channels, height, width = images.shape
        device, reach = images.device, 2 * self.padding + 1
        shifts = torch.randint(0, reach, (2, batch, 1), generator=generator, device=device)
        rows = shifts[0] + torch.arange(height, device=device)
        columns = shifts[1] + torch.arange(width, device=device)
        if self.flip:
            mirrored = torch.rand(batch, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = functional.pad(images, [self.padding] * 4)
        # positions within one padded image; the same for all channels
        places = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).reshape(batch, 1, -1).expand(-1, channels, -1)
        return padded.flatten(2).gather(2, places).reshape(images.shape)
