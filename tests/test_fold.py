"""Folding batch norm: exact for every layer, against numpy, and only where it is allowed."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.graph import capture
from pared.graph.fold import fold_batch_norm, folded


def randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


FOLDABLE = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 7)),
    "grouped conv2d without bias": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "conv2d with same padding": (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6, eps=0.1), (3, 4)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_outputs_are_equal_and_no_norm_is_left(name: str) -> None:
    layer, norm, shape = FOLDABLE[name]
    model = randomise(nn.Sequential(layer, norm, nn.ReLU()))
    x = torch.randn(shape)
    graph = capture(model, x).module
    before = copy.deepcopy(graph.state_dict())
    small = fold_batch_norm(graph)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert set(small.state_dict()) == {"0.weight", "0.bias"}
    assert all(p.requires_grad for p in small.parameters())
    assert not any("batch_norm" in node.name for node in small.graph.nodes)
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())  # the input is as it was


def test_formula_against_numpy() -> None:
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(4, 3, 2, 2)), random.normal(size=4)
    gamma, beta, mean, var = random.normal(size=4), random.normal(size=4), random.normal(size=4), random.uniform(0.1, 2, 4)
    found_weight, found_bias = folded(
        *(torch.from_numpy(a) for a in (weight, bias)), tuple(torch.from_numpy(a) for a in (gamma, beta, mean, var)), 1e-3
    )  # type: ignore[arg-type]
    for channel in range(4):
        factor = gamma[channel] / np.sqrt(var[channel] + 1e-3)
        np.testing.assert_allclose(found_weight[channel], weight[channel] * factor)
        np.testing.assert_allclose(found_bias[channel], (bias[channel] - mean[channel]) * factor + beta[channel])


def test_formula_of_grouped_transposed_on_paper() -> None:
    # two groups of one input and two outputs: output channel 2 * group + j is scaled by 1, 10, 100, 1000
    weight = torch.ones(2, 2, 1)
    variance = torch.tensor([1.0, 1e-2, 1e-4, 1e-6])
    found, bias = folded(weight, None, (None, None, torch.zeros(4), variance), 0.0, groups_of_transposed=2)
    torch.testing.assert_close(found.flatten(), torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert bias.tolist() == [0.0, 0.0, 0.0, 0.0]


class Twice(nn.Module):
    """The layer's output is read by something else too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.norm(y) + y


class Shared(Twice):
    """The layer is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.layer(x)))


class Sequence(Twice):
    """A norm over the sequence axis, whose length happens to be the number of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


@pytest.mark.parametrize(("model", "shape"), [(Twice(), (2, 3, 4, 4)), (Shared(), (2, 3, 4, 4)), (Sequence(), (2, 3, 3))])
def test_what_cannot_be_folded_stays(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    small = fold_batch_norm(capture(randomise(model), x).module)
    assert any("batch_norm" in node.name for node in small.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))


def test_training_form_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert any(
        "batch_norm" in node.name for node in fold_batch_norm(capture(model, torch.randn(2, 3, 4, 4), train=True).module).graph.nodes
    )


def test_result_copies_pickles_captures_and_trains() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6)
    small = fold_batch_norm(capture(model, x).module)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), capture(small, x).module):
        torch.testing.assert_close(twin(x), small(x))
    small.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
