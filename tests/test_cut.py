"""Cutting: exact on dead neurons, equal to the masked original, to what was saved, and to the deployed file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cut_models import CASES, Auxiliary, Modulated, build
from pared import prune
from pared.core.errors import CaptureError, ModelError, SettingsError
from pared.graph import count
from pared.graph.cutting import Cut
from pared.prune.chooser import Chooser
from pared.prune.importance import Magnitude, Random
from pared.runtime import Engine, export


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def assert_equal(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max()))


def killed(model: nn.Module, cut: Cut) -> nn.Module:
    """The original with every removed neuron dead: weights that compute it, bias and norm all zero. Knows nothing of the graph."""
    dead = copy.deepcopy(model)
    modules, parameters = dict(dead.named_modules()), dict(dead.named_parameters())
    for name, axes in cut.kept.items():
        layer = modules[name.rpartition(".")[0]]
        transposed = isinstance(layer, nn.ConvTranspose2d) and name.endswith("weight")
        if name not in parameters or (transposed and layer.groups > 1):
            continue
        axis = 1 if transposed or name in ("w", "v") else 0
        if axis in axes:
            gone = torch.ones(parameters[name].shape[axis], dtype=torch.bool)
            gone[list(axes[axis])] = False
            parameters[name].data.movedim(axis, 0)[gone] = 0
    return dead


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_dead_neurons_are_cut_without_a_change(name: str, seed: int) -> None:
    model, inputs = build(name, seed)
    cut = Chooser(0.5, Random(seed)).cut(model, inputs)
    dead = killed(model, cut)
    assert_equal(outputs(dead, inputs), outputs(cut.model, inputs))
    # where ranges of channels overlap, one may have had to stay for an axis not to become empty, so that fewer than half are dead
    small = prune.cut(dead, inputs, keep=0.6 if name == "pieces" else 0.5)
    assert_equal(outputs(dead, inputs), outputs(small, inputs))
    more = tuple(torch.cat([x, x[1:]]) for x in inputs)
    assert_equal(outputs(dead, more), outputs(small, more))
    size = [sum(parameter.numel() for parameter in net.parameters()) for net in (model, small)]
    assert size[1] < 0.75 * size[0]
    assert not cut.left_alone


@pytest.mark.parametrize("name", CASES)
def test_the_model_that_is_cut_is_unchanged_and_the_result_is_an_ordinary_module(name: str) -> None:
    model, inputs = build(name)
    before = copy.deepcopy(model.state_dict())
    small = prune.cut(model, inputs)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training
    assert not small.training
    assert set(small.state_dict()) == set(model.state_dict())
    twin = copy.deepcopy(small)
    assert_equal(outputs(small, inputs), outputs(twin, inputs), 0)
    again = prune.cut(small, inputs, keep=0.99)
    assert_equal(outputs(small, inputs), outputs(again, inputs))
    twin.train()
    sum(out.square().mean() for out in tree_leaves(twin(*inputs))).backward()
    assert all(parameter.grad is not None for parameter in twin.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.equal(next(iter(small.parameters())), next(iter(twin.parameters())))


@pytest.mark.parametrize("name", CASES)
def test_cut_equals_saved_and_loaded_equals_deployed(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    small = prune.cut(model, inputs)
    expected = outputs(small, inputs)
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    reloaded = copy.deepcopy(small)
    for tensor in reloaded.parameters():
        tensor.data.zero_()
    reloaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_equal(expected, outputs(reloaded, inputs), 0)
    path = export(small, inputs, tmp_path / "small.onnx")
    results = Engine(path).run(*(x.numpy() for x in inputs))
    assert_equal(expected, [torch.from_numpy(result) for result in results])


@pytest.mark.parametrize("name", ["residual", "dense block", "inverted residual", "fused attention", "grouped"])
def test_left_layers_keep_the_width_of_their_outputs(name: str) -> None:
    model, inputs = build(name)
    for path in [path for path, layer in model.named_modules() if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)]:
        small = prune.cut(model, inputs, leave=[path])
        before, after = (net.get_parameter(f"{path}.weight").shape[0] for net in (model, small))
        assert before == after, path


def test_shares_by_layer_leave_the_others_alone() -> None:
    model, inputs = build("chain")
    small = prune.cut(model, inputs, keep={"c": 0.25})
    assert [small.get_parameter(f"{name}.weight").shape[0] for name in "abcd"] == [8, 12, 5, 5]


@pytest.mark.parametrize("keep", [0.0, 0.01, 1.0])
def test_the_ends_of_the_range(keep: float) -> None:
    model, inputs = build("chain")
    small = prune.cut(model, inputs, keep=keep)
    widths = [small.get_parameter(f"{name}.weight").shape[0] for name in "abcd"]
    assert widths == ([8, 12, 20, 5] if keep == 1 else [1, 1, 1, 5])
    assert outputs(small, inputs)[0].shape == (3, 5)


def test_ties_are_broken_by_place_and_counts_are_exact() -> None:
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    nn.init.ones_(model[0].weight)
    model[0].bias.data = torch.arange(10.0)
    for keep, wanted in ((0.3, 3), (0.31, 4), (0.95, 10)):
        small = prune.cut(model, torch.zeros(2, 4), keep=keep)
        assert small[0].bias.tolist() == list(range(wanted))


def test_whole_groups_go_where_that_loses_less() -> None:
    model, inputs = build("grouped")
    for name in ("a", "g", "d"):
        layer = model.get_submodule(name)
        half = layer.weight.shape[0] // 2
        layer.weight.data[half:] = 0
        layer.bias.data[half:] = 0
    small = prune.cut(model, inputs, keep={"g": 0.5})
    assert_equal(outputs(model, inputs), outputs(small, inputs))
    assert small.g.groups == 2
    assert small.g.weight.shape == (6, 2, 3)


def test_heads_go_where_they_are_dead() -> None:
    model, inputs = build("fused attention")
    dead = [8 + 16 * part + row for part in range(3) for row in range(8)]  # heads 2 and 3 of q, k and v
    model.qkv.weight.data[dead] = 0
    model.qkv.bias.data[dead] = 0
    small = prune.cut(model, inputs, keep={"qkv": 0.5})
    assert_equal(outputs(model, inputs), outputs(small, inputs))
    assert small.qkv.weight.shape == (24, 16)


def test_the_softmax_scale_stays_that_of_the_trained_width() -> None:
    model, inputs = build("kernel attention")
    dead = [16 * part + 4 * head + column for part in range(3) for head in range(4) for column in (1, 2)]
    model.qkv.weight.data[dead] = 0
    model.qkv.bias.data[dead] = 0
    small = prune.cut(model, inputs, keep={"qkv": 0.5})
    assert_equal(outputs(model, inputs), outputs(small, inputs))


def test_norms_over_a_cut_axis_are_cut_only_when_asked() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    assert prune.cut(model, torch.zeros(2, 6))[0].out_features == 8
    asked = prune.cut(model, torch.zeros(2, 6), norms=True)
    assert asked[0].out_features == 4
    assert asked[1].normalized_shape == (4,)
    found = prune.plan(model, torch.zeros(2, 6)).classes[0]
    assert not found.exact
    assert "norm" in found.why[0]


def test_masks_are_cut_along() -> None:
    from pared.core.rules import Mask, add_rule, bake

    model, inputs = build("chain")
    keep = torch.rand(12, 8, 3, 3) > 0.5
    add_rule(model.b, "weight", Mask(keep))
    small = bake(prune.cut(model, inputs))
    assert small.b.weight.shape == (6, 4, 3, 3)
    assert 0.3 < float((small.b.weight == 0).float().mean()) < 0.7


def test_a_static_batch_is_cut_too() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.view(2, -1)).relu())

    small = prune.cut(Fixed(), torch.zeros(2, 4))
    assert small.a.out_features == 4


def test_batch_norm_and_dropout_train_in_a_rewritten_graph() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.d, self.f = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.n(self.a(x)).view(-1, 8, 4)
            return self.f(self.d(x.mean(2).relu()))

    model = Hard()
    small = prune.cut(model, torch.randn(4, 1, 4, 4))
    assert type(small) is not Hard
    assert small.training
    before = small.get_buffer("n.running_mean").clone()
    x = torch.randn(4, 1, 4, 4)
    first, second = small(x), small(x)
    assert not torch.equal(first, second)  # dropout drops
    assert not torch.equal(before, small.get_buffer("n.running_mean"))
    small.eval()
    assert torch.equal(small(x), small(x))


def test_what_training_mode_adds_is_kept_in_a_rewritten_graph() -> None:
    class Depth(nn.Module):
        """Stochastic depth and an auxiliary output, in training mode only; the literal 8 rules the user's own forward out."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b, self.f = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.n(self.a(x)).view(-1, 8)
            y = self.b(x)
            if self.training:
                y = y * torch.empty(x.shape[0], 1).bernoulli_(0.5)
            x = self.f((x + y).relu())
            return (x, y.sum(1)) if self.training else x

    model = Depth()
    small = prune.cut(model, torch.randn(2, 4))
    assert type(small).__name__ == "Rewritten"
    x = torch.randn(16, 4)
    first, second = small(x), small(x)
    assert isinstance(first, tuple)
    assert len(first) == 2
    assert not torch.equal(first[0], second[0])
    assert int(small.get_buffer("n.num_batches_tracked")) == 2
    first[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert small.eval()(x).shape == (16, 2)
    assert int(model.n.num_batches_tracked) == 0


def test_a_block_without_gradient_is_kept_in_a_rewritten_graph() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.f = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x).relu()
            return self.f((y * y.view(-1, 8)).view(-1, 8) + self.b(x).view(-1, 8) * 0) + self.b(x).view(-1, 2, 4).sum(2)

    model = Frozen().eval()
    x = torch.randn(3, 4)
    assert_equal(outputs(model, (x,)), outputs(prune.cut(model, x, keep={"b": 1.0}), (x,)))
    assert prune.cut(model, x)(x).shape == (3, 2)


