"""Recurrent layers and cells, grouped-query attention, grouped convolutions of every rank: exact on dead neurons, in torch and deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from pared import prune
from pared.graph import capture, count
from pared.graph.analysis import analyse
from pared.graph.cutting import Cut
from pared.prune.chooser import Chooser
from pared.prune.importance import Random
from pared.runtime import Engine, export


class Sequence(nn.Module):
    """Embedding, linear layer, recurrent layer, linear layer."""

    def __init__(self, kind: Callable[..., nn.Module], read: str = "all", **settings: Any) -> None:
        super().__init__()
        self.read = read
        self.e, self.i, self.r = nn.Embedding(11, 6), nn.Linear(6, 4), kind(4, 8, **settings)
        self.f = nn.Linear((settings.get("proj_size") or 8) * (2 if settings.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.r(self.i(self.e(x)).relu())
        hidden = state[0] if isinstance(state, tuple) else state
        match self.read:
            case "state":
                return self.f(hidden[-1])
            case "both":
                return self.f(torch.cat([hidden[-2], hidden[-1]], 1))
            case "states":
                return self.f(hidden.permute(1, 0, 2).flatten(1))
        return self.f(out)


class Translator(nn.Module):
    """The decoder begins with the states of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.d = nn.GRU(4, 8, 2, batch_first=True), nn.GRU(4, 8, 2, batch_first=True)
        self.f = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.d(x.flip(1), self.e(x)[1])[0])


