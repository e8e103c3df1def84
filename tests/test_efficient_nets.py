"""SqueezeNet to GhostNet: counts to the digit, weights of other libraries, small pictures, and the mistakes that others made."""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pared import prune
from pared.architecture import blocks, nets
from pared.architecture.nets.initial_weights import init_fan_out
from pared.architecture.nets.settings import rounded
from pared.core.errors import ModelError
from pared.graph import count
from pared.lab.libraries import load_library
from pared.runtime import export

NAMES = [name for name in nets.__all__ if getattr(nets, name).__kwdefaults__["size"] > 32]
# 1000 classes, 224 pixels (Xception 299)
COUNTS: list[tuple[str, dict[str, Any], int, int]] = [
    ("squeezenet1_0", {}, 1_248_424, 818_924_576),
    ("squeezenet1_1", {}, 1_235_496, 349_151_936),
    ("mobilenet_v1", {}, 4_231_976, 568_740_352),
    ("mobilenet_v1", {"width": 0.75}, 2_585_560, 325_400_448),
    ("mobilenet_v1", {"width": 0.5}, 1_331_592, 149_497_088),
    ("mobilenet_v1", {"width": 0.25}, 470_072, 41_030_272),
    ("mobilenet_v2", {}, 3_504_872, 300_774_272),
    ("mobilenet_v3_large", {}, 5_483_032, 216_589_760),
    ("mobilenet_v3_small", {}, 2_542_856, 56_510_400),
    ("shufflenet_v1", {"groups": 1}, 1_531_936, 143_078_976),
    ("shufflenet_v1", {"groups": 2}, 1_733_848, 140_836_512),
    ("shufflenet_v1", {"groups": 3}, 1_865_728, 137_460_672),
    ("shufflenet_v1", {"groups": 4}, 1_968_344, 134_339_776),
    ("shufflenet_v1", {"groups": 8}, 2_434_768, 138_365_952),
    ("shufflenet_v2", {"width": 0.5}, 1_366_792, 40_476_448),
    ("shufflenet_v2", {}, 2_278_604, 144_907_992),
    ("shufflenet_v2", {"width": 1.5}, 3_503_624, 295_759_392),
    ("shufflenet_v2", {"width": 2.0}, 7_393_996, 583_253_464),
    ("xception", {}, 22_855_952, 8_357_403_496),
    ("ghostnet", {"width": 0.5}, 2_587_292, 42_328_152),
    ("ghostnet", {}, 5_182_508, 141_150_512),
    ("ghostnet", {"width": 1.3}, 7_358_820, 227_003_256),
]
# for MACs that the literature gives in millions only
MILLIONS = {
    "shufflenet_v1": {143.1, 140.8, 137.5, 134.3, 138.4},
    "shufflenet_v2": {40.5, 144.9, 295.8, 583.3},
    "ghostnet": {42.3, 141.2, 227.0},
}


@pytest.mark.parametrize(("name", "arguments", "parameters", "macs"), COUNTS)
def test_counts_to_the_digit(name: str, arguments: dict[str, Any], parameters: int, macs: int) -> None:
    size = getattr(nets, name).__kwdefaults__["size"]
    model = getattr(nets, name)(**arguments).eval()
    counts = count(model, torch.zeros(1, 3, size, size))
    assert (counts.params, counts.macs) == (parameters, macs)
    assert counts.params == sum(parameter.numel() for parameter in model.parameters())
    assert name not in MILLIONS or round(macs / 1e6, 1) in MILLIONS[name]


def test_every_network_is_counted() -> None:
    assert {name for name, *_ in COUNTS} == set(NAMES)


