"""Weight rules hold while training, stack, are shared with the weight, and leave plain tensors when baked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pared.core.rules import Mask, add_rule, bake, find_rule


def masked_layer() -> nn.Linear:
    layer = nn.Linear(3, 2)
    add_rule(layer, "weight", Mask(torch.tensor([[True, False, True], [False, True, False]])))
    return layer


def test_mask_zeroes_exactly_what_it_removes():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    keep = torch.tensor([[True, False, True], [False, True, False]])
    add_rule(layer, "weight", Mask(keep))
    assert torch.equal(layer.weight, before * keep)


def test_mask_stops_infinity_and_nan():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[float("inf"), 1.0]]))
    add_rule(layer, "weight", Mask(torch.tensor([[False, True]])))
    with torch.no_grad():
        layer.parametrizations["weight"].original[0, 0] = float("nan")
    assert layer.weight.tolist() == [[0.0, 1.0]]


def test_mask_must_be_boolean():
    with pytest.raises(TypeError, match="boolean"):
        Mask(torch.ones(2))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_no_optimizer_revives_a_weight(optimizer):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    }
    step = kinds[optimizer](layer.parameters())

    def train(times: int) -> None:
        for _ in range(times):
            step.zero_grad()
            layer(torch.randn(4, 3)).square().sum().backward()
            step.step()

    train(3)  # fills the momentum of entries that are removed afterwards
    keep = torch.tensor([[True, False, True], [False, True, False]])
    add_rule(layer, "weight", Mask(keep))
    before = layer.weight.detach().clone()
    train(5)
    assert torch.equal(layer.weight != 0, keep)
    assert not torch.equal(layer.weight, before)
    assert torch.equal(bake(layer).weight != 0, keep)


def test_assigning_a_weight_keeps_the_mask():
    layer = masked_layer()
    layer.weight = torch.ones(2, 3)
    assert layer.weight.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_rules_stack():
    layer = masked_layer()
    add_rule(layer, "weight", Mask(torch.tensor([[True, True, False], [True, True, True]])))
    assert torch.equal(layer.weight != 0, torch.tensor([[True, False, False], [False, True, False]]))


def test_find_rule_gives_the_last_of_a_kind():
    layer = masked_layer()
    second = Mask(torch.ones(2, 3, dtype=torch.bool))
    add_rule(layer, "weight", second)
    assert find_rule(layer, "weight", Mask) is second
    assert find_rule(layer, "bias", Mask) is None
    assert find_rule(nn.Linear(2, 2), "weight", Mask) is None


def test_baked_model_is_plain_again():
    model = nn.Sequential(masked_layer(), nn.ReLU(), nn.Linear(2, 1))
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    x = torch.randn(4, 3)
    expected, parameter = model(x), model[0].parametrizations["weight"].original
    assert bake(model) is model
    assert torch.equal(model(x), expected)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert type(model[0]) is nn.Linear
    assert model[0].weight is parameter
    assert int((model[0].weight == 0).sum()) == 3


def test_bake_keeps_frozen_weights_frozen():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    add_rule(layer, "weight", Mask(torch.eye(2, dtype=torch.bool)))
    assert not bake(layer).weight.requires_grad


def test_bake_leaves_the_authors_parametrizations():
    layer = parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.Tanh())
    weight = layer.weight.detach().clone()
    bake(layer)
    assert parametrize.is_parametrized(layer, "weight")
    assert torch.equal(layer.weight, weight)


def test_baking_keeps_ties():
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    mask = Mask(torch.eye(2, dtype=torch.bool))
    add_rule(first, "weight", mask)
    add_rule(second, "weight", mask)
    model = bake(nn.Sequential(first, second))
    assert model[0].weight is model[1].weight
    assert len(list(model.parameters())) == 1


def test_masks_survive_a_deepcopy_and_a_state_dict():
    layer = masked_layer()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
    fresh = nn.Linear(3, 2)
    add_rule(fresh, "weight", Mask(torch.ones(2, 3, dtype=torch.bool)))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, layer.weight)


def test_baking_a_copy_leaves_the_original_alone():
    layer = masked_layer()
    twin = copy.deepcopy(layer)
    expected = layer.weight.detach().clone()
    bake(twin)
    assert torch.equal(layer.weight, expected)
    assert parametrize.is_parametrized(layer, "weight")
    bake(layer)
    assert torch.equal(layer.weight, expected)


def test_a_rule_on_a_copy_leaves_the_original_alone():
    layer = masked_layer()
    twin = copy.deepcopy(layer)
    add_rule(twin, "bias", Mask(torch.tensor([True, False])))
    assert layer(torch.zeros(1, 3)).shape == (1, 2)
    assert find_rule(layer, "bias", Mask) is None
