"""Where a network can be left, that its parts compute the same in both modes, and the classifiers that go there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.core.errors import ModelError, SettingsError
from pared.core.rules import Mask, add_rule, bake
from pared.dynamic import EarlyExit, Exits
from pared.dynamic.exits import evenly
from pared.dynamic.heads import TokenMean, has_channels_last, make_head
from pared.dynamic.places import Place, find_places
from pared.dynamic.stages import split
from pared.graph import capture
from pared.training import Task


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.second(F.relu_(self.norm(self.first(x)))))


class Residual(nn.Module):
    def __init__(self, channels: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(channels * 16, classes)

    def forward(self, x):
        x = F.max_pool2d(self.blocks(self.relu(self.stem(x))), 2)
        return self.out(self.drop(x.view(x.shape[0], -1)))


class Functional(nn.Module):
    """Batch norm and dropout as functions, with the flag read from the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = F.batch_norm(F.linear(x, self.weight), self.mean, self.var, self.scale, None, self.training)
        return self.out(F.dropout(torch.relu(x), 0.4, self.training))


class Tokens(nn.Module):
    """Attention with a class token that is repeated for every sample of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True) for _ in range(2)])
        for layer in self.layers:
            layer.self_attn.dropout = 0.0  # dropout inside attention isn't part of the graph of eval mode
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.out(x[:, 0])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 6)
        self.middle, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, y):
        return self.out(torch.relu(self.middle(torch.relu(self.left(x) + self.right(y)))))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def toy_task(*shapes: tuple[int, ...], classes: int = 3, samples: int = 8, **settings) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        inputs = tuple(torch.randn(samples, *shape, generator=generator) for shape in shapes)
        batches.append((inputs if len(inputs) > 1 else inputs[0], torch.randint(0, classes, (samples,), generator=generator)))
    return Task(batches, batches, batches, **settings)


NETWORKS = {
    "mlp": (mlp, [(4,)]),
    "residual": (Residual, [(1, 8, 8)]),
    "functional": (Functional, [(4,)]),
    "tokens": (Tokens, [(5, 4)]),
    "two inputs": (TwoInputs, [(4,), (3,)]),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, shapes = NETWORKS[name]
    return make(), tuple(torch.randn(5, *shape) for shape in shapes)


def chained(parts, inputs: tuple[Tensor, ...]) -> Tensor:
    for part in parts:
        inputs = (part(*inputs),)
    return inputs[0]


# --- places ---


def test_no_place_inside_a_residual_block():
    model, inputs = build("residual")
    places = find_places(capture(model, inputs))
    assert {place.path for place in places if place.path.startswith("blocks")} == {"blocks.0", "blocks.1"}
    macs = [4 * 9 * 64] + [4 * 4 * 9 * 64] * 4 + [64 * 3]
    shares = dict(zip(("relu", "blocks.0", "blocks.1"), np.cumsum(macs)[[0, 2, 4]] / sum(macs), strict=True))
    assert {place.path: place.share for place in places if place.path in shares} == pytest.approx(shares)


def test_places_with_parameters_on_both_sides_are_refused():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.layer(torch.relu(self.other(torch.relu(self.layer(x))))))

    captured = capture(Shared(), torch.zeros(2, 4))
    assert {place.path for place in find_places(captured)} == {"layer"}  # after its second call only
    assert min(place.share for place in find_places(captured)) > 0.7


def test_a_shared_masked_weight_is_seen_behind_its_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    mask = Mask(torch.eye(4, dtype=torch.bool))
    model[2].weight = model[0].weight
    for layer in (model[0], model[2]):
        add_rule(layer, "weight", mask)
    assert {place.path for place in find_places(capture(model, torch.zeros(2, 4)))} == {"2", "3"}


def test_a_value_that_is_overwritten_later_is_no_place():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    assert [place.path for place in find_places(capture(model, torch.zeros(2, 4)))] == ["1"]


def test_a_table_that_the_network_writes_into_is_data():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x):
            table = torch.zeros(x.shape[0], 8)
            table[:, :4] = self.first(x)
            return self.last(torch.relu(table))

    torch.manual_seed(0)
    model, x = Writes(), torch.randn(5, 4)
    captured = capture(model, x)
    for place in find_places(captured):
        assert torch.equal(chained(split(model, captured, [place]), (x,)), model(x))


def test_networks_that_cannot_be_cut_are_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x + 1

    class Fixed(nn.Module):
        def forward(self, x):
            return F.relu(x).view(2, -1)

    with pytest.raises(ModelError, match="must return one tensor of shape"):
        find_places(capture(Pair(), torch.zeros(2, 4)))
    with pytest.raises(ModelError, match="must return one tensor of shape"):
        find_places(capture(nn.Conv2d(1, 1, 1), torch.zeros(2, 1, 3, 3)))
    with pytest.raises(ModelError, match="fixed batch size"):
        find_places(capture(Fixed(), torch.zeros(2, 4)))


def place(index: int, share: float) -> Place:
    return Place(index, None, None, share, "")  # type: ignore[arg-type]


def test_places_at_even_shares_and_the_last_of_equal_ones():
    places = [place(1, 0.1), place(2, 0.3), place(3, 0.3), place(4, 0.5), place(5, 0.7), place(6, 0.9)]
    assert [each.index for each in evenly(places, 1)] == [4]
    assert [each.index for each in evenly(places, 2)] == [3, 5]
    assert [each.index for each in evenly(places, 5)] == [1, 3, 4, 5, 6]
    with pytest.raises(SettingsError, match=r"count must be at most 5, .* Got 6"):
        evenly(places, 6)


def test_crowded_places_are_still_different():
    places = [place(1, 0.01), place(2, 0.02), place(3, 0.98)]
    assert [each.index for each in evenly(places, 3)] == [1, 2, 3]
    assert [each.index for each in evenly(places, 2)] == [2, 3]


# --- parts ---


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_compute_what_the_network_computes_in_both_modes(name):
    model, inputs = build(name)
    captured = capture(model, tuple(x[:2] for x in inputs))
    twin = copy.deepcopy(model)
    parts = nn.ModuleList(split(model, captured, list({each.share: each for each in find_places(captured)}.values())))
    assert len(parts) > 1
    for training in (True, False, True):
        parts.train(training)
        twin.train(training)
        for sample in (inputs, tuple(x[:1].repeat(3, *[1] * (x.dim() - 1)) for x in inputs)):
            torch.manual_seed(1)
            ours = chained(parts, sample)
            torch.manual_seed(1)
            assert (ours - twin(*sample)).abs().max() < 1e-6
    state = {name: value for name, value in twin.named_buffers() if "running" in name or name in ("mean", "var")}
    found = {name.split(".", 1)[1]: value for name, value in parts.named_buffers()}
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_parts_call_the_users_own_layers_and_keep_their_names():
    model, inputs = build("residual")
    captured = capture(model, inputs)
    parts = split(model, captured, find_places(captured)[:1])
    assert sum(isinstance(module, nn.Conv2d) for part in parts for module in part.modules()) == 5
    assert sum(isinstance(module, nn.BatchNorm2d) for part in parts for module in part.modules()) == 2
    assert sorted(name for part in parts for name in part.state_dict()) == sorted(model.state_dict())
    assert parts[0].get_submodule("stem") is model.stem


def test_masks_live_on_in_the_parts():
    model = mlp()
    add_rule(model[2], "weight", Mask(torch.eye(8, dtype=torch.bool)))
    captured = capture(model, torch.zeros(2, 4))
    parts = nn.ModuleList(split(model, captured, evenly(find_places(captured), 1)))
    x = torch.randn(3, 4)
    assert torch.equal(chained(parts, (x,)), model(x))
    baked = bake(copy.deepcopy(parts))
    assert [name for name in dict(baked.named_parameters()) if name.endswith("2.weight")]
    weight = next(value for name, value in baked.named_parameters() if name.endswith("2.weight"))
    assert torch.equal(weight != 0, torch.eye(8, dtype=torch.bool))


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_base():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nn.Sequential(Doubled(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(3, 4)
    captured = capture(model, x)
    assert torch.equal(chained(split(model, captured, find_places(captured)[-1:]), (x,)), model(x))


def test_padding_modes_are_not_applied_twice():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.randn(3, 1, 4, 4)
    captured = capture(model, x)
    assert torch.equal(chained(split(model, captured, find_places(captured)[-1:]), (x,)), model(x))


# --- heads ---


@pytest.mark.parametrize(
    ("shape", "last", "width", "kinds"),
    [
        ((2, 8), False, None, [nn.Linear]),
        ((2, 8, 5), False, None, [nn.AdaptiveAvgPool1d, nn.Flatten, nn.Linear]),
        ((2, 8, 5, 5), False, 6, [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]),
        ((2, 8, 2, 3, 4), False, None, [nn.AdaptiveAvgPool3d, nn.Flatten, nn.Linear]),
        ((2, 5, 8), True, None, [TokenMean, nn.Linear]),
        ((2, 4, 5, 8), True, None, [TokenMean, nn.Linear]),
    ],
)
def test_heads(shape, last, width, kinds):
    head = make_head(shape, 3, width, channels_last=last)
    assert [type(layer) for layer in head] == kinds
    x = torch.randn(shape)
    assert head(x).shape == (2, 3)
    axes = tuple(range(1, len(shape) - 1)) if last else tuple(range(2, len(shape)))
    pooled = x.numpy().mean(axes) if axes else x.numpy()
    assert head[:-1](x).detach().numpy() == pytest.approx(pooled, abs=1e-6) if width is None else head[-1].in_features == width


def test_channels_are_found_where_the_layers_put_them():
    model, inputs = build("tokens")
    assert all(has_channels_last(each.node) for each in find_places(capture(model, inputs)))
    model, inputs = build("residual")
    assert not any(has_channels_last(each.node) for each in find_places(capture(model, inputs)) if len(each.shape) == 4)


# --- all together ---


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_gets_exits(name):
    model, inputs = build(name)
    task = toy_task(*(tuple(x.shape[1:]) for x in inputs))
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    network = Exits(count=1, train="1ep")(model, task)  # type: ignore[arg-type]
    assert isinstance(network, EarlyExit)
    assert network(*inputs).shape == (5, 3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
