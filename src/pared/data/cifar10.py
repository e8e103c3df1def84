"""CIFAR-10: 60,000 photos, 3x32x32, 10 classes (Krizhevsky 2009), from its Python or its binary version."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pared.core.errors import DataError
from pared.data.batches import Batches
from pared.data.places import find
from pared.data.splits import check_range
from pared.data.transforms import CropAndFlip, Normalize
from pared.training import Task

_CANDIDATES = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "cifar-10-batches-py", "cifar-10-python.tar.gz")
_PIXELS = 3 * 32 * 32
# all that a pickled batch of CIFAR-10 refers to, by either of the names that numpy has had
_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


def cifar10(seed: int = 0, batch_size: int = 128) -> Task:
    """CIFAR-10: nine tenths of the training set to train (shifted and mirrored), its last tenth to validate, 10,000 to test.

    Args:
        seed: of the shuffling; the split is fixed.
        batch_size: the most samples in a batch.

    Raises:
        DataError: if the set is missing or a file of it is damaged.
    """
    root = find("cifar10", _CANDIDATES, "Download it from www.cs.toronto.edu/~kriz/cifar.html")
    parts = [_read(root, f"data_batch_{number}") for number in range(1, 6)]
    images, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    test_images, test_labels = _read(root, "test_batch")
    cut = len(images) - max(1, len(images) // 10)
    return Task(
        train=Batches(images[:cut], labels[:cut], batch_size, shuffle=True, seed=seed),
        valid=Batches(images[cut:], labels[cut:], batch_size),
        test=Batches(test_images, test_labels, batch_size),
        normalize=Normalize([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        augment=CropAndFlip(padding=4, flip=True),
        name="cifar10",
    )


def _read(root: Path, batch: str) -> tuple[Tensor, Tensor]:
    binary = root.name in ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")
    name = f"{batch}.bin" if binary else batch
    content = _content(root, f"cifar-10-batches-{'bin' if binary else 'py'}", name)
    pixels, labels = _parse_binary(content, f"{root}/{name}") if binary else _parse_pickle(content, f"{root}/{name}")
    return pixels.reshape(-1, 3, 32, 32), check_range(labels, 10, f"{root}/{name}")


def _content(root: Path, folder: str, name: str) -> bytes:
    try:
        if root.is_dir():
            return (root / name).read_bytes()
        with tarfile.open(root) as archive:
            member = archive.extractfile(f"{folder}/{name}")
            if member is None:
                raise KeyError(name)
            return member.read()
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise DataError(f"{root}/{name}: can't be read ({error}). Get the data set again.") from error


def _parse_binary(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Records of a label and 3,072 pixels, a byte each."""
    if not content or len(content) % (1 + _PIXELS):
        raise DataError(f"{name}: holds {len(content)} bytes, which isn't a whole number of {1 + _PIXELS}-byte records. Get it again.")
    records = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).reshape(-1, 1 + _PIXELS)
    return records[:, 1:].contiguous(), records[:, 0]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers and strings; a pickle that names anything else is refused, so that no code of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAY_PARTS:
            return _ARRAY_PARTS[module, name]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 pickles bytes for Python 2
            return _encode
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no batch of CIFAR-10 does")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)


def _parse_pickle(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """A pickled dict of `data` (samples, 3072) in bytes and `labels`."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        data, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{name}: isn't a batch of CIFAR-10 ({error}). Get the data set again.") from error
    right = data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == _PIXELS and len(data) > 0
    if not right or labels.shape != data.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{name}: must hold images of {_PIXELS} bytes and as many labels. Got {data.shape} and {labels.shape}.")
    return torch.from_numpy(data.copy()), torch.from_numpy(labels.astype(np.int64))
