"""A task by its name."""

from __future__ import annotations

import difflib
from pathlib import Path

from pared.core.errors import DataError
from pared.data.callables import call, is_callable_spec
from pared.data.cifar10 import cifar10
from pared.data.digits import digits
from pared.data.fashion_mnist import fashion_mnist
from pared.data.folder import image_folder
from pared.data.mnist_10k import mnist_10k
from pared.training import Task

NAMES = ("digits", "fashion-mnist", "mnist-10k", "cifar10")


def load(name: str, seed: int = 0, batch_size: int = 128, *, size: int | None = None) -> Task:
    """Load a data set as a task with fixed splits, normalisation and augmentation.

    Args:
        name: "digits" (comes with pared), "fashion-mnist", "mnist-10k", "cifar10", a folder of images, or
            `package.module:callable` or `path/file.py:callable`, a function that returns a Task (`seed`, `batch_size` and `size`
            are passed to it if it has such parameters).
        seed: of the shuffling; the splits don't depend on it.
        batch_size: the most samples in a batch.
        size: side in pixels, of a folder of images only.

    Raises:
        DataError: if there is no such data set, or it is missing or damaged.

    >>> load("digits").name
    'digits'
    """
    match name:
        case "digits":
            return digits(seed, batch_size)
        case "fashion-mnist":
            return fashion_mnist(seed, batch_size)
        case "mnist-10k":
            return mnist_10k(seed, batch_size)
        case "cifar10":
            return cifar10(seed, batch_size)
    if is_callable_spec(name):
        task = call(name, {"seed": seed, "batch_size": batch_size, "size": size}, DataError)
        if not isinstance(task, Task):
            raise DataError(f"{name}: must return a pared.Task. Got {type(task).__name__}.")
        return task
    if Path(name).is_dir():
        return image_folder(name, seed, batch_size, size)
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    forms = f"Known are {', '.join(NAMES)}, a folder of images, package.module:callable and path/file.py:callable."
    raise DataError(f"{name}: no such data set or folder.{hint} {forms}")
