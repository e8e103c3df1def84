"""Weights that share their values: few of them, zeros that stay, gradients that are sums, and every kind of layer."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pared.architecture import nets
from pared.core.errors import SettingsError, WeightsError
from pared.core.rules import Mask, WeightRule, add_rule, bake, find_rule
from pared.prune import Weights
from pared.quantize import Clusters, Int8, kmeans, nearest
from pared.quantize.clusters import cluster_index
from pared.quantize.shared import Shared
from pared.recipe import read
from pared.training import Task, Train


def toy_task(shape: tuple[int, ...] = (8,), classes: int = 3, **settings) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, *shape, generator=generator), torch.randint(0, classes, (6,), generator=generator)) for _ in range(3)]
    return Task(batches, batches, batches, **settings)


def toy_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def values_of(weight: torch.Tensor) -> int:
    """Different values that aren't zero."""
    return len(weight[weight != 0].unique())


# --- the rule ---


def test_forward_and_gradient_as_a_numpy_twin_says():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 4, (5, 7), generator=generator)
    index.view(-1)[:4] = torch.arange(4)
    layer, plain = nn.Linear(7, 5, bias=False).double(), torch.randn(5, 7, generator=generator).double()
    layer.weight = nn.Parameter(plain.clone())
    add_rule(layer, "weight", Shared(index))
    table = np.array([0.0, *(plain.numpy()[index.numpy() == at].mean() for at in (1, 2, 3))])
    assert np.allclose(layer.weight.detach().numpy(), table[index.numpy()], atol=1e-12)
    x = torch.randn(3, 7, generator=generator).double()
    layer(x).square().sum().backward()
    of_weights = 2 * (x.numpy() @ table[index.numpy()].T).T @ x.numpy()
    expected = [of_weights[index.numpy() == at].sum() for at in (1, 2, 3)]
    shared = layer.get_parameter("parametrizations.weight.original")
    assert shared.grad is not None
    assert np.allclose(shared.grad.numpy(), expected, rtol=1e-9)


def test_the_gradient_is_that_of_looking_values_up():
    torch.manual_seed(0)
    index = torch.randint(1, 9, (6, 10))
    index.view(-1)[:8] = torch.arange(1, 9)
    layer, x = nn.Linear(10, 6), torch.randn(4, 10)
    add_rule(layer, "weight", Shared(index))
    shared = layer.get_parameter("parametrizations.weight.original")
    layer(x).square().sum().backward()
    values = shared.detach().clone().requires_grad_()
    nn.functional.linear(x, values[index - 1], layer.bias).square().sum().backward()
    assert shared.grad is not None
    assert values.grad is not None
    assert float((shared.grad - values.grad).abs().max() / values.grad.abs().max()) < 1e-6


def test_gradients_of_sixteen_bits_are_added_up_in_more():
    rule = Shared(torch.ones(1, 4096, dtype=torch.long))
    values = torch.ones(1, dtype=torch.float16, requires_grad=True)
    rule(values).backward(torch.full((1, 4096), 0.5, dtype=torch.float16))
    assert values.grad is not None
    assert values.grad.item() == 2048
    assert rule(values).dtype == torch.float16


def test_assigning_a_weight_projects_it():
    layer = nn.Linear(3, 1, bias=False)
    add_rule(layer, "weight", Shared(torch.tensor([[1, 1, 0]])))
    layer.weight = torch.tensor([[1.0, 2.0, 3.0]])
    assert layer.weight.tolist() == [[1.5, 1.5, 0.0]]
    layer.weight = layer.weight.detach()
    assert layer.weight.tolist() == [[1.5, 1.5, 0.0]]


def test_the_mean_of_equal_weights_is_exact():
    weight = torch.full((1, 1001), 0.1, dtype=torch.float64)
    assert Shared(torch.ones(1, 1001, dtype=torch.long)).right_inverse(weight).tolist() == [0.1]


