"""What experiments on small files share: data with a background of 0, and what a packed file has and answers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from torch import nn

from pared import data
from pared.codec import inspect, pack
from pared.codec.tensors import Prefer
from pared.core.rules import bake
from pared.data.transforms import Normalize
from pared.lab.experiment import Row
from pared.measure import file_metric
from pared.runtime import export
from pared.training import Task

SCALE = 2.0  # pixels are in [0, 2], which trains as well as a mean of 0, and the background stays 0


def dark_task(name: str, seed: int) -> Task:
    """A data set whose pixels of 0 stay 0, without augmentation."""
    return dataclasses.replace(data.load(name, seed), normalize=Normalize([0.0], [1 / SCALE]), augment=None)


def packed_row(network: nn.Module, task: Task, folder: Path, prefer: Prefer = "smallest") -> Row:
    """Bytes of the network's `.pared` file, those of weights and of the program apart, and the file's accuracies in percent.

    "entropy" is the zeroth-order entropy of all weights and biases in bytes, each tensor by its own frequencies, without any table.
    """
    raw = dataclasses.replace(task, normalize=None).example_inputs()
    file = export(bake(copy.deepcopy(network)).eval(), raw, folder / "network.onnx", normalize=task.normalize)
    small = file.with_suffix(".pared")
    pack(file, small, prefer)
    found = inspect(small)
    assert found.total == small.stat().st_size
    accuracies = {split: round(100 * file_metric(small, task, split), 2) for split in ("valid", "test")}
    return {"bytes": found.total, "weights": found.weights, "program": found.program, "entropy": round(entropy(network)), **accuracies}


def entropy(network: nn.Module) -> float:
    """Bytes of all parameters of a network if every entry were independent of all others.

    >>> import torch
    >>> layer = nn.Linear(8, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[0.0, 0, 0, 0, 1, 1, 1, 1]] * 2)
    >>> entropy(layer)
    2.0
    """
    total = 0.0
    for parameter in bake(copy.deepcopy(network)).parameters():
        counts = parameter.detach().unique(return_counts=True)[1].double()
        total -= float((counts * (counts / counts.sum()).log2()).sum()) / 8
    return total
