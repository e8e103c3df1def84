"""Models and tasks for the tests of importances."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from pared.graph.analysis import Analysis, analyse
from pared.graph.capture import capture
from pared.training import Task


class Residual(nn.Module):
    """A stem and two residual blocks with batch norm: one class of tied channels, and one class within each block."""

    def __init__(self, width: int = 4, inner: int = 6) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.first = nn.ModuleList([nn.Conv2d(width, inner, 3, padding=1, bias=False) for _ in range(2)])
        self.between = nn.ModuleList([nn.BatchNorm2d(inner) for _ in range(2)])
        self.second = nn.ModuleList([nn.Conv2d(inner, width, 3, padding=1, bias=False) for _ in range(2)])
        self.after = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(2)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for first, between, second, after in zip(self.first, self.between, self.second, self.after, strict=True):
            x = (x + after(second(between(first(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Tokens, one encoder layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def task_of(inputs: Tensor, labels: Tensor | None = None, batch: int = 8, **settings: object) -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (len(inputs),), generator=generator) if labels is None else labels
    batches = list(zip(inputs.split(batch), labels.split(batch), strict=True))
    return Task(batches, batches, batches, **settings)  # type: ignore[arg-type]


def vectors(count: int = 24, width: int = 4) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def zoo() -> dict[str, tuple[nn.Module, Task]]:
    torch.manual_seed(0)
    residual = Residual()
    for module in residual.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    tokens = torch.randint(0, 11, (12, 5), generator=torch.Generator().manual_seed(1))
    return {
        "residual": (residual, task_of(torch.rand(12, 1, 6, 6))),
        "mlp": (mlp(), task_of(vectors())),
        "transformer": (Transformer(), task_of(tokens)),
    }


def analysis_of(model: nn.Module, task: Task) -> Analysis:
    return analyse(capture(model, task.example_inputs()))


def scores_of(analysis: Analysis, scores: np.ndarray, layer: str) -> np.ndarray:
    """The scores of the neurons that a layer computes, in its order."""
    producer = next(found for found in analysis.producers if found.parameter == f"{layer}.weight")
    return scores[analysis.root[producer.atoms]]


def all_inputs(task: Task) -> np.ndarray:
    return np.concatenate([inputs.numpy() for inputs, _ in task.train]).astype(np.float64)


def all_labels(task: Task) -> np.ndarray:
    return np.concatenate([labels.numpy() for _, labels in task.train])


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def mlp_gradients(model: nn.Sequential, inputs: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-sample gradients of both weights of `mlp`, by hand, where `delta` is the loss's gradient at the logits."""
    first, second = model[0], model[2]
    w, b, v = (tensor.detach().numpy().astype(np.float64) for tensor in (first.weight, first.bias, second.weight))
    hidden = np.maximum(inputs @ w.T + b, 0)
    back = (delta @ v) * (hidden > 0)
    return back[:, :, None] * inputs[:, None, :], delta[:, :, None] * hidden[:, None, :]


def loss_delta(model: nn.Sequential, task: Task) -> np.ndarray:
    """p − y for every sample: the cross entropy's gradient at the logits."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = double(torch.from_numpy(all_inputs(task))).numpy()
    return softmax(logits) - np.eye(3)[all_labels(task)]
