"""Models by name, weights from files."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pared.architecture import nets
from pared.architecture.load import load_model, load_weights, read_weights
from pared.core.errors import ModelError, WeightsError

SHAPE: dict[str, Any] = {"classes": 10, "channels": 1, "size": 8}


@pytest.mark.parametrize("name", nets.__all__)
def test_every_reference_net_by_name(name: str) -> None:
    size = 8 if name not in ("lenet5", "vgg16", "squeezenet1_0", "squeezenet1_1") else 28
    model = load_model(name, classes=4, channels=1, size=size)
    assert not model.training
    assert model(torch.zeros(1, 1, size, size)).shape == (1, 4)


def test_unknown_names_list_near_ones() -> None:
    with pytest.raises(ModelError, match=r"resnet21: no such model\. Did you mean .*resnet20.*\? Known are .*timm:NAME"):
        load_model("resnet21", **SHAPE)
    with pytest.raises(ModelError, match="lenet5: the smallest input is 16x16"):
        load_model("lenet5", **SHAPE)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_weights_come_back_bit_for_bit(suffix: str, tmp_path: Path) -> None:
    model = nets.resnet8(channels=1)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"epoch": 3, "state_dict": model.state_dict()} if suffix == "pth" else model.state_dict(), path)
    loaded = load_model("resnet8", **SHAPE, weights=path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = nets.lenet300(size=8).state_dict()
    state["fc3.weight"] = torch.zeros(3, 3)
    del state["fc2.bias"]
    for number in range(5):
        state[f"extra{number}"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    before = nets.lenet300(size=8)
    values = before.fc1.weight.detach().clone()  # type: ignore[operator]
    with pytest.raises(WeightsError) as caught:
        load_weights(before, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "w.safetensors: the weights don't fit the model." in message
    assert "1 missing: fc2.bias." in message
    assert "5 unexpected: extra0, extra1, extra2 and 2 more." in message
    assert "1 of another shape: fc3.weight (3, 3) instead of (10, 100)." in message
    assert torch.equal(before.fc1.weight, values)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    state = nets.lenet300(size=8).state_dict()
    state["fc2.weight"][3, 4] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors: NaN or infinity in fc2\.weight\."):
        load_model("lenet300", **SHAPE, weights=tmp_path / "w.safetensors")


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("attacked", "w"))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "missing.pt")
    (tmp_path / "w.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"must be a \.safetensors, \.pt or \.pth file"):
        read_weights(tmp_path / "w.bin")
    for name in ("w.safetensors", "w.pt"):
        for content in (b"", b"nothing of the kind"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(WeightsError, match=f"{name}: "):
                read_weights(tmp_path / name)
    save_file({"a": torch.zeros(100)}, "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-5])
    with pytest.raises(WeightsError, match="can't be read"):
        read_weights(Path("cut.safetensors"))
    for thing in (Attack(), {"a": Attack()}, nn.Linear(1, 1)):
        torch.save(thing, "attack.pt")
        with pytest.raises(WeightsError, match=r"holds more than tensors, or is damaged\. Save model\.state_dict"):
            read_weights(Path("attack.pt"))
    assert not Path("attacked").exists()
    for content in ({}, [torch.zeros(1)], {"epoch": 3}):
        torch.save(content, "other.pt")
        with pytest.raises(WeightsError, match="must hold a state_dict"):
            read_weights(Path("other.pt"))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


def test_tied_weights_stored_once(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    state = model.state_dict()
    for absent in ("first.weight", "second.weight"):
        save_file({name: value for name, value in state.items() if name != absent}, tmp_path / "w.safetensors")
        load_weights(other, tmp_path / "w.safetensors")
        assert torch.equal(other.first.weight, model.first.weight)
        assert other.second.weight is other.first.weight


def test_functions_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\n\n"
        "def small(classes, channels):\n    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, classes))\n\n"
        "def plain():\n    return nn.Identity()\n\n"
        "def anything(**settings):\n    return nn.Linear(settings['size'], settings['classes'])\n\n"
        "def wrong():\n    return 'model'\n\n"
        "def broken(size):\n    return nn.Linear(size, 'ten')\n\n"
        "def poisoned():\n    layer = nn.Linear(1, 1)\n    layer.bias.data.fill_(float('nan'))\n    return layer\n"
    )
    assert load_model(f"{path}:small", **SHAPE)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert isinstance(load_model(f"{path}:plain", **SHAPE), nn.Identity)
    assert load_model(f"{path}:anything", **SHAPE).in_features == 8
    assert load_model("torch.nn:Identity", **SHAPE)(torch.ones(1)) == 1
    with pytest.raises(ModelError, match=r"must return a torch\.nn\.Module\. Got str"):
        load_model(f"{path}:wrong", **SHAPE)
    with pytest.raises(ModelError, match=r"mine\.py:broken: TypeError: .*mine\.py, line 16: return nn\.Linear\(size, 'ten'\)"):
        load_model(f"{path}:broken", **SHAPE)
    with pytest.raises(WeightsError, match="NaN or infinity in bias"):
        load_model(f"{path}:poisoned", **SHAPE)
    with pytest.raises(ModelError, match="no such module"):
        load_model("no.such:thing", **SHAPE)


@pytest.mark.parametrize(("spec", "package"), [("timm:resnet18", "timm"), ("hf:some/net", "transformers")])
def test_missing_packages_say_how_to_install(spec: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=rf"needs the package {package} \({package}.*\): pip install {package}"):
        load_model(spec, **SHAPE)


@pytest.fixture(scope="module")
def torchvision_operators() -> Any:
    """Names for torchvision's operators, where its binary doesn't fit the torch beside it; timm's networks call none of them."""
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    finished = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False)
    if finished.returncode == 0:
        return None
    library = torch.library.Library("torchvision", "DEF")
    pooled = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
    for name in ("nms", "qnms", *pooled, *(f"_{name}_backward" for name in pooled)):
        library.define(f"{name}(Tensor inputs) -> Tensor")
    return library


@pytest.mark.slow
def test_timm(torchvision_operators: Any) -> None:
    with warnings.catch_warnings():  # torchvision says that its binary can't be loaded
        warnings.simplefilter("ignore")
        importlib.import_module("timm")
    model = load_model("timm:resnet10t", classes=4, channels=1, size=32)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 4)
    model = load_model("timm:vit_tiny_patch16_224", classes=4, channels=3, size=32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(ModelError, match=r"timm:resnet10: timm has no such model\. Did you mean resnet10t"):
        load_model("timm:resnet10", classes=4, channels=1, size=32)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_hugging_face(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8, num_labels=4
    )
    original = ViTForImageClassification(config).eval()
    original.save_pretrained(tmp_path / "vit")
    images = torch.rand(2, 3, 32, 32)
    model = load_model(f"hf:{tmp_path / 'vit'}", classes=4, channels=3, size=32)
    assert torch.equal(model(images), original(images).logits)
    assert load_model(f"hf:{tmp_path / 'vit'}", classes=7, channels=3, size=32)(images).shape == (2, 7)
    with pytest.raises(ModelError, match="hf:"):
        load_model(f"hf:{tmp_path / 'nothing'}", classes=4, channels=3, size=32)