def test_clusters_must_be_whole_numbers():
    for wrong in (torch.ones(2), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(TypeError, match="whole numbers"):
            Shared(wrong)


# --- the method ---


@pytest.mark.parametrize("start", ["linear", "density", "forgy", "optimal"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_as_many_values_as_bits_allow(bits, start):
    model = toy_mlp()
    before = copy.deepcopy(model.state_dict())
    small = bake(Clusters(bits=bits, start=start)(model, toy_task()))
    assert [values_of(small[at].weight) for at in (0, 2)] == [2**bits, 2**bits]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.shape for name, value in small.state_dict().items()} == {name: value.shape for name, value in before.items()}
    assert torch.equal(small[0].bias, model[0].bias)
    assert not any(isinstance(module, WeightRule) for module in small.modules())


def test_each_weight_takes_the_nearest_value():
    model = toy_mlp()
    small = bake(Clusters(bits=3)(model, toy_task()))
    weight, centroids = model[0].weight.detach(), kmeans(model[0].weight, 8)
    assert torch.allclose(small[0].weight, centroids[nearest(weight, centroids)], atol=1e-7)


def test_zeros_are_a_value_of_their_own_and_stay_through_training():
    pruned = Weights(keep=0.5, scope="layer")(toy_mlp(), toy_task())
    masks = [find_rule(pruned[at], "weight", Mask).keep for at in (0, 2)]  # type: ignore[union-attr]
    plan = Train(epochs=3, optimizer="sgd", learning_rate=0.02, weight_decay=0.1)
    shared = Clusters(bits=2, tune=plan)(pruned, toy_task())
    shared = plan(shared, toy_task())  # a later step of a recipe
    for at, mask in zip((0, 2), masks, strict=True):
        rule = find_rule(shared[at], "weight", Shared)
        assert isinstance(rule, Shared)
        assert torch.equal(rule.index != 0, mask)
    small, start = bake(copy.deepcopy(shared)), bake(Clusters(bits=2)(pruned, toy_task()))
    for at, mask in zip((0, 2), masks, strict=True):
        assert torch.equal(small[at].weight != 0, mask)
        assert values_of(small[at].weight) == 4
        assert not torch.equal(small[at].weight, start[at].weight)
    assert torch.equal(bake(pruned)[0].weight != 0, masks[0])


def test_clustering_leaves_a_masked_zero_out_of_the_fit():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight = nn.Parameter(torch.tensor([[0.5, 1.0, 9.0, 11.0]]))
    add_rule(model[0], "weight", Mask(torch.tensor([[False, True, True, True]])))
    assert bake(Clusters(bits=1)(model, toy_task()))[0].weight.tolist() == [[0.0, 1.0, 10.0, 10.0]]


def test_a_step_of_plain_gradient_descent():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight = nn.Parameter(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    small = Clusters(bits=1)(model, toy_task())
    assert [tuple(parameter.shape) for parameter in small.parameters()] == [(2,)]
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.tensor([[1.0, 3.0]])).sum().backward()
    optimizer.step()  # 1 stands at inputs 1 and 3: 1 - 0.1 · 4; 2 at input 1
    assert small[0].weight.detach().numpy() == pytest.approx(np.array([[0.6, 0.6], [1.9, 0.0]]))


def test_centroids_only():
    model = toy_mlp()
    model[2].bias.requires_grad_(False)
    small = Clusters(bits=2, tune="2ep", centroids_only=True)(model, toy_task())
    assert torch.equal(small[0].bias, model[0].bias)
    assert [parameter.requires_grad for parameter in (small[0].bias, small[2].bias)] == [True, False]
    assert not torch.equal(small[0].weight, Clusters(bits=2)(model, toy_task())[0].weight)
    assert not torch.equal(Clusters(bits=2, tune="2ep")(model, toy_task())[0].bias, model[0].bias)


def test_frozen_weights_are_clustered_and_stay_frozen():
    model = toy_mlp()
    model[0].weight.requires_grad_(False)
    small = bake(Clusters(bits=2, tune="1ep")(model, toy_task()))
    assert not small[0].weight.requires_grad
    assert torch.equal(small[0].weight, bake(Clusters(bits=2)(model, toy_task()))[0].weight)


LAYERS = [
    nn.Conv1d(4, 4, 3, groups=2), nn.Conv2d(2, 6, 3), nn.Conv3d(2, 3, 2),
    nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ConvTranspose2d(2, 6, 3),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_convolutions_have_bits_of_their_own(layer):
    model = nn.Sequential(copy.deepcopy(layer), nn.Linear(4, 4))
    small = bake(Clusters(bits=1, convolution_bits=2)(model, toy_task()))
    assert [values_of(part.weight) for part in small] == [4, 2]
    assert small[0].weight.shape == layer.weight.shape


def test_rows_share_tables():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5))
    small = bake(Clusters(bits=1, rows=2)(model, toy_task()))
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        alone = nn.Sequential(nn.Linear(8, model[0].weight[rows].shape[0]))
        alone[0].weight = nn.Parameter(model[0].weight[rows].detach().clone())
        assert torch.equal(small[0].weight[rows], bake(Clusters(bits=1)(alone, toy_task()))[0].weight)
    assert torch.equal(bake(Clusters(bits=1, rows=99)(model, toy_task()))[0].weight, bake(Clusters(bits=1)(model, toy_task()))[0].weight)


def test_rows_of_a_transposed_convolution_are_its_outputs():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 3, 3, groups=1)
    index = cluster_index(layer, 2, rows=1)
    assert [sorted(index[:, output].unique().tolist()) for output in range(3)] == [[1, 2], [3, 4], [5, 6]]


