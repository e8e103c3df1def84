"""The blocks of efficient networks: formulas against real counts, the slide's example, and what they must not do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pared.architecture import blocks
from pared.architecture.blocks.ghost import GhostExcite
from pared.core.errors import SettingsError
from pared.graph import count

SIZES = st.integers(3, 9)
CHANNELS = st.integers(1, 9)
KERNELS = st.sampled_from((1, 3, 5))
STRIDES = st.sampled_from((1, 2))


@st.composite
def shuffle_units(draw: Any) -> dict[str, Any]:
    groups, stride = draw(st.integers(1, 4)), draw(STRIDES)
    outputs = 4 * groups * draw(st.integers(1, 3))
    inputs = outputs if stride == 1 else groups * draw(st.integers(1, outputs // groups - 1))
    return {"inputs": inputs, "outputs": outputs, "groups": groups, "stride": stride, "first_groups": draw(st.sampled_from((1, None)))}


@st.composite
def shuffle_units_v2(draw: Any) -> dict[str, Any]:
    outputs, stride = 2 * draw(st.integers(1, 6)), draw(STRIDES)
    return {"inputs": outputs if stride == 1 else draw(CHANNELS), "outputs": outputs, "stride": stride}


WIDTHS = {"inputs": CHANNELS, "outputs": CHANNELS}
EXPANDED = {**WIDTHS, "expanded": CHANNELS, "kernel": KERNELS, "stride": STRIDES, "reduced": st.integers(0, 3)}
SETTINGS: dict[type[Any], st.SearchStrategy[dict[str, Any]]] = {
    blocks.DepthwiseSeparable: st.fixed_dictionaries({**WIDTHS, "kernel": KERNELS, "stride": STRIDES}),
    blocks.Fire: st.fixed_dictionaries(dict.fromkeys(("inputs", "squeezed", "expanded1", "expanded3"), CHANNELS)),
    blocks.SqueezeExcite: st.fixed_dictionaries({"channels": CHANNELS, "reduced": st.integers(1, 4)}),
    blocks.InvertedResidual: st.fixed_dictionaries(EXPANDED),
    blocks.LinearBottleneck: st.fixed_dictionaries({**WIDTHS, "expansion": st.integers(1, 4), "stride": STRIDES}),
    blocks.ShuffleUnit: shuffle_units(),
    blocks.ShuffleUnitV2: shuffle_units_v2(),
    blocks.GhostModule: st.fixed_dictionaries({**WIDTHS, "ratio": st.integers(2, 4), "kernel": KERNELS}),
    blocks.GhostBottleneck: st.fixed_dictionaries(EXPANDED),
    blocks.SeparableConv: st.fixed_dictionaries({**WIDTHS, "kernel": KERNELS}),
    blocks.XceptionUnit: st.fixed_dictionaries(
        {**WIDTHS, "repeats": st.integers(1, 3), "stride": STRIDES, "widen_first": st.booleans(), "relu_first": st.booleans()}
    ),
}


def given_to(formula: Callable[..., int], arguments: dict[str, Any]) -> int:
    """A formula has those settings of its block that change its result."""
    names = formula.__code__.co_varnames[: formula.__code__.co_argcount + formula.__code__.co_kwonlyargcount]
    return formula(**{name: value for name, value in arguments.items() if name in names})


def test_every_block_is_counted() -> None:
    made = {value for value in vars(blocks).values() if isinstance(value, type)}
    assert set(SETTINGS) == made - {blocks.ChannelShuffle}


@pytest.mark.parametrize("block", SETTINGS, ids=lambda block: block.__name__)
def test_formulas_are_the_real_counts(block: type[Any]) -> None:
    @given(SETTINGS[block], SIZES)
    @settings(max_examples=25, deadline=None)
    def check(arguments: dict[str, Any], size: int) -> None:
        module = block(**arguments)
        inputs = torch.rand(2, arguments.get("inputs", arguments.get("channels")), size, size)
        counts = count(module, inputs)
        assert counts.params == given_to(block.parameters_of, arguments)
        assert counts.macs == given_to(block.macs_of, {**arguments, "size": size})
        stride = arguments.get("stride", 1)
        sides = blocks.out_size(size, 3, stride)
        outputs = arguments.get("outputs", arguments.get("channels"))
        outputs = arguments["expanded1"] + arguments["expanded3"] if outputs is None else outputs
        assert module(inputs).shape == (2, outputs, sides, sides)

    check()


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_sizes_are_those_of_torch(size: int, kernel: int, stride: int, padding: int, ceil: bool) -> None:
    padding = min(padding, kernel // 2)
    expected = blocks.out_size(size, kernel, stride, padding=padding, ceil=ceil)
    pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    if expected >= 1:
        assert pool(torch.zeros(1, 1, size, size)).shape[-1] == expected
    else:
        with pytest.raises(RuntimeError):
            pool(torch.zeros(1, 1, size, size))


def test_the_slide() -> None:
    assert blocks.standard_weights(2, 4, 3) == nn.Conv2d(2, 4, 3, bias=False).weight.numel() == 72
    layer = blocks.SeparableConv(2, 4)
    assert (layer.conv1.weight.numel(), layer.pointwise.weight.numel()) == (18, 8)
    assert blocks.separable_weights(2, 4, 3) == 26


@given(CHANNELS, st.integers(1, 64), KERNELS, SIZES)
@settings(max_examples=50, deadline=None)
def test_the_ratio_is_one_over_outputs_plus_one_over_the_kernel(inputs: int, outputs: int, kernel: int, size: int) -> None:
    ratio = blocks.separable_ratio(outputs, kernel)
    assert ratio == pytest.approx(blocks.separable_weights(inputs, outputs, kernel) / blocks.standard_weights(inputs, outputs, kernel))
    macs = blocks.SeparableConv.macs_of(inputs, outputs, kernel=kernel, size=size)
    assert ratio == pytest.approx(macs / blocks.conv_macs(inputs, outputs, kernel, size))


@pytest.mark.parametrize(("groups", "each"), list(itertools.product((1, 2, 3, 4), (1, 2, 5))))
def test_shuffle(groups: int, each: int) -> None:
    images = torch.rand(2, groups * each, 3, 4)
    shuffled = blocks.channel_shuffle(images, groups)
    places = np.arange(groups * each).reshape(groups, each).T.ravel()
    np.testing.assert_array_equal(shuffled, images.numpy()[:, places])
    assert torch.equal(blocks.channel_shuffle(shuffled, each), images)
    assert torch.equal(blocks.ChannelShuffle(groups)(images), shuffled)


def reads(unit: nn.Module, inputs: int, output: int) -> set[int]:
    """The input channels that an output channel depends on."""
    images = torch.rand(1, inputs, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(unit.eval()(images)[:, output].sum(), images)
    return set(torch.nonzero(gradient.abs().sum((0, 2, 3))).flatten().tolist())


def test_only_the_shuffle_carries_over_groups() -> None:
    def inputs_of_the_branch(shuffle: bool) -> set[int]:
        unit = blocks.ShuffleUnit(24, 24, groups=2, shuffle=shuffle)
        unit.relu1 = unit.relu2 = nn.Identity()  # so that no gradient is cut by chance
        return reads(unit, 24, 0)

    assert inputs_of_the_branch(shuffle=False) == set(range(12))
    assert inputs_of_the_branch(shuffle=True) == set(range(24))


def negative(module: nn.Module, channels: int) -> bool:
    return bool((module.eval()(torch.randn(4, channels, 6, 6)) < 0).any())


def test_linear_bottlenecks_end_without_an_activation() -> None:
    assert negative(blocks.InvertedResidual(8, 32, 12, activation=nn.ReLU), 8)
    assert negative(blocks.LinearBottleneck(8, 12), 8)
    assert negative(blocks.GhostBottleneck(8, 32, 12), 8)
    for block in (blocks.InvertedResidual(8, 32, 12).block[-1], blocks.LinearBottleneck(8, 12).conv):
        assert isinstance(block[-1], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride", "residual"), [(8, 8, 1, True), (8, 8, 2, False), (8, 12, 1, False), (8, 12, 2, False)]
)
def test_the_input_is_added_at_stride_1_and_equal_channels_only(inputs: int, outputs: int, stride: int, residual: bool) -> None:
    images = torch.rand(2, inputs, 6, 6)
    for block in (
        blocks.InvertedResidual(inputs, 3 * inputs, outputs, stride=stride),
        blocks.LinearBottleneck(inputs, outputs, stride=stride),
    ):
        last = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        nn.init.zeros_(last.weight)
        assert torch.equal(block.eval()(images), images if residual else torch.zeros(2, outputs, 6 // stride, 6 // stride))


def test_no_expansion_no_first_convolution() -> None:
    assert len(blocks.LinearBottleneck(8, 16, expansion=1).conv) == 3
    assert len(blocks.InvertedResidual(8, 8, 16).block) == 2


def test_no_activation_after_depthwise_convolutions_of_shuffle_units() -> None:
    assert [type(part).__name__ for part in blocks.ShuffleUnitV2(8, 8).branch2] == [
        "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "ReLU",
    ]  # fmt: skip
    unit = blocks.ShuffleUnit(8, 8, groups=2).eval()
    seen: list[Tensor] = []
    unit.conv3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    unit(torch.randn(2, 8, 5, 5))
    assert (seen[0] < 0).any()


def test_shuffle_unit_v2_passes_half_of_the_channels() -> None:
    images = torch.rand(2, 8, 5, 5)
    assert torch.equal(blocks.ShuffleUnitV2(8, 8).eval()(images)[:, ::2], images[:, :4])


def test_shuffle_unit_averages_the_shortcut_at_stride_2() -> None:
    images = torch.rand(2, 8, 5, 5)
    result = blocks.ShuffleUnit(8, 24, groups=2, stride=2).eval()(images)
    torch.testing.assert_close(result[:, :8], functional.avg_pool2d(images, 3, 2, 1))


def test_squeeze_excite_is_what_numpy_says() -> None:
    block, images = blocks.SqueezeExcite(6, 2), torch.randn(3, 6, 4, 4)
    first, second = (layer.weight.detach().numpy()[:, :, 0, 0] for layer in (block.fc1, block.fc2))
    means = images.numpy().mean((2, 3))
    hidden = np.maximum(means @ first.T + block.fc1.bias.detach().numpy(), 0)
    gate = np.clip((hidden @ second.T + block.fc2.bias.detach().numpy() + 3) / 6, 0, 1)
    np.testing.assert_allclose(block(images).detach(), images.numpy() * gate[:, :, None, None], rtol=1e-5, atol=1e-6)
    twin = GhostExcite(6, 2)
    twin.load_state_dict({name.replace("fc1", "conv_reduce").replace("fc2", "conv_expand"): w for name, w in block.state_dict().items()})
    assert torch.equal(twin(images), block(images))


def test_ghost_module_cuts_off_what_is_too_much() -> None:
    module, images = blocks.GhostModule(4, 7, activation=None).eval(), torch.randn(1, 4, 5, 5)
    primary = module.primary_conv(images)
    assert primary.shape[1] == 4
    assert torch.equal(module(images), torch.cat([primary, module.cheap_operation(primary)[:, :3]], 1))


def test_separable_convolution_has_nothing_between() -> None:
    layer, images = blocks.SeparableConv(3, 5), torch.randn(2, 3, 6, 6)
    merged = layer.pointwise.weight * layer.conv1.weight[:, 0][None]
    torch.testing.assert_close(layer(images), functional.conv2d(images, merged, padding=1), rtol=1e-4, atol=1e-5)


def test_xception_unit_leaves_its_input_alone() -> None:
    images = torch.randn(1, 4, 5, 5)
    before = images.clone()
    unit = blocks.XceptionUnit(4, 4, repeats=3).eval()
    for module in unit.rep.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    assert torch.equal(unit(images), before)
    assert torch.equal(images, before)


WRONG: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: blocks.Fire(0, 16, 64, -1), [
        "blocks.Fire: inputs must be a whole number at least 1. Got 0.",
        "blocks.Fire: expanded3 must be a whole number at least 1. Got -1.",
    ]),
    (lambda: blocks.DepthwiseSeparable(4, 1.5, kernel=4), [  # type: ignore[arg-type]
        "blocks.DepthwiseSeparable: outputs must be a whole number at least 1. Got 1.5.",
        "blocks.DepthwiseSeparable: kernel must be odd. Got 4.",
    ]),
    (lambda: blocks.InvertedResidual(4, 8, 4, reduced=-1), ["blocks.InvertedResidual: reduced must be a whole number at least 0. Got -1."]),
    (lambda: blocks.LinearBottleneck(4, 4, expansion=0), ["blocks.LinearBottleneck: expansion must be a whole number at least 1. Got 0."]),
    (lambda: blocks.SqueezeExcite(4, 0), ["blocks.SqueezeExcite: reduced must be a whole number at least 1. Got 0."]),
    (lambda: blocks.ShuffleUnit(10, 14, groups=3), [
        "blocks.ShuffleUnit: outputs must be a multiple of 4 · groups (12). Got 14.",
        "blocks.ShuffleUnit: inputs must be a multiple of first_groups (3). Got 10.",
        "blocks.ShuffleUnit: outputs must be inputs (10) at stride 1. Got 14.",
    ]),
    (lambda: blocks.ShuffleUnit(13, 12, groups=3, stride=2, first_groups=1), [
        "blocks.ShuffleUnit: outputs must be more than inputs (13) at stride 2. Got 12.",
        "blocks.ShuffleUnit: outputs - inputs must be a multiple of groups (3). Got -1.",
    ]),
    (lambda: blocks.ShuffleUnit(12, 12, stride=3), ["blocks.ShuffleUnit: stride must be 1 or 2. Got 3."]),
    (lambda: blocks.ShuffleUnitV2(4, 7), [
        "blocks.ShuffleUnitV2: outputs must be even. Got 7.",
        "blocks.ShuffleUnitV2: outputs must be inputs (4) at stride 1. Got 7.",
    ]),
    (lambda: blocks.GhostModule(4, 4, ratio=1), ["blocks.GhostModule: ratio must be a whole number at least 2. Got 1."]),
    (lambda: blocks.GhostBottleneck(4, 8, 4, stride=4), ["blocks.GhostBottleneck: stride must be 1 or 2. Got 4."]),
    (lambda: blocks.XceptionUnit(4, 8, repeats=0), ["blocks.XceptionUnit: repeats must be a whole number at least 1. Got 0."]),
    (lambda: blocks.SeparableConv(4, 8, kernel=2), ["blocks.SeparableConv: kernel must be odd. Got 2."]),
    (lambda: blocks.ChannelShuffle(0), ["blocks.ChannelShuffle: groups must be a whole number at least 1. Got 0."]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "sentences"), WRONG)
def test_wrong_settings_are_named_together(make: Callable[[], Any], sentences: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        make()
    assert list(caught.value.problems) == sentences