class LearnedState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.f = nn.LSTM(4, 8, 2, batch_first=True), nn.Linear(8, 3)
        self.h, self.c = nn.Parameter(torch.randn(2, 1, 8)), nn.Parameter(torch.randn(2, 1, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, c = (state.expand(-1, x.shape[0], -1).contiguous() for state in (self.h, self.c))
        out, (_, c) = self.r(x, (h, c))
        return self.f(out[:, -1]), self.f(c[-1])


class OwnZeros(nn.Module):
    """The user's own initial states, and a layer on top of another."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 8
        self.r, self.d = nn.LSTM(4, 8, 2, batch_first=True, bidirectional=True), nn.Dropout(0.1)
        self.s, self.f = nn.RNN(16, 6, batch_first=True, nonlinearity="relu"), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(4, x.shape[0], self.hidden)
        return self.f(self.s(self.d(self.r(x, (zeros, zeros))[0]))[0][:, -1])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.LSTMCell(4, 8), nn.GRUCell(8, 6), nn.RNNCell(6, 4)
        self.f = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a: Any = None
        b: Any = None
        c: Any = None
        for step in range(3):
            a = self.a(x[:, step], a)
            b = self.b(a[0], b)
            c = self.c(b, c)
        return self.f(c)


class GroupedQuery(nn.Module):
    """Eight query heads, four key-value heads, in the five ways in which this is written."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.o, self.f = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, 8, 4).transpose(1, 2)
        k, v = (layer(x).view(n, length, 4, 4).transpose(1, 2) for layer in (self.k, self.v))
        if self.way == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.way == "rows":
            k, v = k.unsqueeze(2), v.unsqueeze(2)
            y = ((q.reshape(n, 4, 2, length, 4) @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
            y = y.reshape(n, 8, length, 4)
        elif self.way == "expand":
            k, v = (t[:, :, None].expand(n, 4, 2, length, 4).reshape(n, 8, length, 4) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        return self.f(x + self.o(y.transpose(1, 2).reshape(n, length, -1)))


class Convolutions(nn.Module):
    """Plain, grouped, depthwise, depthwise with two outputs a channel, and all of that transposed."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        c = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        t = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        layers = [c(3, 8, 3, padding=1), c(8, 12, 3, padding=1, groups=4), c(12, 12, 3, padding=1, groups=12)]
        layers += [c(12, 24, 3, padding=1, groups=12), t(24, 8, 2, stride=2), t(8, 12, 2, groups=4)]
        self.layers = nn.ModuleList([*layers, t(12, 12, 2, groups=12), t(12, 24, 2, groups=12)])
        self.f = c(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.f(x)


class InputAndFeatures(nn.Module):
    """Features are concatenated with the model's input, whose length is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Linear(4, 8), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.b(torch.cat([x, self.a(x).relu()], -1)).relu())


BATCH: dict[str, Any] = {"batch_first": True}
TWO: dict[str, Any] = {"num_layers": 2, **BATCH}
RECURRENT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (lambda: Sequence(nn.LSTM, **BATCH), ()),
    "lstm, its last state": (lambda: Sequence(nn.LSTM, "state", **TWO, dropout=0.2), ()),
    "lstm, time first": (lambda: Sequence(nn.LSTM, num_layers=2, bias=False), ()),
    "lstm, both directions": (lambda: Sequence(nn.LSTM, "both", bidirectional=True, **TWO), ()),
    "lstm, projected": (lambda: Sequence(nn.LSTM, proj_size=6, bidirectional=True, **TWO), ()),
    "gru": (lambda: Sequence(nn.GRU, "state", **BATCH), ()),
    "gru, both directions": (lambda: Sequence(nn.GRU, bidirectional=True, bias=False, **TWO), ()),
    "rnn": (lambda: Sequence(nn.RNN, "states", **BATCH), ()),
    "translator": (Translator, (4,)),
    "learned state": (LearnedState, (4,)),
    "own zeros": (OwnZeros, (4,)),
    "cells": (Cells, (4,)),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        f"grouped query, {way}": (lambda way=way: GroupedQuery(way), (5, 16))
        for way in ("enable_gqa", "rows", "expand", "repeat_interleave")
    },
    **{f"convolutions {rank}d": (lambda rank=rank: Convolutions(rank), (3, *[4] * rank)) for rank in (1, 2, 3)},
    "input and features": (InputAndFeatures, (4,)),
}
NO_PROJECTION = [name for name in RECURRENT if name != "lstm, projected"]  # ONNX has no projected LSTM


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = (RECURRENT | OTHERS)[name]
    model = make().eval()
    if not shape:
        return model, torch.randint(0, 11, (3, 5))
    return model, torch.randn(3, 5, *shape) if name in RECURRENT else torch.randn(3, *shape)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(model(x))


def assert_close(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def killed(model: nn.Module, cut: Cut) -> nn.Module:
    """The original with every removed unit dead: all weights and biases that compute it are zero. A recurrent unit that only zero
    comes into is zero at every step: its candidate is tanh(0), whatever its gates are."""
    dead = copy.deepcopy(model)
    modules, parameters = dict(dead.named_modules()), dict(dead.named_parameters())
    for name, axes in cut.kept.items():
        layer = modules[name.rpartition(".")[0]]
        transposed = isinstance(layer, _ConvTransposeNd) and name.endswith("weight")
        if transposed and layer.groups > 1:
            continue
        axis = 2 if name in ("h", "c") else 1 if transposed or isinstance(layer, nn.Embedding) else 0
        if axis in axes and not name.startswith("f."):
            gone = torch.ones(parameters[name].shape[axis], dtype=torch.bool)
            gone[list(axes[axis])] = False
            parameters[name].data.movedim(axis, 0)[gone] = 0
    return dead


@pytest.mark.parametrize("name", [*RECURRENT, *OTHERS])
def test_dead_neurons_are_cut_without_a_change(name: str) -> None:
    model, x = build(name)
    before = copy.deepcopy(model.state_dict())
    cut = Chooser(0.5, Random(1)).cut(model, (x,))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    dead = killed(model, cut)
    assert_close(outputs(dead, x), outputs(cut.model, x))
    assert_close(outputs(dead, x[:2]), outputs(cut.model, x[:2]))
    small = prune.cut(dead, x, keep=0.5)
    assert_close(outputs(dead, x), outputs(small, x))
    assert not cut.left_alone
    assert count(small, x).params < 0.65 * count(model, x).params
    assert count(small, x).macs < count(model, x).macs


@pytest.mark.parametrize("name", RECURRENT)
def test_the_result_is_the_users_class_and_trains_and_loads(name: str, tmp_path: Path) -> None:
    model, x = build(name)
    small = prune.cut(model.train(), x, keep=0.5)
    assert type(small) is type(model)
    for module in small.modules():
        if isinstance(module, nn.RNNBase):
            twin = type(module)(
                module.input_size,
                module.hidden_size,
                module.num_layers,
                bias=module.bias,
                batch_first=module.batch_first,
                bidirectional=module.bidirectional,
                **({"proj_size": module.proj_size} if module.proj_size else {}),
            )
            twin.load_state_dict(module.state_dict())  # the attributes describe the tensors
            assert all(
                flat is module.get_parameter(key) for flat, key in zip(module._flat_weights, module._flat_weights_names, strict=True)
            )
    again = copy.deepcopy(small)
    sum(out.square().mean() for out in tree_leaves(again(x))).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in again.parameters())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.sub_(parameter.grad)  # type: ignore[arg-type]
    small, again = small.eval(), again.eval()
    assert not torch.equal(outputs(again, x)[0], outputs(small, x)[0])
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_close(outputs(again, x), outputs(small, x), 0)
    assert_close(outputs(prune.cut(small, x, keep=1.0), x), outputs(small, x), 0)


@pytest.mark.parametrize("name", ["lstm, its last state", "gru, both directions", "own zeros"])
def test_the_file_answers_as_the_network(name: str, tmp_path: Path) -> None:
    model, x = build(name)
    small = prune.cut(model, x, keep=0.5)
    answers = Engine(export(small, x, tmp_path / "small.onnx")).run(x.numpy())
    assert_close([torch.from_numpy(answer) for answer in answers], outputs(small, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NO_PROJECTION if name not in ("lstm, its last state", "gru, both directions", "own zeros")]
)
def test_all_files_answer_as_their_networks(name: str, tmp_path: Path) -> None:
    test_the_file_answers_as_the_network(name, tmp_path)


def test_all_layers_keep_equally_many_and_each_its_own() -> None:
    model, x = build("lstm, both directions")
    kept = Chooser({"r": 0.5}, Random(0)).cut(model, (x,)).kept
    units = [kept[f"r.weight_hh_l{layer}{reverse}"][1] for layer in (0, 1) for reverse in ("", "_reverse")]
    assert [len(unit) for unit in units] == [4] * 4
    assert len(set(units)) > 1
    for (layer, reverse), unit in zip(((0, ""), (0, "_reverse"), (1, ""), (1, "_reverse")), units, strict=True):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            assert kept[f"r.{name}_l{layer}{reverse}"][0] == tuple(8 * gate + index for gate in range(4) for index in unit)
    assert kept["r.weight_ih_l1"][1] == units[0] + tuple(8 + index for index in units[1])
    assert kept["f.weight"][1] == units[2] + tuple(8 + index for index in units[3])


def test_every_step_of_a_cell_is_counted_as_of_a_layer() -> None:
    model, x = build("cells")
    assert count(model, x).macs == 3 * (4 * 8 * (4 + 8) + 3 * 6 * (8 + 6) + 4 * (6 + 4)) + 4 * 3


def test_one_unit_stays_and_a_layer_of_one_unit_is_left_alone() -> None:
    model, x = build("lstm")
    small = prune.cut(model, x, keep=0.0)
    assert small.get_submodule("r").hidden_size == 1
    assert outputs(small, x)[0].shape == (3, 5, 3)
    again = prune.cut(small, x, keep=0.5)
    assert_close(outputs(again, x), outputs(small, x))


def test_units_that_are_read_as_they_are_stay() -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r = nn.LSTM(4, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.r(x)[1][1]

    analysis = analyse(capture(States(), torch.randn(2, 5, 4)))
    assert analysis.classes == ()
    assert "is an output of the model" in str(prune.plan(States(), torch.randn(2, 5, 4)))


def test_a_state_from_outside_fixes_the_units() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.f = nn.GRU(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.f(self.r(x, h)[0])

    plan = prune.plan(Given(), (torch.randn(5, 2, 4), torch.randn(1, 2, 8)))
    assert not plan.classes
    assert any("state of fixed length" in why for layer in plan.frozen for why in layer.why)


def test_a_rewritten_network_drops_between_its_layers_only_in_training() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.f = nn.LSTM(4, 8, 2, batch_first=True, dropout=0.5), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(self.r(x)[0].reshape(-1, 5, 8)[:, -1])

    x = torch.randn(3, 5, 4)
    small = prune.cut(Hard(), x)
    assert type(small) is not Hard
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


@pytest.mark.parametrize("way", ["enable_gqa", "rows", "expand", "repeat_interleave"])
def test_a_dead_key_value_head_goes_with_all_its_queries(way: str) -> None:
    model, x = build(f"grouped query, {way}")
    for head in (1, 2):
        for layer, size in ((model.get_submodule("q"), 8), (model.get_submodule("k"), 4), (model.get_submodule("v"), 4)):
            layer.weight.data[head * size : (head + 1) * size] = 0  # type: ignore[operator, union-attr]
            layer.bias.data[head * size : (head + 1) * size] = 0  # type: ignore[operator, union-attr]
    small = prune.cut(model, x, keep=dict.fromkeys("qkv", 0.5))
    assert_close(outputs(model, x), outputs(small, x))
    assert [small.get_parameter(f"{name}.weight").shape[0] for name in "qkv"] == [16, 8, 8]
    heads = [index for index in range(16) if index // 4 not in (1, 2)]
    assert torch.equal(small.get_parameter("k.weight"), model.get_parameter("k.weight")[heads])
