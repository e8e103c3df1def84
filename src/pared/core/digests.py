"""Hashes of networks."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def digest(model: nn.Module) -> str:
    """A hash of all parameters and buffers: names, shapes, types and bits.

    >>> digest(nn.Linear(2, 2)) == digest(nn.Linear(2, 2))
    False
    """
    found = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # a view as bytes: numpy has no bfloat16
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