def test_counts_fall_with_the_cut() -> None:
    model, inputs = build("chain")
    whole, small = count(model, inputs), count(prune.cut(model, inputs), inputs)
    assert whole.macs == 3 * 8 * 9 * 64 + 8 * 12 * 9 * 9 + 12 * 9 * 20 + 20 * 5
    assert small.macs == 3 * 4 * 9 * 64 + 4 * 6 * 9 * 9 + 6 * 9 * 10 + 10 * 5


def test_unknown_operators_freeze_what_they_touch_and_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.linalg.qr(self.a(x)[:, :, None].expand(-1, -1, 8))[0].sum(2)
            return self.c(self.b(x).relu())

    plan = prune.plan(Odd(), torch.randn(2, 4))
    assert any("linalg_qr" in place and "test_cut.py" in place for place in plan.unknown)
    assert [found.layers for found in plan.classes] == [("b",)]
    assert any(layer.layer == "a" and "linalg_qr" in layer.why[0] for layer in plan.frozen)
    small = prune.cut(Odd(), torch.randn(2, 4))
    assert small.b.out_features == 4


def test_errors_name_what_is_wrong() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(CaptureError, match=r"Branches.*test_cut.py.*x.sum\(\) > 0"):
        prune.plan(Branches(), torch.zeros(2, 4))
    with pytest.raises(ModelError, match=r"Sequential can't run on inputs of shape \(2, 3\)"):
        prune.plan(model, torch.zeros(2, 3))
    with pytest.raises(SettingsError, match="keep must be a number"):
        prune.cut(model, torch.zeros(2, 4), keep=1.5)
    with pytest.raises(SettingsError, match="no module 'nothing'"):
        prune.cut(model, torch.zeros(2, 4), leave=["nothing"])
    with pytest.raises(SettingsError, match="no layer 'nothing'"):
        prune.cut(model, torch.zeros(2, 4), keep={"nothing": 0.5})


