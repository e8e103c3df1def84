"""Weights of few bits: what is baked lies on grids, masks and ties hold, norms are folded, and bits go where they help."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pared.core.errors import SettingsError, WeightsError
from pared.core.method import Recipe
from pared.core.rules import bake, find_rule
from pared.distill import Teach
from pared.dynamic import Exits
from pared.prune import Neurons, Random, Weights
from pared.quantize import Bits, Int8, bit_errors, choose_bits, fake_quantize, find_grid
from pared.quantize.grid import range_grid
from pared.quantize.weight_blocks import Blocks, blocks_of
from pared.quantize.weight_grid import DoReFaGrid, FixedGrid, LearnedGrid
from pared.runtime import export
from pared.training import Task, Train

ONE = Train(epochs=1, learning_rate=0.01)


def toy_task(*shape: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, *shape, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(3)]
    return Task(batches, batches, batches)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(24, 3)),
    )
    for norm in (net[1], net[4]):
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_var is not None
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return net


def integers_of(weight: torch.Tensor, limit: int) -> list[set[int]]:
    """The integers of each row, found from the row alone, and a proof that float32(k) · float32(step) is the row."""
    found = []
    for row in weight.detach().numpy().reshape(len(weight), -1):
        magnitudes = np.unique(np.abs(row[row != 0]))
        for divisor in range(1, limit + 1):
            start = np.float32(magnitudes[-1] / divisor)
            steps = [start, np.nextafter(start, np.float32(0)), np.nextafter(start, np.float32(np.inf))]
            steps += [np.nextafter(steps[1], np.float32(0)), np.nextafter(steps[2], np.float32(np.inf))]
            exact = [step for step in steps if np.array_equal(np.rint(row / step).astype(np.float32) * step, row)]
            if exact:
                found.append({int(k) for k in np.rint(row / exact[0])})
                break
        else:
            raise AssertionError(f"no grid of {limit} steps: {row}")
    return found


@pytest.mark.parametrize("method", ["minmax", "mse", "lsq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tune", [None, ONE])
def test_baked_weights_are_whole_multiples_of_a_step_bit_for_bit(method, bits, tune):
    small = bake(Bits(weights=bits, method=method, tune=tune, first_and_last=None)(mlp(), toy_task(8)))
    limit = 2 ** (bits - 1) - 1
    for layer in small:
        if isinstance(layer, nn.Linear):
            assert type(layer) is nn.Linear
            assert all(max(map(abs, row)) <= limit for row in integers_of(layer.weight, limit))
    assert set(small.state_dict()) == set(mlp().state_dict())


def test_the_first_and_the_last_layer_in_the_order_of_the_forward_keep_more():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    torch.manual_seed(0)
    result: Any = Bits(weights=2)(Backwards(), toy_task(8))
    limits = {name: float(find_rule(getattr(result, name), "weight", FixedGrid).highest.max()) for name in ("first", "middle", "last")}  # type: ignore[union-attr]
    assert limits == {"first": 127, "middle": 1, "last": 127}
    assert not any(module._forward_pre_hooks for module in result.modules())


def test_sixteen_bits_are_nearly_the_weights_and_too_many_for_half_precision():
    before = mlp()
    after = bake(Bits(weights=16, method="minmax")(before, toy_task(8)))
    assert torch.allclose(after[0].weight, before[0].weight, atol=1e-4)
    half = Bits(weights=4)(nn.Sequential(nn.Linear(8, 3)).double(), Task(*[[(torch.zeros(2, 8).double(), torch.zeros(2).long())]] * 3))
    assert half[0].weight.dtype == torch.float64


def test_half_precision_keeps_its_sixteen_bits():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3).half()

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight.float(), self.layer.bias.float())

    model = Half()
    for bits, changed in ((16, False), (4, True)):
        found = bake(Bits(weights=bits, first_and_last=None)(model, toy_task(8)))
        assert torch.equal(found.layer.weight, model.layer.weight) is not changed
        assert found.layer.weight.dtype == torch.float16


# --- masks, ties, frozen weights ---


@pytest.mark.parametrize("method", ["mse", "lsq", "dorefa"])
def test_masked_weights_stay_exactly_zero(method):
    task = toy_task(8)
    sparse = Weights(keep=0.5)(mlp(), task)
    gone = [layer.weight == 0 for layer in sparse if isinstance(layer, nn.Linear)]
    small = bake(Bits(weights=4, method=method, tune=ONE)(sparse, task))
    for layer, mask in zip([layer for layer in small if isinstance(layer, nn.Linear)], gone, strict=True):
        assert bool((layer.weight[mask] == 0).all())
        assert not bool(torch.signbit(layer.weight[mask]).any())


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_tied_weights_stay_tied(method):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.out(torch.relu(self.two(torch.relu(self.one(x)))))

    torch.manual_seed(0)
    result: Any = Bits(weights=3, method=method, tune=ONE, first_and_last=None)(Tied(), toy_task(8))
    assert torch.equal(result.one.weight, result.two.weight)
    expected = result.one.weight.detach().clone()
    baked = bake(result)
    assert baked.one.weight is baked.two.weight
    assert torch.equal(baked.one.weight, expected)


def test_dorefa_refuses_ties():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    with pytest.raises(SettingsError, match=r"0\.weight is shared"):
        Bits(method="dorefa", tune=ONE)(net, toy_task(8))


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_frozen_weights_are_rounded_and_not_trained(method):
    net = mlp()
    net[0].weight.requires_grad_(False)
    before = bake(Bits(weights=4, method=method)(net, toy_task(8)))
    after = bake(Bits(weights=4, method=method, tune=ONE)(net, toy_task(8)))
    assert torch.equal(before[0].weight, after[0].weight)
    assert not after[0].weight.requires_grad
    assert not torch.equal(before[2].weight, after[2].weight)


def test_a_weight_with_a_rule_can_be_assigned():
    layer = Bits(weights=2, first_and_last=None, method="minmax")(nn.Sequential(nn.Linear(8, 3)), toy_task(8))[0]
    rule = find_rule(layer, "weight", FixedGrid)
    assert isinstance(rule, FixedGrid)
    layer.weight = torch.full((3, 8), 1e6)
    assert torch.equal(layer.weight, rule.step[:, 0].expand(3, 8))


# --- learned steps ---


def test_a_learned_step_moves_with_plain_sgd_as_in_the_paper():
    torch.manual_seed(0)
    layer = nn.Linear(6, 2, bias=False).double()
    net = Bits(weights=3, method="lsq", first_and_last=None)(
        nn.Sequential(layer), Task(*[[(torch.zeros(2, 6).double(), torch.zeros(2).long())]] * 3)
    )
    rule = find_rule(net[0], "weight", LearnedGrid)
    assert isinstance(rule, LearnedGrid)
    weight, steps = net[0].parametrizations["weight"].original.detach().numpy().copy(), rule.step[:, 0, 0].numpy().copy()
    out = torch.randn(2, 6).double()
    (net[0].weight * out).sum().backward()
    torch.optim.SGD([rule.ratio], lr=0.1).step()
    ratio, limit = weight / steps[:, None], 3
    slope = np.where(np.abs(ratio) <= limit, np.rint(ratio) - ratio, np.clip(ratio, -limit, limit))
    expected = steps - 0.1 * (slope * out.numpy()).sum(1) / np.sqrt(6 * limit)
    np.testing.assert_allclose(rule.grid().step[:, 0, 0].detach().numpy(), expected, rtol=1e-9)


def test_a_learned_step_finds_a_better_one():
    target = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    blocks = Blocks("channel")
    wide = range_grid(*(part(blocks.split(target), -1, keepdim=True) for part in (torch.amin, torch.amax)), 3)
    rule = LearnedGrid(wide, blocks, target.clone().requires_grad_())
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.02)

    def error() -> torch.Tensor:
        return (rule(target) - target).square().sum()

    first = error().item()
    for _ in range(150):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    best = find_grid(blocks.split(target), 3)
    least = float((FixedGrid(best, blocks)(target) - target).square().sum())
    assert error().item() < first
    assert error().item() < 1.25 * least
    assert rule.ratio.dim() == 1  # no weight decay


# --- batch norm ---


@pytest.mark.parametrize("settings", [{}, {"method": "lsq"}, {"granularity": "group", "group": 5}, {"granularity": "tensor"}], ids=str)
def test_norms_are_folded_onto_the_grid(settings):
    net, task = convnet(), toy_task(2, 6, 6)
    result = Bits(weights=4, first_and_last=None, **settings)(net, task)
    kinds = [type(module) for module in bake(copy.deepcopy(result))]
    assert kinds[1] is kinds[4] is nn.Identity
    assert [type(module) for module in net][1] is nn.BatchNorm2d
    weights = [result[0].weight.detach().clone(), result[3].weight.detach().clone()]
    baked = bake(result).eval()
    assert torch.equal(baked[0].weight, weights[0])
    if settings.get("granularity") != "group":
        for layer in (baked[0], baked[3]):
            assert all(max(map(abs, row)) <= 7 for row in integers_of(layer.weight, 7))
    unfolded = convnet().eval()
    for at in (0, 3, 7):
        layer: Any = unfolded[at]
        blocks = blocks_of(layer, settings.get("granularity", "channel"), settings.get("group", 32))
        split = blocks.split(layer.weight.detach())
        layer.weight.data = blocks.join(fake_quantize(split, find_grid(split, 4)), layer.weight.shape)
    x = task.example_inputs(4)[0]
    with torch.no_grad():
        torch.testing.assert_close(baked(x), unfolded(x), rtol=1e-4, atol=1e-5)


def test_the_weights_in_the_file_are_the_baked_ones(tmp_path):
    net, task = convnet(), toy_task(2, 6, 6)
    baked = bake(Bits(weights=3, tune=ONE)(net, task)).eval()
    file = export(baked, task.example_inputs(), tmp_path / "small.onnx")
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer]
    for layer in (baked[0], baked[3], baked[7]):
        assert any(np.array_equal(array, layer.weight.detach().numpy()) for array in stored)


def test_a_folded_rule_goes_on_training():
    task = toy_task(2, 6, 6)
    for method in ("mse", "lsq", "dorefa"):
        first = Bits(weights=3, method=method, tune=ONE, first_and_last=None)(convnet(), task)
        second = bake(Train(epochs=1, learning_rate=0.01)(first, task))
        limit = 7 if method == "dorefa" else 3
        assert all(max(map(abs, row)) <= limit for row in integers_of(second[0].weight, limit))
        assert not torch.equal(bake(first)[0].weight, second[0].weight)


def test_a_norm_with_a_factor_of_zero_is_folded():
    net, task = convnet(), toy_task(2, 6, 6)
    assert isinstance(net[1], nn.BatchNorm2d)
    net[1].weight.data[2] = 0
    result = bake(Bits(weights=4)(net, task)).eval()
    assert isinstance(result[1], nn.Identity)
    assert bool((result[0].weight[2] == 0).all())
    assert bool(torch.isfinite(result(*task.example_inputs())).all())


def test_a_norm_that_the_forward_looks_at_stays():
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.norm(self.conv(x)) * (self.norm.eps > 0)
            return self.out(x.mean((2, 3)))

    result: Any = Bits()(Looks(), toy_task(2, 6, 6))
    assert isinstance(result.norm, nn.BatchNorm2d)


def test_after_a_cut_and_before_a_teacher():
    task = toy_task(2, 6, 6)
    recipe = Recipe(Neurons(keep=0.5, importance=Random(0), round_to=1), Bits(weights=4, first_and_last=None), Teach(train=ONE))
    result = recipe(convnet(), task).eval()
    assert not any("parametrizations" in name for name in result.state_dict())
    assert all(max(map(abs, row)) <= 7 for row in integers_of(result[0].weight, 7))


def test_norms_of_a_network_with_exits_are_folded_too():
    task = toy_task(2, 6, 6)
    result: Any = Recipe(Exits(count=1, train=ONE), Bits(weights=3, first_and_last=None))(convnet(), task)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.modules())
    for layer in result.modules():
        if isinstance(layer, nn.Conv2d):
            assert all(max(map(abs, row)) <= 3 for row in integers_of(layer.weight, 3))


def test_a_cut_may_come_after():
    task = toy_task(2, 6, 6)
    for method in ("mse", "lsq"):
        first = Bits(weights=2, first_and_last=None, method=method)(convnet(), task)
        result: Any = bake(Neurons(keep=0.5, importance=Random(0), round_to=1, tune=ONE)(first, task))
        assert all(max(map(abs, row)) <= 1 for row in integers_of(result[0].weight, 1))


def test_int8_may_come_after():
    task = toy_task(2, 6, 6)
    small = Recipe(Bits(weights=4), Int8(calibration=8))(convnet(), task)
    assert any(tensor.dtype == torch.int8 for tensor in small.state_dict().values())


# --- mixed bits ---


def test_bits_go_where_they_help():
    errors = {"a": {2: 100.0, 4: 10.0, 8: 0.0}, "b": {2: 10.0, 4: 1.0, 8: 0.5}, "c": {2: 1.0, 4: 1.0, 8: 2.0}}
    assert choose_bits(errors, {"a": 10, "b": 10, "c": 10}, 2) == {"a": 2, "b": 2, "c": 2}
    assert choose_bits(errors, {"a": 10, "b": 10, "c": 10}, 8 / 3) == {"a": 4, "b": 2, "c": 2}
    # per bit of a weight: 45 for a, 4.5 for b, then 2.5 for a, which doesn't fit
    assert choose_bits(errors, {"a": 10, "b": 10, "c": 10}, 4) == {"a": 4, "b": 4, "c": 2}
    assert choose_bits(errors, {"a": 10, "b": 10, "c": 10}, 14 / 3) == {"a": 8, "b": 4, "c": 2}
    assert choose_bits(errors, {"a": 10, "b": 10, "c": 10}, 8) == {"a": 8, "b": 8, "c": 2}
    assert choose_bits(errors, {"a": 1000, "b": 10, "c": 10}, 2.1) == {"a": 2, "b": 8, "c": 2}  # a doesn't fit
    with pytest.raises(SettingsError, match="budget must be a number at least 2"):
        choose_bits(errors, {"a": 1, "b": 1, "c": 1}, 1.5)


def test_errors_of_the_outputs_against_a_computation_by_hand():
    net, batches = mlp().eval(), [(torch.randn(5, 8),), (torch.randn(3, 8),)]
    before = copy.deepcopy(net.state_dict())
    found = bit_errors(net, ["0", "4"], batches, lambda layer, bits: layer.weight * (1 - 1 / bits), choices=[2, 4])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for path in (0, 4):
        for bits in (2, 4):
            moved = copy.deepcopy(net)
            moved[path].weight.data *= 1 - 1 / bits
            expected = sum((moved(x) - net(x)).square().sum().item() for (x,) in batches)
            assert found[str(path)][bits] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("budget", [2.0, 3.0, 5.5, 8.0])
def test_a_mixed_network_is_within_its_budget(budget):
    result: Any = Bits(weights="mixed", budget=budget, samples=16)(mlp(), toy_task(8))
    spent = total = 0
    for layer in (module for module in result if isinstance(module, nn.Linear)):
        rule: Any = find_rule(layer, "weight", FixedGrid)
        total += layer.weight.numel()
        spent += layer.weight.numel() * (int(rule.highest.max()).bit_length() + 1)
    assert spent <= budget * total


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": 1}, "weights must be 2 to 8, 16, or mixed. Got 1"),
        ({"weights": True}, "weights must be"),
        ({"granularity": "row"}, "granularity must be tensor, channel or group"),
        ({"group": 0}, "group must be a whole number at least 1"),
        ({"method": "pact"}, "method must be minmax, mse, lsq or dorefa"),
        ({"method": "dorefa"}, "tune must be a training"),
        ({"first_and_last": 1}, "first_and_last must be"),
        ({"budget": 1}, "budget must be a number at least 2 and at most 8"),
        ({"leave": "0"}, "leave must be a list"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingsError, match=message):
        Bits(**settings)


def test_models_that_can_not_be_quantized():
    task = toy_task(8)
    with pytest.raises(SettingsError, match="no convolution or linear layer"):
        Bits()(nn.Sequential(nn.ReLU()), task)
    with pytest.raises(SettingsError, match="leave must be the path of a module"):
        Bits(leave=("9",))(mlp(), task)
    with pytest.raises(SettingsError, match=r"0\.weight is computed from other parameters"):
        Bits()(nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 3))), task)
    once = Bits()(mlp(), task)
    with pytest.raises(SettingsError, match=r"pared\.bake"):
        Bits()(once, task)
    bad = mlp()
    bad[0].weight.data[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"0\.weight"):
        Bits()(bad, task)


def test_left_and_empty_layers_stay():
    net = mlp()
    net.add_module("empty", nn.Linear(3, 3, bias=False))
    found = bake(Bits(weights=2, first_and_last=None, leave=("0",))(net, toy_task(8)))
    assert torch.equal(found[0].weight, net[0].weight)
    assert not torch.equal(found[2].weight, net[2].weight)


def test_dorefa_begins_near_to_where_the_network_was():
    net = mlp()
    found = Bits(weights=8, method="dorefa", tune=Train(epochs=0))(net, toy_task(8))
    rule = find_rule(found[0], "weight", DoReFaGrid)
    assert isinstance(rule, DoReFaGrid)
    assert torch.allclose(found[0].weight, net[0].weight, atol=0.02)
