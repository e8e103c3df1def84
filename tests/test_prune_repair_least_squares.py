"""Least squares after a cut: against numpy, exact where what was removed depends on what is left, and never worse."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from cut_models import CASES
from pared.core.errors import DataError, ModelError, SettingsError
from pared.data import load
from pared.graph.analysis import Analysis
from pared.graph.capture import capture
from pared.graph.cutting import Cut, cut_model
from pared.graph.equations import LAYERS, Equations, spread_out
from pared.graph.fold import packet
from pared.graph.rewritten import Rewritten
from pared.prune import Magnitude
from pared.prune.chooser import Chooser
from pared.prune.least_squares import reconstruct
from pared.prune.normal_equations import ridge
from pared.training import Task, Train

EXACT = 1e-9  # damping where a solution is exact


def task_of(x: Tensor, size: int = 16) -> Task:
    batches = list(zip(x.split(size), torch.zeros(len(x), dtype=torch.long).split(size), strict=True))
    return Task(batches, batches, batches)


def cut_last(model: nn.Module, x: Tensor, layer: str, number: int = 1) -> Cut:
    """Remove the last `number` outputs of a layer."""

    def choose(analysis: Analysis) -> list[int]:
        producer = next(found for found in analysis.producers if found.parameter.startswith(f"{layer}."))
        return analysis.root[producer.atoms][-number:].tolist()

    return cut_model(model, x, choose)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def dependent(layer: nn.Module, last: int = 1) -> None:
    """The last outputs of a layer become a mix of the first two."""
    with torch.no_grad():
        layer.weight[-last:] = 0.7 * layer.weight[0] - 1.3 * layer.weight[1]  # type: ignore[operator,index]
        if layer.bias is not None:
            layer.bias[-last:] = 0.5  # type: ignore[operator]


@pytest.mark.parametrize("damping", [1e-6, 0.1, 10.0])
def test_ridge_equals_numpy(damping: float) -> None:
    a, b = np.random.default_rng(0).normal(size=(30, 5)), np.random.default_rng(1).normal(size=(30, 3))
    a[:, 4] *= 1e4
    penalty = np.diag(np.sqrt(damping * (a**2).sum(0)))
    expected = np.linalg.lstsq(np.vstack([a, penalty]), np.vstack([b, np.zeros((5, 3))]), rcond=None)[0]
    found = ridge(torch.from_numpy(a.T @ a), torch.from_numpy(a.T @ b), damping)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_ridge_shares_between_equal_columns_and_leaves_empty_ones_zero() -> None:
    a = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    found = ridge(a.T @ a, a.T @ torch.tensor([[2.0], [4.0]], dtype=torch.float64), 1e-9)
    np.testing.assert_allclose(found[:, 0].numpy(), [1, 1, 0], atol=1e-6)


LINEAR_CASES = {
    "linear": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "strided groups": (lambda: nn.Conv1d(4, 6, 3, 2, padding=1, groups=2), (2, 4, 9)),
    "dilated": (lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), padding="valid", dilation=2), (2, 3, 9, 8)),
    "same": (lambda: nn.Conv2d(4, 8, 4, padding="same", groups=4, dilation=(1, 2)), (2, 4, 7, 7)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, 2, padding=1, output_padding=1), (2, 3, 5, 5)),
    "transposed and cropped": (lambda: nn.ConvTranspose2d(3, 4, 1, 2, padding=1), (2, 3, 5, 5)),
    "transposed and dilated": (lambda: nn.ConvTranspose1d(3, 4, 4, 3, padding=2, dilation=2), (2, 3, 6)),
}


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_rows_times_matrix_is_what_the_layer_computes(name: str) -> None:
    make, shape = LINEAR_CASES[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    captured = capture(layer, x)
    node = next(node for node in captured.module.graph.nodes if packet(node) in LAYERS)
    equations = Equations.of(node, tuple(layer.weight.shape[2:]))
    y = layer(x)
    read = nn.functional.pad(x, (1, 1, 1, 1), "circular") if name == "circular" else x
    for wanted in (10**6, 7):
        places = equations.places(y, wanted)
        rows, matrix = equations.rows(read, places), equations.matrix(layer.weight)
        product = (rows @ matrix).transpose(0, 1).reshape(len(places), -1) + layer.bias
        torch.testing.assert_close(product, equations.outputs(y, places))
    assert torch.equal(equations.weight(matrix, tuple(layer.weight.shape)), layer.weight)


def test_positions_are_spread_over_all_columns_of_an_image() -> None:
    places = spread_out(64 * 32 * 32, 64 * 16)
    assert 0.8 * 64 * 16 < len(places) <= 64 * 16
    assert len(set((places % 32).tolist())) == 32
    assert spread_out(1, 5).tolist() == [0]


CONSUMERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), (64, 3), 0),
    "no bias": (lambda: nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 4, bias=False)), (64, 3), 0),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), (16, 7, 3), 0),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3, stride=2)), (16, 2, 9, 9), 0),
    "one channel": (lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.Conv1d(5, 4, 3, dilation=2)), (16, 2, 19), 0),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 4)), (128, 2, 4, 4), 0),
    "transposed": (lambda: nn.Sequential(nn.Conv2d(2, 5, 1), nn.ConvTranspose2d(5, 4, 3, 2, padding=1)), (64, 2, 4, 4), 0),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_neuron_that_depends_on_others_is_made_up_for_exactly(name: str) -> None:
    make, shape, first = CONSUMERS[name]
    model, x = make(), torch.randn(shape)
    dependent(model[first])
    small = cut_last(model, x, "0")
    assert (outputs(small.model, x) - outputs(model, x)).abs().max() > 1e-2
    (layer,) = reconstruct(small, model, task_of(x), damping=EXACT)
    fresh = torch.randn(shape)
    torch.testing.assert_close(outputs(small.model, fresh), outputs(model, fresh), atol=1e-4, rtol=1e-4)
    assert layer.why == ""
    assert layer.after < 1e-8 < layer.before  # type: ignore[operator]


def test_every_group_keeps_inputs_of_its_own() -> None:
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 6, 3, groups=2)), torch.randn(32, 2, 6, 6)
    with torch.no_grad():
        for last in (3, 7):  # of each group, the last is a mix of two others
            model[0].weight[last] = model[0].weight[last - 3] - 2 * model[0].weight[last - 2]

    def choose(analysis: Analysis) -> list[int]:
        producer = next(found for found in analysis.producers if found.parameter == "0.weight")
        return analysis.root[producer.atoms][[3, 7]].tolist()

    small = cut_model(model, x, choose)
    assert small.model[1].weight.shape == (6, 3, 3, 3)  # type: ignore[index]
    reconstruct(small, model, task_of(x), damping=EXACT)
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x), atol=1e-4, rtol=1e-4)


def test_layers_that_lost_outputs_too_and_errors_that_don_t_add_up() -> None:
    """Two linear layers in a row, both cut, with rank to spare: the second is matched with what the repaired first gives."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(3, 12), nn.Linear(12, 10), nn.Linear(10, 2)), torch.randn(64, 3)
    small = Chooser(0.5, Magnitude()).cut(model, x)
    report = reconstruct(small, model, task_of(x), damping=EXACT)
    assert [layer.layer for layer in report] == ["1", "2"]
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x), atol=1e-4, rtol=1e-4)


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.shape[1] != 6:
            raise ValueError("six and no other number")
        return self.b(x)


