"""The reference networks: exact sizes, shapes, initial weights, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.architecture import nets
from pared.architecture.nets.resnet import Block, PaddedShortcut
from pared.core.errors import ModelError
from pared.training import Machine, Task, Train, evaluate, fit

SIZES = [
    ("lenet300", {}, 266_610, 266_200),
    ("lenet5", {}, 431_080, 2_293_000),
    ("conv2", {}, 4_301_642, 43_780_608),
    ("conv4", {}, 2_425_930, 98_306_560),
    ("conv6", {}, 2_262_602, 153_881_088),
    ("conv2", {"channels": 1, "size": 28}, 3_317_450, None),
    ("conv4", {"channels": 1, "size": 28}, 1_933_258, None),
    ("conv6", {"channels": 1, "size": 28}, 1_802_698, None),
    ("vgg16", {}, 14_724_042, 313_201_664),
    ("vgg_small", {}, 4_660_106, None),
    ("resnet20", {}, 269_722, None),
    ("resnet32", {}, 464_154, None),
    ("resnet56", {}, 853_018, None),
    ("resnet110", {}, 1_727_962, None),
]
# millions, as the papers round them
MILLIONS = {
    ("conv2", 28): 32.6, ("conv4", 28): 74.4, ("conv6", 28): 116.7,
    ("resnet20", 32): 40.6, ("resnet32", 32): 68.9, ("resnet56", 32): 125.5, ("resnet110", 32): 252.9,
}  # fmt: skip
DEFAULTS = {"lenet300": (1, 28), "lenet5": (1, 28)}
# those of ImageNet have tests of their own
SMALL = [name for name in nets.__all__ if getattr(nets, name).__kwdefaults__["size"] <= 32]


def counted_macs(model: nn.Module, inputs: Tensor) -> int:
    """MACs of one sample, layer by layer from the shapes."""
    total = 0

    def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()  # type: ignore[index,operator]

    handles = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(("name", "arguments", "parameters", "macs"), SIZES)
def test_sizes_to_the_digit(name: str, arguments: dict[str, int], parameters: int, macs: int | None) -> None:
    model = getattr(nets, name)(**arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    channels, size = DEFAULTS.get(name, (3, 32))
    channels, size = arguments.get("channels", channels), arguments.get("size", size)
    counted = counted_macs(model, torch.zeros(1, channels, size, size))
    if macs is not None:
        assert counted == macs
    if (name, size) in MILLIONS:
        assert round(counted / 1e6, 1) == MILLIONS[name, size]


@pytest.mark.parametrize("name", ["lenet5", "conv2", "resnet20"])
def test_the_graphs_count_agrees(name: str) -> None:
    from pared.graph import count

    channels, size = DEFAULTS.get(name, (3, 32))
    model = getattr(nets, name)().eval()
    counts = count(model, torch.zeros(2, channels, size, size))
    assert counts.params == sum(parameter.numel() for parameter in model.parameters())
    assert counts.macs == counted_macs(model, torch.zeros(1, channels, size, size))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 33)])
def test_any_input_that_the_arithmetic_allows(name: str, channels: int, size: int) -> None:
    if size == 8 and name in ("lenet5", "vgg16"):
        with pytest.raises(ModelError, match=f"{name}: the smallest input is 16x16 pixels. Got 8x8"):
            getattr(nets, name)(channels=channels, size=size)
        return
    model = getattr(nets, name)(classes=7, channels=channels, size=size, width=0.25)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


SMALLEST = {"lenet300": 1, "lenet5": 16, "conv2": 2, "conv4": 4, "conv6": 8, "vgg16": 16, "vgg_small": 8}


@pytest.mark.parametrize(("name", "smallest"), SMALLEST.items())
def test_the_smallest_input_works_and_one_less_is_refused(name: str, smallest: int) -> None:
    model = getattr(nets, name)(size=smallest, channels=1, width=0.1).eval()
    assert model(torch.zeros(1, 1, smallest, smallest)).shape == (1, 10)
    with pytest.raises(ModelError, match=r"size must be a whole number|smallest input"):
        getattr(nets, name)(size=smallest - 1)


@pytest.mark.parametrize("name", SMALL)
def test_width_scales_the_hidden_layers_only(name: str) -> None:
    model = getattr(nets, name)(classes=5, channels=2, size=32, width=0.5)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    full = [module for module in getattr(nets, name)(classes=5, channels=2, size=32).modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [2 * layer.weight.shape[0] for layer in layers[:-1]] == [layer.weight.shape[0] for layer in full[:-1]]
    assert layers[-1].weight.shape[0] == 5
    narrowest = getattr(nets, name)(size=32, width=1e-6)
    assert all(module.weight.shape[0] == 1 for module in list(narrowest.modules()) if isinstance(module, nn.Conv2d))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ModelError) as caught:
        nets.resnet20(classes=0, channels=1.5, width=-1)  # type: ignore[arg-type]
    assert str(caught.value).splitlines() == [
        "resnet20: classes must be a whole number of at least 1. Got 0.",
        "resnet20: channels must be a whole number of at least 1. Got 1.5.",
        "resnet20: width must be a number greater than 0. Got -1.",
    ]


def test_initial_weights() -> None:
    torch.manual_seed(0)
    linear = nets.lenet300().fc1
    assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / (784 + 300)), rel=0.01)  # type: ignore[operator]
    assert linear.bias.abs().max() == 0  # type: ignore[operator]
    convolution = nets.resnet20().stage3[2].conv2  # type: ignore[index]
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert torch.equal(nets.vgg16().bn1.weight, torch.ones(64))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(nets.conv4(width=0.1).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_padded_shortcut_is_what_numpy_says() -> None:
    images = torch.rand(2, 3, 5, 4)
    expected = np.zeros((2, 3 + 1 + 2, 3, 2), np.float32)
    expected[:, 1:4] = images.numpy()[:, :, ::2, ::2]
    np.testing.assert_array_equal(PaddedShortcut(2, 1, 2)(images), expected)
    assert str(PaddedShortcut(2, 1, 2)) == "PaddedShortcut(stride=2, before=1, after=2)"


def test_a_block_whose_convolutions_are_zero_passes_the_shortcut() -> None:
    block = Block(2, 5, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    images = torch.rand(1, 2, 6, 6)
    result = block(images)
    assert result.shape == (1, 5, 3, 3)
    assert torch.equal(result[:, 1:3], images[:, :, ::2, ::2])
    assert result[:, [0, 3, 4]].abs().sum() == 0


def test_depth_is_6n_plus_2() -> None:
    for name in ("resnet8", "resnet20", "resnet32", "resnet56", "resnet110"):
        model = getattr(nets, name)(width=0.1)
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        assert f"resnet{len(layers)}" == name


@pytest.mark.parametrize("name", ["lenet300", "conv2", "resnet8"])
def test_they_learn_one_batch(name: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    data = [(images, labels)] * 8
    model = getattr(nets, name)(classes=4, channels=1, size=8, width=0.25)
    task = Task(data, data[:1], data[:1], machine=Machine(accelerator="cpu"))
    fit(model, task, Train(epochs=12, learning_rate=0.01))
    assert evaluate(model, task) == 1.0
