"""Writes digits.npz from scikit-learn's copy: `python -m pared.data.make_digits digits.npz`."""

from __future__ import annotations

import io
import sys

import numpy as np

from pared.core.files import write_atomic


def make_digits(path: str) -> None:
    """Write the images and labels of `sklearn.datasets.load_digits` to a compressed .npz file; needs scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=pixels.reshape(-1, 8, 8).astype(np.uint8), labels=labels.astype(np.uint8))
    write_atomic(path, buffer.getvalue())


if __name__ == "__main__":
    make_digits(sys.argv[1])
