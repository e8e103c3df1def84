"""What all tests and all doctests share: one thread, and generators that start alike."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; several test processes share the cores

import pytest
import torch

from pared.core.seeds import seed_everything


@pytest.fixture(autouse=True)
def alike() -> None:
    """Every test and every doctest starts from the same random state and with one thread."""
    torch.set_num_threads(1)
    seed_everything(0)