def test_tied_weights_stay_tied():
    embedding, tied = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 6, bias=False)
    tied.weight = embedding.weight
    again = nn.Linear(6, 4)
    model = nn.ModuleDict({"embedding": embedding, "tied": tied, "a": again, "b": again})
    small = Clusters(bits=2)(model, toy_task())
    assert sorted(tuple(parameter.shape) for parameter in small.parameters()) == [(4,), (4,), (4,)]  # two tables and a bias
    assert torch.equal(small["embedding"].weight, small["tied"].weight)
    assert not small["embedding"].weight[0].any()
    again = copy.deepcopy(small)
    baked = bake(small)
    assert baked["embedding"].weight is baked["tied"].weight
    assert baked["embedding"].weight.shape == (6, 4)
    assert values_of(baked["tied"].weight) == 4
    assert again["embedding"].parametrizations["weight"].original is again["tied"].parametrizations["weight"].original


def test_clustering_twice():
    once = Clusters(bits=3)(Weights(keep=0.6)(toy_mlp(), toy_task()), toy_task())
    zeros = bake(copy.deepcopy(once))[0].weight == 0
    assert torch.equal(bake(Clusters(bits=3)(once, toy_task()))[0].weight, bake(copy.deepcopy(once))[0].weight)
    fewer = Clusters(bits=1)(once, toy_task())
    assert values_of(fewer[0].weight) == 2
    assert torch.equal(fewer[0].weight == 0, zeros)
    left = Clusters(bits=1, leave=("0",))(once, toy_task())
    assert torch.equal(left[0].weight, once[0].weight)
    assert values_of(left[2].weight) == 2


def test_leave():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)), nn.Linear(6, 3))
    small = bake(Clusters(bits=1, leave=("0",))(model, toy_task()))
    assert torch.equal(small[0][1].weight, model[0][1].weight)
    assert values_of(small[1].weight) == 2
    with pytest.raises(SettingsError, match=r"leave must be the path of a module of the model. Got 'head'"):
        Clusters(leave=("head",))(model, toy_task())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    small = bake(Clusters(bits=2)(toy_mlp().to(dtype), toy_task()))
    assert small[0].weight.dtype == dtype
    assert 1 <= values_of(small[0].weight) <= 4