def test_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:\((\w+)=([\d.]+)\))?` \| ([\d,]+) \| ([\d,]+) \| (\w*)", page, flags=re.MULTILINE)
    assert {row[0] for row in rows} == set(NAMES)
    counts = {(name, *sorted(arguments.items())): (parameters, macs) for name, arguments, parameters, macs in COUNTS}
    for name, setting, value, parameters, macs, library in rows:
        key = (name, (setting, float(value))) if setting else (name,)
        assert counts[key] == (int(parameters.replace(",", "")), int(macs.replace(",", ""))), name
        assert library == next((peer for peer, _, ours, _ in PEERS if ours == name), "")


def test_shares_of_mobilenet_v1() -> None:
    counts = count(nets.mobilenet_v1().eval(), torch.zeros(1, 3, 224, 224))
    shares = {
        kind: sum(each.macs for each in counts.modules if each.path.endswith(kind)) / counts.macs for kind in ("pointwise", "depthwise")
    }
    assert {kind: round(100 * share, 2) for kind, share in shares.items()} == {"pointwise": 94.86, "depthwise": 3.06}
    assert next(each.params for each in counts.modules if each.path == "fc") == 1_025_000


def test_sizes_of_the_input_of_mobilenet_v1() -> None:
    model = nets.mobilenet_v1().eval()
    assert [round(count(model, torch.zeros(1, 3, size, size)).macs / 1e6) for size in (192, 160, 128)] == [418, 291, 186]


def test_squeezenet_poolings_round_up() -> None:
    def maps(model: nn.Module) -> list[int]:
        sides: list[int] = []
        for module in model.modules():
            if isinstance(module, nn.MaxPool2d):
                module.register_forward_hook(lambda *given: sides.append(given[2].shape[-1]))
        model.eval()(torch.zeros(1, 3, 224, 224))
        return sides

    assert maps(nets.squeezenet1_0(width=0.1)) == [54, 27, 13]
    assert maps(nets.squeezenet1_1(width=0.1)) == [55, 27, 13]
    floored = nets.squeezenet1_0(width=0.1)
    for module in floored.modules():
        if isinstance(module, nn.MaxPool2d):
            module.ceil_mode = False
    assert maps(floored) == [54, 26, 12]  # what a pooling that rounds down would lose


@given(st.floats(0.01, 4000), st.sampled_from((4, 8)))
@settings(max_examples=300, deadline=None)
def test_widths_are_rounded_to_multiples_and_never_below_90_percent(units: float, divisor: int) -> None:
    result = rounded(units, divisor)
    assert result % divisor == 0
    assert result >= max(divisor, 0.9 * units)
    assert abs(result - units) <= divisor or result == divisor


@pytest.mark.parametrize("width", [0.35, 0.6])
@pytest.mark.parametrize(("name", "divisor"), [("mobilenet_v2", 8), ("mobilenet_v3_large", 8), ("mobilenet_v3_small", 8), ("ghostnet", 2)])
def test_all_channels_of_the_mobilenets_are_rounded(name: str, divisor: int, width: float) -> None:
    model = getattr(nets, name)(width=width)
    found = {module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert all(channels % divisor == 0 for channels in found)


def test_mobilenet_v2_residuals() -> None:
    units = [module for module in nets.mobilenet_v2().modules() if isinstance(module, blocks.LinearBottleneck)]
    assert [unit.residual for unit in units] == [number in (2, 4, 5, 7, 8, 9, 11, 12, 14, 15) for number in range(17)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size", "width"), [(1, 28, 0.25), (2, 33, 0.4)])
def test_small_pictures(name: str, channels: int, size: int, width: float) -> None:
    model = getattr(nets, name)(classes=7, channels=channels, size=size, width=width)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


SMALLEST = {"squeezenet1_0": 21, "squeezenet1_1": 17, "xception": 7}


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_input_works_and_one_less_is_refused(name: str) -> None:
    smallest = SMALLEST.get(name, 1)
    model = getattr(nets, name)(classes=3, channels=1, size=smallest, width=0.1).eval()
    assert model(torch.zeros(1, 1, smallest, smallest)).shape == (1, 3)
    with pytest.raises(ModelError, match=rf"{name}: (size must be a whole number|the smallest input is {smallest}x{smallest} pixels)"):
        getattr(nets, name)(size=smallest - 1)
    if smallest > 1:
        with pytest.raises(RuntimeError):  # the limit isn't stricter than it must be
            model(torch.zeros(1, 1, smallest - 1, smallest - 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1e-6, 0.37])
def test_any_width(name: str, width: float) -> None:
    model = getattr(nets, name)(classes=3, channels=1, size=32, width=width).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("width", [0.25, 0.6, 2])
def test_shufflenet_v1_of_any_width_and_groups(groups: int, width: float) -> None:
    model = nets.shufflenet_v1(classes=3, size=32, width=width, groups=groups)
    units = [module for module in model.modules() if isinstance(module, blocks.ShuffleUnit)]
    assert len(units) == 16
    assert units[0].conv1.groups == 1
    assert all(unit.conv1.groups == groups for unit in units[1:])
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("groups", [0, 5, True, 3.0, "3", [3]])
def test_wrong_groups_are_named_with_the_rest(groups: Any) -> None:
    with pytest.raises(ModelError) as caught:
        nets.shufflenet_v1(classes=0, groups=groups)
    assert str(caught.value).splitlines() == [
        "shufflenet_v1: classes must be a whole number of at least 1. Got 0.",
        f"shufflenet_v1: groups must be one of 1, 2, 3, 4, 8. Got {groups!r}.",
    ]


def test_initial_weights() -> None:
    squeezenet: Any = nets.squeezenet1_1()
    assert squeezenet.classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert squeezenet.features[12].expand3x3.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    for name in NAMES:
        model = getattr(nets, name)(width=0.25, classes=50)
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        assert all(layer.bias is None or layer.bias.abs().max() == 0 for layer in layers)
    depthwise = init_fan_out(nn.Conv2d(512, 512, 3, groups=512, bias=False))
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)  # type: ignore[operator]
    assert nets.mobilenet_v2().classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.01)  # type: ignore[index,union-attr]


def test_signals_neither_die_nor_explode() -> None:
    images = torch.rand(4, 3, 64, 64)
    for name in NAMES:
        scores = getattr(nets, name)(classes=10, size=64, width=0.5)(images)
        assert torch.isfinite(scores).all()
        assert scores.std(0).max() > 1e-5, name


PEERS = [
    ("torchvision", "squeezenet1_0", "squeezenet1_0", {}),
    ("torchvision", "squeezenet1_1", "squeezenet1_1", {}),
    ("torchvision", "mobilenet_v2", "mobilenet_v2", {}),
    ("torchvision", "mobilenet_v2", "mobilenet_v2", {"width": 0.35}),
    ("torchvision", "mobilenet_v3_large", "mobilenet_v3_large", {}),
    ("torchvision", "mobilenet_v3_large", "mobilenet_v3_large", {"width": 0.75}),
    ("torchvision", "mobilenet_v3_small", "mobilenet_v3_small", {}),
    ("torchvision", "shufflenet_v2_x0_5", "shufflenet_v2", {"width": 0.5}),
    ("torchvision", "shufflenet_v2_x1_0", "shufflenet_v2", {}),
    ("timm", "ghostnet_050", "ghostnet", {"width": 0.5}),
    ("timm", "ghostnet_100", "ghostnet", {}),
    ("timm", "ghostnet_130", "ghostnet", {"width": 1.3}),
    ("timm", "xception", "xception", {}),
]


def peer(library: str, name: str, width: float | None) -> nn.Module:
    """The same network of another library, with random weights and statistics."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is optional; the weights of its networks are loaded into ours")
    with warnings.catch_warnings():  # some names of timm are old, and torchvision may say that its binary can't be loaded
        warnings.simplefilter("ignore")
        if library == "timm":
            model = load_library("timm").create_model(name, pretrained=False)
        else:
            widened = {"width_mult": width} if width is not None and name.startswith("mobilenet") else {}
            model = load_library("torchvision").models.get_model(name, weights=None, **widened)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


@pytest.mark.parametrize(("library", "theirs", "ours", "arguments"), PEERS)
def test_weights_of_other_libraries(library: str, theirs: str, ours: str, arguments: dict[str, float]) -> None:
    other = peer(library, theirs, arguments.get("width"))
    model = getattr(nets, ours)(**arguments).eval()
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in other.state_dict().items()
    }
    model.load_state_dict(other.state_dict())
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected, found = other(images), model(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def some(*quick: str) -> list[Any]:
    """All networks; those not named only where slow tests are asked for."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in NAMES]


SLIM: dict[str, dict[str, Any]] = {name: {"classes": 4, "channels": 1, "size": 32, "width": 0.25} for name in NAMES}


@pytest.mark.parametrize("name", some("squeezenet1_1", "mobilenet_v1", "mobilenet_v3_small", "shufflenet_v1", "shufflenet_v2"))
def test_neurons_can_be_cut(name: str) -> None:
    model, images = getattr(nets, name)(**SLIM[name]).eval(), torch.rand(2, 1, 32, 32)
    small = prune.cut(model, images, 0.5)
    assert small(images).shape == (2, 4)
    before, after = count(model, images), count(small, images)
    assert after.params < 0.75 * before.params
    assert after.macs < 0.75 * before.macs


@pytest.mark.parametrize("name", some("squeezenet1_1", "shufflenet_v1"))
def test_the_deployed_file_computes_the_same(name: str, tmp_path: Path) -> None:
    model, images = getattr(nets, name)(**SLIM[name]).eval(), torch.rand(2, 1, 32, 32)
    path = export(model, (images,), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = model(images).detach()
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", some("squeezenet1_0", "mobilenet_v1", "mobilenet_v3_small", "shufflenet_v1", "shufflenet_v2"))
def test_they_learn_one_batch(name: str) -> None:
    images, labels = torch.rand(8, 1, 32, 32), torch.arange(8) % 4
    model = getattr(nets, name)(**SLIM[name])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # the ReLU after SqueezeNet's last convolution dies of large steps
    optimizer = torch.optim.Adam(model.parameters(), 0.001 if name.startswith("squeezenet") else 0.003)
    losses: list[float] = []
    for _ in range(40 if name.startswith("squeezenet") else 12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
