"""Rate-aware training: what the rule computes, that files shrink, that nothing dead is left, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pared import data
from pared.codec import inspect, pack
from pared.core.errors import SettingsError
from pared.core.method import Recipe
from pared.core.rules import Mask, add_rule, bake, find_rule
from pared.core.seeds import seed_everything
from pared.graph.constants import fold_constants
from pared.quantize import Rate
from pared.quantize.rate_charge import EVERY
from pared.quantize.rate_finish import without_dead
from pared.quantize.rate_grid import UNIT, RateGrid, rate_grids, set_grid
from pared.recipe.yaml import dumps, loads
from pared.runtime import export
from pared.training import Journal, Task, Train, fit

FAST = Train(epochs=2)


@pytest.fixture(scope="module")
def digits() -> Task:
    return data.load("digits")


def mlp() -> nn.Sequential:
    seed_everything(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))


def layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def gridded(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        for name in ("weight", "bias"):
            set_grid(model, layer, name, 1.0)
    return model


def packed(model: nn.Module, task: Task, folder: Path) -> Path:
    raw = dataclasses.replace(task, normalize=None).example_inputs()
    file = export(bake(copy.deepcopy(model)).eval(), raw, folder / "model.onnx", normalize=task.normalize)
    pack(file, folder / "model.pared", "smallest")
    return folder / "model.pared"


# --- the rule ---


def test_forward_and_gradients_as_a_numpy_twin_says():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator).double()
    layer = nn.Linear(7, 5, bias=False).double()
    layer.weight = nn.Parameter(weight.clone())
    add_rule(layer, "weight", RateGrid(layer.weight, 0.5))
    level = weight.numpy() / 0.5
    assert np.array_equal(layer.weight.detach().numpy(), np.rint(level) * 0.5)
    x = torch.randn(3, 7, generator=generator).double()
    layer(x).square().sum().backward()
    of_weight = 2 * (x.numpy() @ (np.rint(level) * 0.5).T).T @ x.numpy()
    assert np.allclose(layer.get_parameter("parametrizations.weight.original").grad.numpy(), of_weight * 0.5 * UNIT)
    of_growth = 20 * (of_weight * np.rint(level) * 0.5).sum() / np.sqrt(35)
    assert np.isclose(float(layer.get_parameter("parametrizations.weight.0.growth").grad), of_growth)


def test_the_charge_pulls_at_every_level_by_the_cost_of_its_next_step():
    weight = nn.Parameter(0.1 * torch.tensor([[0.2, -1.4, 2.6, 0.0, -0.3], [0.0, 1.1, 0.0, 0.4, -2.2], [0.0, 0.0, 0.0, 0.0, 0.1]]).double())
    grid = RateGrid(weight, 1.0)
    grid.refresh(weight)
    from pared.quantize.rate_cost import FEATURES, cost_of

    cost = cost_of((weight.detach() * UNIT).round().abs(), torch.zeros(FEATURES, dtype=torch.float64))
    grid.charge(weight).backward()
    assert weight.grad is not None
    size = UNIT * weight.detach().numpy()
    expected = np.where(np.rint(np.abs(size)) < 1, cost.filling.numpy(), float(cost.growing)) * np.sign(size)
    seen = size != 0
    assert np.allclose(weight.grad.numpy()[seen], UNIT * expected[seen])
    assert float(grid.bits) == float(cost.total)


def test_there_is_no_minus_zero():
    layer = nn.Linear(3, 1)
    layer.weight = nn.Parameter(torch.tensor([[-0.1, 0.1, -3.0]]))
    set_grid(layer, layer, "weight", 1.0)
    assert not torch.signbit(layer.weight.detach())[0, :2].any()


# --- the method ---


def test_a_price_makes_the_file_smaller_and_all_of_it_lies_on_grids(digits, tmp_path):
    model = Train(epochs=5)(mlp(), digits)
    sizes = []
    for price in (0.0, 1e-3):
        small = Rate(price=price, train=Train(epochs=40), ramp=0.2)(model, digits)
        (tmp_path / f"{price}").mkdir()
        file = packed(small, digits, tmp_path / f"{price}")
        sizes.append(file.stat().st_size)
        assert all("-0" not in row.coding for row in inspect(file).tensors)
        weights = [row for row in inspect(file).tensors if len(row.shape) == 2]
        assert len(weights) == 3
        assert all(row.coding.startswith("grid") for row in weights)
    assert sizes[1] < 0.7 * sizes[0]
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(parameter.numel() for parameter in mlp().parameters())


def test_the_next_one_goes_on_with_the_grids_and_the_price(digits):
    first = Rate(price=1e-5, train=Train(epochs=8))(mlp(), digits)
    steps = [each.grid.scale().item() for each in rate_grids(first)]
    second = Rate(price=2e-5, train=FAST)
    model = second.prepare(first, digits)
    assert [each.grid.scale().item() for each in rate_grids(model)] == steps
    charge = second.objective(model, digits)
    assert charge.first == 1e-5
    assert len(list(rate_grids(second(first, digits)))) == len(steps)


def test_a_mask_stays(digits):
    model = mlp()
    keep = torch.rand(24, 64) < 0.3
    add_rule(layers(model)[0], "weight", Mask(keep))
    small = bake(Rate(price=0.0, train=FAST)(model, digits))
    assert layers(small)[0].weight.shape == (24, 64)
    assert not layers(small)[0].weight[~keep].any()
    assert layers(small)[0].weight[keep].any()


def test_a_wanted_size_is_reached_or_said_to_be_missed(digits, tmp_path, caplog):
    model = Train(epochs=5)(mlp(), digits)
    method = Rate(bytes="700B", price=1e-4, train=Train(epochs=60))
    small = method(model, digits)
    size = packed(small, digits, tmp_path).stat().st_size
    assert 550 < size <= 700
    assert "was to have" not in caplog.text
    with caplog.at_level(logging.WARNING):
        Rate(bytes=100, price=1e-5, train=Train(epochs=1))(model, digits)
    assert "was to have 100 bytes, it has" in caplog.text


def test_norms_become_part_of_the_layers_and_every_output_has_its_step(digits, tmp_path):
    seed_everything(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    method = Rate(price=1e-4, train=FAST)
    trained = method.prepare(model, digits)
    digits.tune(trained, method.train, method.objective(trained, digits))
    small = method.finish(trained, digits)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    inputs = digits.example_inputs(32)
    with torch.no_grad():
        before, after = trained(*inputs), small(*inputs)
    assert (before - after).abs().max() <= 0.1 * before.abs().max()  # the biases are rounded
    codings = [row.coding for row in inspect(packed(small, digits, tmp_path)).tensors if len(row.shape) == 4]
    assert all(coding.startswith("grid by rows") for coding in codings)


def test_a_killed_training_goes_on_to_the_same_result(digits, tmp_path):
    few = dataclasses.replace(digits, train=list(digits.train)[:6])
    plan = Train(epochs=EVERY // 6 + 3)  # more than one refresh
    method = Rate(bytes=900, price=1e-5, train=plan)

    def run(task: Task) -> nn.Module:
        seed_everything(1)
        return method(mlp(), task)

    def kill(event) -> None:
        if event["event"] == "epoch" and event["epoch"] == 8:
            raise KeyboardInterrupt

    whole = run(dataclasses.replace(few, journal=Journal(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(few, journal=Journal(tmp_path / "killed"), report=kill))
    again = run(dataclasses.replace(few, journal=Journal(tmp_path / "killed")))
    assert list(whole.state_dict()) == list(again.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_loop_of_your_own(digits):
    method = Rate(price=1e-4, train=FAST)
    model = method.prepare(mlp(), digits)
    fit(model, digits, FAST, method.objective(model, digits))
    seed_everything(0)
    small = method.finish(model, digits)
    assert all(find_rule(layer, "weight", RateGrid) is not None for layer in layers(small))


# --- dead neurons ---


def dead_in_the_middle() -> nn.Sequential:
    """Of 24 and 16 neurons half are dead; they emit relu(bias), which is zero for some and not for others."""
    model = mlp()
    for layer in layers(model)[:-1]:
        layer.weight.data[::2] = 0
        layer.bias.data.uniform_(-1, 1)
    return model


def test_dead_neurons_go_and_the_outputs_stay(digits):
    model = gridded(dead_in_the_middle()).eval()
    inputs = digits.example_inputs(32)
    small = without_dead(model, inputs)
    assert [tuple(layer.weight.shape) for layer in layers(small)] == [(12, 64), (8, 12), (10, 8)]
    with torch.no_grad():
        assert torch.allclose(model(*inputs), small(*inputs), atol=1e-5)
    for layer in layers(small):
        assert layer.weight.detach().ne(0).any(1).all()
        assert layer.weight.detach()[:, :].ne(0).any(0)[layer.weight.shape[1] < 64 :].any()
        assert isinstance(find_rule(layer, "weight", RateGrid), RateGrid)
    # the first biases stayed on their grid; those that took up a constant are as they have to be
    assert isinstance(find_rule(layers(small)[0], "bias", RateGrid), RateGrid)
    again = layers(small)[1]
    assert torch.equal(again.weight, layers(bake(copy.deepcopy(small)))[1].weight)


def test_masks_and_levels_are_cut_along():
    model = dead_in_the_middle()
    first = layers(model)[0]
    keep = torch.rand(24, 64) < 0.5
    add_rule(first, "weight", Mask(keep))
    set_grid(model, first, "weight", 1.0)
    level = first.get_parameter("parametrizations.weight.original").detach().clone()
    small = layers(without_dead(model, (torch.rand(4, 1, 8, 8),)))[0]
    mask = find_rule(small, "weight", Mask)
    assert isinstance(mask, Mask)
    assert torch.equal(mask.keep, keep[1::2])
    assert torch.equal(small.get_parameter("parametrizations.weight.original"), level[1::2])


def test_nothing_dead_means_nothing_changes():
    model = gridded(mlp())
    assert without_dead(model, (torch.rand(4, 1, 8, 8),)) is model


class Border(nn.Module):
    def __init__(self, padding: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3, padding=padding)

    def forward(self, x):
        return self.second(F.max_pool2d(torch.relu(self.first(x)), 2)).flatten(1)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_constant_is_no_constant_at_a_padded_border(padding):
    seed_everything(0)
    model = Border(padding).eval()
    model.first.weight.data[:2] = 0
    model.first.bias.data[:2] = torch.tensor([0.5, -0.5])
    x = torch.rand(4, 1, 12, 12)
    folded = fold_constants(model, x)
    with torch.no_grad():
        assert torch.allclose(model(x), folded(x), atol=1e-6)
    gone = (folded.second.weight == 0).flatten(2).all(2).all(0)
    assert gone.tolist() == [padding == 0, True, False, False]


def test_constants_of_constants_are_found():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    model[0].weight.data.zero_(), model[0].bias.data.fill_(2.0)
    x = torch.rand(4, 3)
    folded = fold_constants(model, x)
    assert not folded[2].weight.any()
    assert not folded[4].weight.any()
    with torch.no_grad():
        assert torch.allclose(model(x), folded(x), atol=1e-6)


def test_a_layer_without_bias_gets_one_where_it_must():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    model[0].weight.data[0] = 0
    model[0].bias.data[0] = 1.5
    folded = fold_constants(model, torch.rand(4, 3))
    assert folded[2].bias.tolist() == pytest.approx([1.5 * model[2].weight[0, 0].item()])


# --- shared weights, settings ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))))


def test_a_weight_that_two_layers_share_is_put_on_one_grid_and_baked_once():
    seed_everything(0)
    batches = [(torch.rand(8, 6), torch.arange(8) % 3)]
    small = Rate(price=0.0, train=FAST)(Tied(), Task(batches, batches, batches))
    assert torch.equal(small.first.weight, small.second.weight)
    with torch.no_grad():
        before = small(batches[0][0])
        after = bake(small)(batches[0][0])
    assert torch.equal(before, after)
    assert small.first.weight is small.second.weight


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("price", -1), ("bytes", 0), ("ramp", 2), ("step", 0), ("contexts", 1), ("teach", 2), ("temperature", 0), ("leave", "fc1")),
        ("train", Train(early_stop=2)),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(SettingsError, match=f"quantize.rate: {field} must be"):
        Rate(**{field: value})


def test_a_size_needs_a_price_to_begin_with():
    with pytest.raises(SettingsError, match="price must be greater than 0 where bytes is given"):
        Rate(bytes=1000, price=0)


def test_yaml_takes_a_size_in_words():
    recipe = loads("steps:\n  - quantize.rate: {bytes: 10kB, train: {epochs: 40}, leave: [fc3]}\n", "recipe.yaml")
    assert recipe.steps == (Rate(bytes=10_000, train=Train(epochs=40), leave=("fc3",)),)
    assert loads(dumps(Recipe(*recipe.steps)), "recipe.yaml").steps == recipe.steps
