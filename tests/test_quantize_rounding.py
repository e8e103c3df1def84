"""Rounding of whole networks: exact grids, layers in sequence, and the networks that it has to take as they come."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pared.core.errors import ModelError, SettingsError, WeightsError
from pared.core.layers import Layer, split_weight
from pared.dynamic import Exits
from pared.prune import Weights
from pared.quantize.gptq import gptq
from pared.quantize.rounding import Rounding
from pared.quantize.row_rounding import dequantize, row_scales
from pared.training import Task, Train

PLAIN = Rounding(method="nearest", scales="minmax", correct_bias=False)


def task_of(*shape: int, samples: int = 32, dtype: torch.dtype = torch.float32) -> Task:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(samples, *shape, generator=generator)
    for axis in range(1, mixed.dim()):
        mixed = mixed + 0.9 * mixed.roll(1, axis)  # neighbours are alike, as in pictures
    batches = [(part.to(dtype), torch.zeros(len(part), dtype=torch.long)) for part in (mixed + 0.5).split(16)]
    return Task(batches, batches, batches)


def inputs_of(task: Task) -> Tensor:
    return torch.cat([batch for batch, _ in task.train])


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4, bias=False)),
    ).eval()


def rows_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer, Layer)
    return split_weight(layer, layer.weight.detach()).flatten(2).flatten(0, 1)


def output_change(model: nn.Module, small: nn.Module, task: Task) -> float:
    with torch.no_grad():
        wanted, found = model.eval()(inputs_of(task)), small.eval()(inputs_of(task))
    return float((found - wanted).square().sum() / wanted.square().sum())


# --- grids ---


def test_nearest_is_what_the_formula_says():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    small = PLAIN(layer, task_of(6))
    weight = layer.weight.detach().numpy()
    scales = (np.abs(weight).max(1).astype(np.float64) / 7).astype(np.float32)
    integers = np.rint(weight.astype(np.float64) / scales[:, None].astype(np.float64)).astype(np.float32)
    assert np.array_equal(small.weight.detach().numpy(), integers * scales[:, None])
    assert torch.equal(small.bias, layer.bias)


@pytest.mark.parametrize(("method", "granularity"), [("gptq", "channel"), ("gptq", "tensor"), ("adaround", "channel")])
def test_every_weight_is_an_integer_times_a_scale_bit_for_bit(method, granularity):
    model, task = (convnet(), task_of(2, 8, 8)) if method == "gptq" else (convnet()[6:7], task_of(8, 6, 6))
    small = Rounding(bits=3, method=method, granularity=granularity, scales="minmax")(model, task)
    for before, after in zip(model.modules(), small.modules(), strict=True):
        if isinstance(before, Layer):
            rows, found = rows_of(before), rows_of(after)
            rows, found = (rows, found) if granularity == "channel" else (rows.reshape(1, -1), found.reshape(1, -1))
            scales = row_scales(rows, 3)
            integers = torch.round(found / scales[:, None]).int()
            assert int(integers.abs().max()) <= 3
            assert torch.equal(dequantize(integers, scales), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_grids_are_exact_in_other_types(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(6, 3).to(dtype)
    small = Rounding(scales="minmax", correct_bias=False)(layer, task_of(6, dtype=dtype))
    assert small.weight.dtype == dtype
    scales = row_scales(layer.weight, 7)
    integers = torch.round(small.weight.detach().double() / scales.double()[:, None])
    assert torch.equal(dequantize(integers, scales).to(dtype), small.weight)
    assert torch.equal(dequantize(integers, scales), small.weight.float())


def test_with_a_batch_norm_it_is_the_folded_weight_that_is_on_the_grid():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    model(inputs_of(task_of(2, 6, 6)))
    small = PLAIN(model.eval(), task_of(2, 6, 6))
    assert isinstance(small[1], nn.Identity)
    assert isinstance(small[0].bias, nn.Parameter)
    factor = (model[1].weight / torch.sqrt(model[1].running_var + 1e-5)).detach()
    rows = (model[0].weight.detach() * factor.view(-1, 1, 1, 1)).flatten(1)
    assert torch.allclose(small[0].weight.flatten(1), rows, atol=float(rows.abs().max()) / 7)
    assert all(len(row.abs().unique()) <= 8 for row in small[0].weight.flatten(1))
    assert isinstance(model[1], nn.BatchNorm2d)


# --- what is gained ---


@pytest.mark.parametrize("bits", [3, 4])
def test_each_part_brings_the_outputs_nearer(bits):
    model, task = convnet(), task_of(2, 8, 8)
    plain, corrected, moved = (
        output_change(model, Rounding(bits=bits, method=method, scales="mse", correct_bias=bias)(model, task), task)
        for method, bias in (("nearest", False), ("nearest", True), ("gptq", True))
    )
    assert moved < corrected < plain


def test_one_scale_for_a_layer_needs_equalisation_where_channels_differ():
    model, task = convnet(), task_of(2, 8, 8)
    with torch.no_grad():
        model[2].weight.mul_(torch.logspace(-2, 2, 8).view(-1, 1, 1, 1))
        model[4].weight.mul_(torch.logspace(2, -2, 8).view(2, 1, 4, 1, 1).expand(2, 4, 4, 1, 1).reshape(8, 4, 1, 1))
    change = {
        (granularity, equalize): output_change(model, Rounding(bits=8, granularity=granularity, equalize=equalize)(model, task), task)
        for granularity in ("channel", "tensor")
        for equalize in (False, True)
    }
    assert change["tensor", True] < 0.1 * change["tensor", False]
    assert change["channel", False] < 0.1 * change["tensor", False]


def test_layers_are_rounded_one_after_another_on_what_the_rounded_ones_give():
    torch.manual_seed(0)
    model, task = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), task_of(8)
    small = Rounding(bits=3, correct_bias=False)(model, task)
    weight, inputs = model[2].weight.detach(), small[:2](inputs_of(task)).detach().double()
    gram = inputs.T @ inputs
    scales = row_scales(weight, 3, gram.diagonal())
    assert torch.equal(small[2].weight, dequantize(gptq(weight, gram, scales, -3, 3), scales))


def test_the_mean_of_every_layer_comes_back():
    model, task = convnet(), task_of(2, 8, 8)
    small = Rounding(bits=3)(model, task)
    assert isinstance(small[10].bias, nn.Parameter)
    for at in (1, 5, 11):
        axes = [axis for axis in range(model[:at](inputs_of(task)).dim()) if axis != 1]
        wanted, found = (network[:at](inputs_of(task)).mean(axes) for network in (model, small))
        assert torch.allclose(wanted, found, atol=1e-5)


# --- networks as they come ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))))


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    model, task = Tied(), task_of(6)
    small = Rounding()(model, task)
    assert small.first.weight is small.second.weight
    inner = torch.relu(model.first(inputs_of(task)))
    assert torch.allclose(small.second(torch.relu(small.first(inputs_of(task)))).mean(0), model.second(inner).mean(0), atol=0.05)


def test_a_weight_that_is_read_without_its_layer_is_rounded_to_nearest():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.inner(x, x, x)[0])

    model = Attention()
    small = Rounding(scales="minmax")(model, task_of(5, 8))
    assert torch.equal(small.inner.out_proj.weight, PLAIN(model, task_of(5, 8)).inner.out_proj.weight)
    assert not torch.equal(small.out.weight, PLAIN(model, task_of(5, 8)).out.weight)


def test_pruned_weights_stay_zero_and_masks_are_baked():
    torch.manual_seed(0)
    model, task = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), task_of(8)
    pruned = Weights(keep=0.3)(model, task)
    small = Rounding(bits=3)(pruned, task)
    assert sorted(small.state_dict()) == sorted(model.state_dict())
    for at in (0, 2):
        assert not small[at].weight[pruned[at].weight == 0].any()


def test_layers_that_are_left_stay_float_and_gradients_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].weight.requires_grad_(False)
    small = Rounding(leave=["2"])(model, task_of(8))  # type: ignore[arg-type]  # as YAML gives it
    assert torch.equal(small[2].weight, model[2].weight)
    assert not torch.equal(small[0].weight, model[0].weight)
    assert [parameter.requires_grad for parameter in small.parameters()] == [False, True, True, True]
    assert small.training is model.training


def test_a_network_with_exits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    staged = Exits(count=1, train=Train(epochs=1))(model, task_of(6))
    small = Rounding(bits=2, scales="minmax", equalize=True)(staged, task_of(6))
    assert any(isinstance(module, nn.BatchNorm1d) for module in staged.modules())
    assert not any(isinstance(module, nn.BatchNorm1d) for module in small.modules())
    layers = [module for module in small.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 4
    assert all(len(row.abs().unique()) <= 2 for layer in layers for row in layer.weight)


def test_the_same_every_time():
    model, task = convnet(), task_of(2, 8, 8)
    before = copy.deepcopy(model.state_dict())
    first, second = (Rounding(bits=3)(model, task).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- mistakes ---


def test_every_wrong_setting_is_named():
    with pytest.raises(SettingsError) as caught:
        Rounding(
            bits=9,
            method="best",
            granularity="row",
            scales="max",
            samples=0,
            damping=0,
            equalize=1,
            correct_bias="no",
            leave="0",  # type: ignore[arg-type]
        )
    fields = [problem.split()[1] for problem in caught.value.problems]
    assert fields == ["bits", "method", "granularity", "scales", "samples", "damping", "equalize", "correct_bias", "leave"]


def test_models_that_cannot_be_rounded():
    with pytest.raises(SettingsError, match="leave must be the path of a module"):
        Rounding(leave=("nowhere",))(nn.Linear(8, 2), task_of(8))
    with pytest.raises(SettingsError, match="no convolution or linear layer"):
        Rounding()(nn.ReLU(), task_of(8))
    with pytest.raises(SettingsError, match=r"0\.weight is computed from other parameters"):
        Rounding()(nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 2))), task_of(8))
    layer = nn.Linear(8, 2)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="weight"):
        Rounding()(layer, task_of(8))


class Log(nn.Module):
    def forward(self, x):
        return torch.log(x)


def test_inputs_that_cannot_be_calibrated_on():
    with pytest.raises(ModelError, match="1 reads values that aren't finite"):
        Rounding()(nn.Sequential(Log(), nn.Linear(8, 2)), task_of(8))
    with pytest.raises(ModelError, match="inputs of 1 depend on each other too much for damping=1e-300"):
        Rounding(damping=1e-300)(nn.Sequential(nn.Identity(), nn.Linear(8, 2)), task_of(8, samples=2))