def test_the_clusters_follow_the_module():
    shared = Clusters(bits=2)(toy_mlp(), toy_task()).to("meta")
    assert {tensor.device.type for tensor in shared.state_dict().values()} == {"meta"}
    assert shared[0].weight.shape == (12, 8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_empty_zero_and_equal_weights(optimizer):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1), nn.Linear(1, 3), nn.Linear(3, 3))
    model[1].weight, model[1].bias = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(0))
    model[2].weight = nn.Parameter(torch.zeros(3, 0))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[3].weight, 0.1)
    small = bake(Clusters(bits=2, tune=Train(epochs=1, optimizer=optimizer))(model, toy_task()))
    assert not small[0].weight.any()
    assert small[1].weight.shape == (0, 4)
    assert values_of(small[3].weight) == 1
    assert torch.equal(bake(Clusters(bits=2)(model, toy_task()))[3].weight, model[3].weight)


def test_few_weights_keep_their_values():
    model = nn.Sequential(nn.Linear(3, 2))
    assert torch.equal(bake(Clusters(bits=8)(model, toy_task()))[0].weight, model[0].weight)


def test_later_steps():
    shared = Clusters(bits=2)(toy_mlp(), toy_task())
    with pytest.raises(SettingsError, match=r"0\.weight is computed from other parameters"):
        Weights(keep=0.5)(shared, toy_task())
    integers = Int8()(shared, toy_task())
    assert integers(torch.zeros(2, 8)).shape == (2, 3)


def test_weights_that_cannot_be_clustered():
    for layer in (parametrizations.weight_norm(nn.Linear(8, 3)), parametrizations.spectral_norm(nn.Linear(8, 3))):
        model = nn.Sequential(layer, nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)))
        with pytest.raises(SettingsError, match=r"0\.weight is computed from other parameters"):
            Clusters()(model, toy_task())
        with pytest.raises(SettingsError, match=r"2\.weight is computed from other parameters"):
            Clusters(leave=("0",))(model, toy_task())
    with pytest.raises(SettingsError, match="Sequential has no convolution or linear layer"):
        Clusters()(nn.Sequential(nn.ReLU()), toy_task())
    for bad in (float("nan"), float("inf")):
        model = toy_mlp()
        with torch.no_grad():
            model[2].weight[0, 0] = bad
        with pytest.raises(WeightsError, match=r"2\.weight contains NaN or infinity"):
            Clusters()(model, toy_task())


def test_all_wrong_settings_are_named_together():
    with pytest.raises(SettingsError) as error:
        Clusters(bits=0, convolution_bits=9, rows=0, start="random", centroids_only=1, leave="0")  # type: ignore[arg-type]
    assert [problem.split(" must be ")[0] for problem in error.value.problems] == [
        f"quantize.clusters: {field}" for field in ("bits", "convolution_bits", "rows", "start", "centroids_only", "leave")
    ]


# --- recipes ---


@pytest.mark.parametrize(
    ("name", "kept", "values"),
    [
        ("lenet300", {"fc1": 18816, "fc2": 2700, "fc3": 260}, {"fc1": 64, "fc2": 64, "fc3": 64}),
        ("lenet5", {"conv1": 330, "conv2": 3000, "fc1": 32000, "fc2": 950}, {"conv1": 256, "conv2": 256, "fc1": 32, "fc2": 32}),
    ],
)
def test_the_recipes_have_the_papers_rates_and_bits(name, kept, values):
    recipe = read(Path(__file__).parent.parent / "recipes" / f"deep-compression-{name}.yaml")
    model = getattr(nets, name)()
    for step in recipe.steps:
        model = dataclasses.replace(step, tune=None)(model, toy_task((1, 28, 28), 10))  # type: ignore[type-var]
    weights = {path: layer.weight for path, layer in bake(model).named_modules() if path in kept}
    assert {path: int(weight.count_nonzero()) for path, weight in weights.items()} == kept
    assert {path: values_of(weight) for path, weight in weights.items()} == values