def test_the_rewritten_graph_of_a_cut() -> None:
    model, x = Literal(), torch.randn(64, 3)
    small = Chooser(0.5, Magnitude()).cut(model, x)
    assert isinstance(small.model, Rewritten)
    reconstruct(small, model, task_of(x), damping=EXACT)
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x), atol=1e-4, rtol=1e-4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


@pytest.mark.parametrize("damping", [1e-9, 1e-3, 1e3])
def test_no_layer_gets_worse(damping: float) -> None:
    """By the layers' own numbers, and by an independent look at the last one."""
    model, x = net(), torch.randn(32, 1, 6, 6)
    small = Chooser(0.5, Magnitude()).cut(model, x)
    report = reconstruct(small, model, task_of(x), damping=damping)
    assert [layer.layer for layer in report] == ["3", "6", "8"]
    assert all(layer.after <= layer.before for layer in report)  # type: ignore[operator]
    last = float(((outputs(small.model, x) - outputs(model, x)).double() ** 2).mean())
    assert last == pytest.approx(report[-1].after, rel=1e-3)
    again = reconstruct(small, model, task_of(x), damping=damping)
    assert again[0].before == pytest.approx(report[0].after, rel=1e-3, abs=1e-9)  # later ones read something else by now


def test_a_layer_that_lost_nothing_of_value_keeps_its_weights() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(32, 3)
    with torch.no_grad():
        model[2].weight[:, -1] = 0
    small = cut_last(model, x, "0")
    before = copy.deepcopy(small.model.state_dict())
    reconstruct(small, model, task_of(x))
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in small.model.state_dict().items())


