"""Cross-layer equalisation, folding into layers, and bias correction: exact where they promise it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.graph.fold_layers import fold_layers
from pared.quantize.bias_correction import correct_bias, output_means
from pared.quantize.equalization import equalize, equalizing_scales


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                scales = torch.logspace(-2, 1, len(module.weight), dtype=module.weight.dtype)
                scales = scales[torch.randperm(len(scales), generator=generator)]
                module.weight.mul_(scales.view(-1, *[1] * (module.weight.dim() - 1)))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(torch.randn(len(module.running_mean), generator=generator))
                module.running_var.copy_(torch.rand(len(module.running_var), generator=generator) + 0.1)
                module.weight.copy_(torch.randn(len(module.weight), generator=generator))
    return model.eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6, bias=False), nn.LeakyReLU(0.1), nn.Linear(6, 3))


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 12, 3, groups=4), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(12, 4)),
    )


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 8, 2, groups=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )


def grouped_transposed_first() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv1d(6, 4, 3, groups=2))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


NETWORKS = {
    "mlp": (mlp, (5,), 2),
    "convnet": (convnet, (3, 9, 9), 3),
    "flattened": (flattened, (3, 6, 6), 1),
    "transposed": (transposed, (3, 4, 4), 2),
    "grouped transposed first": (grouped_transposed_first, (4, 7), 1),
    "tokens": (tokens, (7, 5), 1),
}


def weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]


def moved(before: nn.Module, after: nn.Module) -> int:
    """How many weights changed by more than rounding, next to those of the network with its norms folded."""
    return sum(not torch.allclose(a, b, rtol=1e-4) for a, b in zip(weights(before), weights(after), strict=True))


# --- equalisation ---


def test_the_scales_on_paper():
    # sqrt(9 * 4) / 4 = 1.5: the first range becomes 9 / 1.5 = 6, the second 4 * 1.5 = 6
    assert equalizing_scales(torch.tensor([9.0, 1.0, 0.0, 2.0]), torch.tensor([4.0, 1.0, 3.0, 0.0])).tolist() == [1.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_the_same(name):
    torch.manual_seed(0)
    make, shape, pairs = NETWORKS[name]
    model = uneven(make().double())
    before, inputs = copy.deepcopy(model.state_dict()), torch.randn(4, *shape, dtype=torch.float64)
    even = equalize(model, inputs)
    assert type(even) is type(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.allclose(even(inputs), model(inputs), rtol=1e-9, atol=1e-12)
    assert moved(fold_layers(model, inputs), even) == pairs + 1  # a chain of layers, each the neighbour of the next


def test_ranges_are_even_afterwards():
    torch.manual_seed(0)
    model = uneven(mlp())
    even = equalize(model, torch.zeros(2, 5))
    for first, second in ((even[0], even[3]), (even[3], even[5])):
        assert torch.allclose(first.weight.abs().amax(1), second.weight.abs().amax(0), rtol=1e-2)
    convolutions = equalize(uneven(flattened()), torch.zeros(2, 3, 6, 6))
    columns = convolutions[4].weight.abs().amax(0).view(4, 4).amax(1)
    assert torch.allclose(convolutions[0].weight.abs().flatten(1).amax(1), columns, rtol=1e-2)


def test_a_depthwise_network_gets_even_channels():
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 4, 1)))
    even = equalize(model, torch.zeros(2, 3, 6, 6))
    spread = [network[2].weight.abs().flatten(1).amax(1) for network in (model, even)]
    assert (spread[0].max() / spread[0].min()) > 500
    assert (spread[1].max() / spread[1].min()) < 50


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.sigmoid(self.second(x) + x)  # two readers of the first; a sum, then a sigmoid behind the second
        return self.tied(torch.relu(self.tied(F.relu6(self.third(x)))))


def test_nothing_moves_where_it_would_not_be_exact():
    torch.manual_seed(0)
    model = uneven(Branches())
    even = equalize(model, torch.zeros(2, 4))
    assert moved(model, even) == 0


def test_dead_channels_stay():
    model = mlp()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[3].weight[:, 5] = 0
    even = equalize(model, torch.zeros(2, 5))
    assert torch.equal(even[0].weight[5], model[0].weight[5])
    assert torch.isfinite(torch.cat([weight.flatten() for weight in weights(even)])).all()
    inputs = torch.randn(3, 5)
    assert torch.allclose(even.eval()(inputs), model.eval()(inputs), atol=1e-5)


# --- folding ---


def test_norms_are_folded_in_the_users_network():
    torch.manual_seed(0)
    model = uneven(convnet())
    inputs = torch.randn(2, 3, 9, 9)
    folded = fold_layers(model, inputs)
    assert [type(module).__name__ for module in folded].count("Identity") == 2
    assert isinstance(folded[0].bias, nn.Parameter)
    assert torch.allclose(folded(inputs), model(inputs), atol=1e-5)
    assert folded.training is model.training


class AsksItsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).view(len(x), self.norm.num_features, -1)


class NormAndMore(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


@pytest.mark.parametrize("make", [AsksItsNorm, lambda: nn.Sequential(nn.Conv2d(2, 4, 1), NormAndMore(4))])
def test_norms_that_have_to_stay(make):
    torch.manual_seed(0)
    model = uneven(make())
    inputs = torch.randn(2, 2, 3, 3)
    folded = fold_layers(model, inputs)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert torch.equal(folded(inputs), model(inputs))


# --- bias correction ---


def test_means_over_samples_positions_and_calls():
    torch.manual_seed(0)
    conv, transposed, linear = nn.Conv2d(2, 3, 2), nn.ConvTranspose1d(2, 4, 2, groups=2), nn.Linear(4, 2)
    x, y, z = torch.randn(5, 2, 4, 4), torch.randn(2, 6), torch.randn(3, 7, 4)
    assert torch.allclose(output_means(conv, {"": conv}, [(x[:2],), (x[2:],)])[""], conv(x).mean((0, 2, 3)).double())
    assert torch.allclose(output_means(transposed, {"": transposed}, [(y,)])[""], transposed(y).mean(1).double())
    assert torch.allclose(output_means(linear, {"": linear}, [(z,)])[""], linear(z).mean((0, 1)).double())
    twice = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(twice, twice)
    first = torch.randn(3, 2)
    expected = (twice[0](first).mean(0) + twice[0](twice(first)).mean(0)) / 2
    assert torch.allclose(output_means(model, {"0.0": twice[0]}, [(first,)])["0.0"], expected.double())
    assert output_means(model, {"other": linear}, [(first,)]) == {}
    assert not twice[0]._forward_hooks


@pytest.mark.parametrize("bias", [False, True])
def test_the_mean_comes_back(bias):
    torch.manual_seed(0)
    layer, inputs = nn.Conv1d(3, 4, 2, bias=bias), torch.rand(6, 3, 5)
    wanted = layer(inputs).mean((0, 2))
    with torch.no_grad():
        layer.weight.add_(0.1)
    correct_bias(layer, wanted.detach(), output_means(layer, {"": layer}, [(inputs,)])[""])
    assert isinstance(layer.bias, nn.Parameter)
    assert torch.allclose(layer(inputs).mean((0, 2)), wanted, atol=1e-6)
    bare = nn.Linear(2, 2, bias=False)
    correct_bias(bare, torch.ones(2), torch.ones(2))
    assert bare.bias is None
