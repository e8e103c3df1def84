"""Low-rank layers: exact at full rank, the best at any other, and only where they pay."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pared.architecture import LowRank, rank_for_energy, svd_convolution, svd_linear
from pared.core.errors import ModelError, SettingsError, WeightsError
from pared.core.rules import Mask, add_rule
from pared.graph import count
from pared.training import Task, Train


def toy_task(*shape: int, classes: int = 4) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, *shape, generator=generator), torch.randint(0, classes, (4,), generator=generator)) for _ in range(2)]
    return Task(batches, batches, batches)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# --- the functions ---


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([2.0, 1.0, 1.0], 0.0, 1),
        ([2.0, 1.0, 1.0], 4 / 6, 1),
        ([2.0, 1.0, 1.0], 0.7, 2),
        ([2.0, 1.0, 1.0], 5 / 6 + 1e-6, 3),
        ([2.0, 1.0, 1.0], 1.0, 3),
        ([2.0, 1.0, 0.0], 1.0, 2),
        ([0.0, 0.0], 0.9, 1),
        ([5.0], 1.0, 1),
    ],
)
def test_rank_for_energy(values, energy, rank):
    assert rank_for_energy(torch.tensor(values), energy) == rank


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_linear_is_exact(bias):
    layer, x = nn.Linear(7, 5, bias=bias), torch.randn(6, 7)
    pair = svd_linear(layer, 5)
    assert largest(pair(x), layer(x)) < 1e-5
    assert pair[0].bias is None
    assert (pair[1].bias is not None) == bias


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_truncated_error_is_that_of_the_singular_values_left_out(rank):
    layer = nn.Linear(6, 4)
    first, second = svd_linear(layer, rank)
    product = second.weight.detach().numpy().astype(np.float64) @ first.weight.detach().numpy()
    weight = layer.weight.detach().numpy()
    left_out = np.linalg.svd(weight, compute_uv=False)[rank:]
    assert np.linalg.norm(product - weight) == pytest.approx(np.sqrt((left_out**2).sum()), abs=1e-6)


CONVOLUTIONS = [
    nn.Conv2d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 5, (3, 1), padding="same", dilation=(2, 1), bias=False),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(6, 4, 1),
    nn.Conv1d(3, 4, 5, stride=2),
    nn.Conv3d(2, 3, 2, padding=1),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_full_rank_convolution_is_exact(layer):
    x = torch.randn(2, layer.in_channels, *[9, 8, 7][: layer.weight.dim() - 2])
    pair = svd_convolution(layer, min(layer.weight.flatten(1).shape))
    assert largest(pair(x), layer(x)) < 1e-5
    assert type(pair[0]) is type(pair[1]) is type(layer)
    assert (pair[0].stride, pair[0].padding, pair[0].dilation) == (layer.stride, layer.padding, layer.dilation)
    assert set(pair[1].kernel_size) == set(pair[1].stride) == {1}
    assert pair[0].bias is None
    assert (pair[1].bias is None) == (layer.bias is None)


def test_truncated_convolution_error():
    layer = nn.Conv2d(3, 6, 3)
    first, second = svd_convolution(layer, 2)
    product = second.weight.detach().flatten(1) @ first.weight.detach().flatten(1)
    left_out = np.linalg.svd(layer.weight.detach().flatten(1).numpy(), compute_uv=False)[2:]
    assert (product - layer.weight.flatten(1)).norm().item() == pytest.approx(np.sqrt((left_out**2).sum()), rel=1e-5)


def test_factors_keep_dtype_mode_and_frozen_weights():
    layer = nn.Linear(4, 3).double().eval()
    layer.weight.requires_grad_(False)
    pair = svd_linear(layer, 2)
    assert pair[0].weight.dtype == torch.float64
    assert not pair.training
    assert not pair[0].training
    assert [parameter.requires_grad for parameter in pair.parameters()] == [False, False, True]


# --- the method ---


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for name, weight in model.named_parameters() if name.endswith("weight")]


def test_replaces_only_what_pays_and_leaves_the_input_alone():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).train()
    before = copy.deepcopy(model.state_dict())
    small = LowRank(rank=4)(model, toy_task(64))
    assert shapes(small) == [(4, 64), (32, 4), (4, 32)]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    x = torch.zeros(1, 64)
    assert count(small, x).params == 4 * (64 + 32) + 32 + 32 * 4 + 4 < count(model, x).params
    assert count(small, x).macs == 4 * (64 + 32) + 32 * 4 < count(model, x).macs


def test_full_rank_replacement_keeps_the_outputs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 4))
    small = LowRank(energy=1.0, only_if_pays=False)(model, toy_task(3, 5, 5))
    x = torch.randn(3, 3, 5, 5)
    assert isinstance(small[0], nn.Sequential)
    assert isinstance(small[3], nn.Sequential)
    assert largest(small(x), model(x)) < 1e-5


def test_break_even_stays():
    # 6 x 3 = 18 weights; rank 2 costs 2 (6 + 3) = 18, which saves nothing
    model = nn.Sequential(nn.Linear(6, 3))
    assert shapes(LowRank(rank=2)(model, toy_task(6, classes=3))) == [(3, 6)]
    assert shapes(LowRank(rank=1)(model, toy_task(6, classes=3))) == [(1, 6), (3, 1)]


@pytest.mark.parametrize(("keep", "rank"), [(0.5, 10), (0.05, 1), (0.001, 1)])
def test_keep_is_a_share_of_the_weights(keep, rank):
    small = LowRank(keep=keep)(nn.Sequential(nn.Linear(64, 32)), toy_task(64, classes=32))
    assert shapes(small) == [(rank, 64), (32, rank)]
    assert rank == 1 or rank * 96 <= keep * 64 * 32 < (rank + 1) * 96


def test_ranks_of_wide_convolutions_are_multiples_of_8():
    layer = nn.Conv2d(16, 64, 3)
    with torch.no_grad():  # 11 equal singular values
        layer.weight.copy_((torch.linalg.qr(torch.randn(64, 11))[0] @ torch.linalg.qr(torch.randn(144, 11))[0].T).view_as(layer.weight))
    task = toy_task(16, 5, 5, classes=64)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert shapes(LowRank(energy=0.99)(model, task))[0][0] == 16  # upwards: at least the energy asked for
    assert shapes(LowRank(keep=0.5)(model, task))[0][0] == 16  # 22 downwards: at most the share asked for
    assert shapes(LowRank(keep=0.05)(model, task))[0][0] == 2
    assert shapes(LowRank(rank=11)(model, task))[0][0] == 11
    narrow = nn.Sequential(nn.Conv2d(16, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert shapes(LowRank(keep=0.5)(narrow, toy_task(16, 5, 5, classes=24)))[0][0] == 10


@pytest.mark.parametrize(("layers", "convolution", "linear"), [("both", True, True), ("linear", False, True), ("convolution", True, False)])
def test_layers(layers, convolution, linear):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(72, 16))
    small = LowRank(rank=1, layers=layers)(model, toy_task(4, 5, 5, classes=16))
    assert isinstance(small[0], nn.Sequential) == convolution
    assert isinstance(small[2], nn.Sequential) == linear


def test_grouped_and_transposed_convolutions_stay():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    small = LowRank(rank=1, only_if_pays=False)(model, toy_task(8, 6, 6, classes=8))
    assert [type(layer) for layer in small] == [type(layer) for layer in model]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.b(torch.relu(self.a(x))))


def test_a_shared_layer_is_replaced_once():
    model = Twice()
    small = LowRank(rank=16, only_if_pays=False, leave=["out"])(model, toy_task(16))  # type: ignore[arg-type]
    assert isinstance(small.a, nn.Sequential)
    assert small.a is small.b
    x = torch.randn(3, 16)
    assert largest(small(x), model(x)) < 1e-5


def test_tied_weights_and_torch_composites_stay():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 16)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.decoder = nn.Linear(16, 40, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x):
            return self.decoder(self.encoder(self.embedding(x)).mean(1))

    batches = [(torch.randint(0, 40, (4, 5)), torch.randint(0, 40, (4,)))]
    model = Tied()
    small = LowRank(rank=1)(model, Task(batches, batches, batches))
    assert list(small.state_dict()) == list(model.state_dict())


def test_a_model_that_reads_weights_itself_is_told_what_to_leave():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.out = nn.Linear(16, 4)

        def forward(self, x):
            return self.out(x @ self.layer.weight)

    with pytest.raises(ModelError, match=r"name that layer in leave. Replaced were: layer, out"):
        LowRank(rank=1)(Reads(), toy_task(16))
    assert isinstance(LowRank(rank=1, leave=("layer",))(Reads(), toy_task(16)).out, nn.Sequential)


def test_masks_are_baked_and_their_zeros_are_part_of_the_product():
    model = nn.Sequential(nn.Linear(16, 16))
    keep = torch.zeros(16, 16, dtype=torch.bool)
    keep[:2] = True  # rank 2
    add_rule(model[0], "weight", Mask(keep))
    small = LowRank(energy=1 - 1e-9)(model, toy_task(16, classes=16))
    x = torch.randn(3, 16)
    assert shapes(small) == [(2, 16), (16, 2)]
    assert largest(small(x), model(x)) < 1e-5


def test_tuning_trains_the_factors():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    still = LowRank(rank=2)(model, toy_task(16))
    tuned = LowRank(rank=2, tune="1ep")(model, toy_task(16))  # type: ignore[arg-type]
    assert shapes(still) == shapes(tuned)
    assert not torch.equal(still[0][0].weight, tuned[0][0].weight)
    assert LowRank(tune="1ep").tune == Train(epochs=1)  # type: ignore[arg-type]


def test_settings():
    assert LowRank().energy == 0.9
    with pytest.raises(SettingsError, match="one of energy, rank, keep, macs and latency, not several"):
        LowRank(energy=0.9, rank=3)
    with pytest.raises(SettingsError) as error:
        LowRank(rank=0, layers="dense", leave="a", only_if_pays=3)  # type: ignore[arg-type]
    assert [problem.split(" must be ")[0].split(": ")[1] for problem in error.value.problems] == ["rank", "layers", "leave", "only_if_pays"]
    with pytest.raises(SettingsError, match="energy must be a number at least 0 and at most 1"):
        LowRank(energy=1.1)
    with pytest.raises(SettingsError, match=r"leave must be the path of a module of the model. Got 'nowhere'"):
        LowRank(leave=("nowhere",))(nn.Linear(2, 2), toy_task(2))


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(WeightsError, match=r"0\.weight contains NaN or infinity"):
        LowRank()(model, toy_task(8, classes=8))