def test_only_inputs_of_cut_layers_change_and_modes_stay() -> None:
    model, x = net().train(), torch.randn(32, 1, 6, 6)
    original = copy.deepcopy(model.state_dict())
    small = Chooser(0.5, Magnitude()).cut(model, x)
    before = copy.deepcopy(small.model.state_dict())
    reconstruct(small, model, task_of(x))
    assert small.model.training
    assert model.training
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in small.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"3.weight", "6.weight", "6.bias", "8.weight", "8.bias"}


def test_labels_don_t_matter_and_the_same_inputs_give_the_same_bytes() -> None:
    x = torch.randn(32, 1, 6, 6)
    found = []
    for label in (0, 1):
        model = net()
        small = Chooser(0.5, Magnitude()).cut(model, x)
        batches = [(part, torch.full((len(part),), label)) for part in x.split(16)]
        reconstruct(small, model, Task(batches, batches, batches))
        found.append(small.model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


class Shared(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)
        self.again = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.b(self.again(self.a(x))))


def test_layers_that_are_left_alone() -> None:
    x = torch.randn(32, 3)
    shared = Shared(nn.Linear(4, 4))
    report = reconstruct(cut := Chooser({"a": 0.5}, Magnitude()).cut(shared, x), shared, task_of(x))
    assert cut.kept
    assert {layer.layer: layer.why for layer in report}["again"] == "its weight is shared"

    masked = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 2), dim=None))
    report = reconstruct(Chooser(0.5, Magnitude()).cut(masked, x), masked, task_of(x))
    assert [layer.why for layer in report] == ["its weight is computed from other parameters"]
    assert report[0].before is None

    turned = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.Conv2d(4, 1, 1))
    images = torch.randn(32, 1, 4, 4)
    report = reconstruct(Chooser({"0": 0.5}, Magnitude()).cut(turned, images), turned, task_of(images))
    assert "it is a grouped transposed convolution" in [layer.why for layer in report]


def test_depthwise_layers_and_whole_groups_lose_no_inputs_and_aren_t_listed() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)), torch.randn(32, 1, 4, 4)
    report = reconstruct(Chooser(0.5, Magnitude()).cut(model, x), model, task_of(x))
    assert [layer.layer for layer in report] == ["3"]


def test_nothing_cut_nothing_done() -> None:
    model, x = net(), torch.randn(4, 1, 6, 6)
    assert reconstruct(cut_model(model, x, lambda analysis: []), model, task_of(x)) == ()


def test_bad_settings_and_values() -> None:
    model, x = net(), torch.randn(4, 1, 6, 6)
    small = Chooser(0.5, Magnitude()).cut(model, x)
    with pytest.raises(SettingsError) as caught:
        reconstruct(small, model, task_of(x), samples=0, damping=0)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["prune.reconstruct"] * 2
    with pytest.raises(ModelError, match="3: reads or gives values that aren't finite"):
        reconstruct(small, model, task_of(x * float("inf")))
    given = task_of(x)
    nothing = Task([(x[:0], torch.zeros(0))], given.valid, given.test)
    with pytest.raises(DataError, match="the outputs of layers are matched on them"):
        reconstruct(small, model, nothing)


def test_digits_agree_more_with_the_original() -> None:
    task = load("digits", seed=0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    task.tune(model, Train(epochs=4, learning_rate=5e-3))
    small = Chooser(0.5, Magnitude()).cut(model, task.example_inputs())
    x = torch.cat([task.prepare(inputs)[0] for inputs, _ in task.test])
    wanted = outputs(model, x).argmax(1)
    before = float((outputs(small.model, x).argmax(1) == wanted).double().mean())
    reconstruct(small, model, task)
    after = float((outputs(small.model, x).argmax(1) == wanted).double().mean())
    assert after > before + 0.1
    assert after > 0.85


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_network_comes_nearer_to_the_original(name: str) -> None:
    make, shapes = CASES[name]
    torch.manual_seed(0)
    model, parts = make(), tuple(torch.randn(24, *shape) for shape in shapes)
    batches = [(tuple(part[at : at + 12] for part in parts), torch.zeros(12)) for at in (0, 12)]

    def answers(network: nn.Module) -> Tensor:
        with torch.no_grad():
            found = pytree.tree_leaves(network.eval()(*(part.clone() for part in parts)))
        return torch.cat([leaf.flatten() for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()])

    wanted = answers(model)
    small = Chooser(0.5, Magnitude(), norms=True).cut(model, tuple(part[:2] for part in parts))
    before = float((answers(small.model) - wanted).square().mean())
    report = reconstruct(small, model, Task(batches, batches, batches))
    assert all(layer.why or layer.after <= layer.before for layer in report)  # type: ignore[operator]
    after = float((answers(small.model) - wanted).square().mean())
    assert after < before if report else after == before
