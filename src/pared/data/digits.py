"""The 8x8 digits that come with pared: 1,797 images of 10 classes."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch

from pared.data.batches import Batches
from pared.data.splits import check_range, every_nth
from pared.data.transforms import Normalize
from pared.training import Task


def digits(seed: int = 0, batch_size: int = 128) -> Task:
    """Handwritten digits of 1x8x8 pixels: 1,197 to train, 300 to validate, 300 to test.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (CC BY 4.0).

    Args:
        seed: of the shuffling; the split is fixed.
        batch_size: the most samples in a batch.

    >>> [split.samples for split in (digits().train, digits().valid, digits().test)]
    [1197, 300, 300]
    """
    with resources.files("pared.data").joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["images"])[:, None], check_range(torch.from_numpy(arrays["labels"]), 10, "digits.npz")
    rest, test = every_nth(labels, 6)
    train, valid = (rest[part] for part in every_nth(labels[rest], 5))
    scale = 16.0  # the images count dark pixels in 4x4 blocks of a finer picture
    return Task(
        train=Batches(images[train], labels[train], batch_size, shuffle=True, seed=seed, full_scale=scale),
        valid=Batches(images[valid], labels[valid], batch_size, full_scale=scale),
        test=Batches(images[test], labels[test], batch_size, full_scale=scale),
        normalize=Normalize([0.305], [0.376]),
        name="digits",
    )