def test_the_plan_says_what_stays_and_why() -> None:
    model, inputs = build("residual")
    plan = prune.plan(model, inputs)
    assert {found.layers: found.neurons for found in plan.classes} == {("a", "b2"): 16, ("b1",): 16}
    assert plan.frozen[0].layer == "f"
    assert "output of the model" in plan.frozen[0].why[0]
    assert "b1: 16 neurons" in str(plan)
    assert plan.to_dict()["classes"][0]["exact"] is True
    assert Magnitude() == Magnitude(order=2)


def test_an_auxiliary_head_is_cut_with_the_features_it_reads() -> None:
    model, (x,) = build("auxiliary head")
    small = prune.cut(model, x, 0.5).train()
    assert isinstance(model, Auxiliary)
    assert isinstance(small, Auxiliary)
    assert (small.a.out_channels, small.side.in_channels, small.side.out_channels) == (4, 4, 4)
    # masked twin: what the second layers read of the removed channels is zeroed
    weight = model.a.weight.detach().flatten(1)
    kept = [int((weight == row).all(1).nonzero()) for row in small.a.weight.detach().flatten(1)]
    gone = [channel for channel in range(8) if channel not in kept]
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        twin.side.weight[:, gone] = 0
        lost = [channel for channel in range(6) if not (model.b.weight[channel][kept].flatten() == small.b.weight.flatten(1)).all(1).any()]
        twin.b.weight[:, gone] = 0
        twin.out.weight.unflatten(1, (6, 16))[:, lost] = 0
        for left, right in zip(small(x), twin(x), strict=True):
            torch.testing.assert_close(left, right)
    sum(part.sum() for part in small(x)).backward()
    assert small.side.weight.grad is not None


