"""Fashion-MNIST: 70,000 pictures of clothes, 28x28, 10 classes (Xiao et al. 2017, arXiv 1708.07747; MIT)."""

from __future__ import annotations

import hashlib

from torch import Tensor

from pared.core.errors import DataError
from pared.data.batches import Batches
from pared.data.idx import parse_idx, read_bytes
from pared.data.places import find
from pared.data.splits import check_range
from pared.data.transforms import CropAndFlip, Normalize
from pared.training import Task

# of the unpacked files, as published by the authors
_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_ADVICE = "Install the Debian package dataset-fashion-mnist, download the four files from github.com/zalandoresearch/fashion-mnist"
_VALID = 5_000


def fashion_mnist(seed: int = 0, batch_size: int = 128) -> Task:
    """Fashion-MNIST: 55,000 to train (shifted and mirrored), the last 5,000 of the training set to validate, 10,000 to test.

    Args:
        seed: of the shuffling; the split is fixed.
        batch_size: the most samples in a batch.

    Raises:
        DataError: if a file is missing, damaged or not the published one.
    """
    images, labels = _read("train-images-idx3-ubyte", 3)[:, None], _labels("train-labels-idx1-ubyte")
    test_images, test_labels = _read("t10k-images-idx3-ubyte", 3)[:, None], _labels("t10k-labels-idx1-ubyte")
    return Task(
        train=Batches(images[:-_VALID], labels[:-_VALID], batch_size, shuffle=True, seed=seed),
        valid=Batches(images[-_VALID:], labels[-_VALID:], batch_size),
        test=Batches(test_images, test_labels, batch_size),
        normalize=Normalize([0.286], [0.353]),
        augment=CropAndFlip(padding=2, flip=True),
        name="fashion-mnist",
    )


def _read(name: str, axes: int) -> Tensor:
    path = find("fashion-mnist", [f"{name}.gz", name], _ADVICE)
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise DataError(f"{path}: isn't the published file of Fashion-MNIST (its SHA-256 differs). {_ADVICE} again.")
    return parse_idx(content, axes, str(path))


def _labels(name: str) -> Tensor:
    return check_range(_read(name, 1), 10, name)