def test_a_network_in_channels_last_stays_so() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    example = (torch.randn(2, 3, 12, 12),)
    rows = nn.Sequential(*layers)
    columns = copy.deepcopy(rows).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def cut(model: nn.Module) -> nn.Module:
        return Chooser(0.5, Magnitude(), round_to=1).cut(model, example).model

    small = cut(columns)
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in small if isinstance(layer, nn.Conv2d))  # type: ignore[union-attr]
    assert not small[3].weight.is_contiguous()  # type: ignore[index]
    assert cut(rows)[3].weight.is_contiguous()  # type: ignore[index]
    torch.testing.assert_close(small(*example), cut(rows)(*example))


def test_as_many_groups_as_samples_stay_so_for_any_batch() -> None:
    torch.manual_seed(0)
    model, inputs = Modulated().eval(), (torch.randn(3, 3, 6, 6),)
    cut = Chooser(0.5, Random(0)).cut(model, inputs)
    assert cut.model.get_parameter("kernel").shape[:2] == (3, 4)
    dead = killed(model, cut)
    for batch in (1, 2, 5):
        other = (torch.randn(batch, 3, 6, 6),)
        assert_equal(outputs(dead, other), outputs(cut.model, other))


class Counting(nn.Module):
    """Subtracts a running mean that it goes on with in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0).detach())
        return self.second(torch.relu(x - self.mean))


def test_a_forward_that_writes_into_its_buffers_is_kept() -> None:
    model = Counting().eval()
    cut = Chooser(0.5, Magnitude()).cut(model, torch.randn(2, 4))
    assert cut.own_class
    assert type(cut.model) is Counting
    assert not cut.model.mean.any()  # the runs that looked at it left no trace
    assert len(cut.model.mean) == 4
