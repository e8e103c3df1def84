"""The networks of the experiment: built without weights, with inputs as small as they take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared.core.errors import ModelError
from pared.core.seeds import seed_everything
from pared.lab.libraries import load_library

LIST = Path(__file__).with_name("models.json")
BACKBONE = ".backbone"  # of a detection model: what comes after it calls operators that are no part of ATen
SIDES = (64, 96, 128, 160, 192)  # tried before the size that a model was made for


@dataclass(frozen=True)
class Subject:
    """A network in eval mode and inputs for it (a batch of two)."""

    model: nn.Module
    inputs: tuple[Any, ...]

    def batch(self, size: int) -> tuple[Any, ...]:
        """Other random inputs of the same shapes."""
        return tuple(torch.randn(size, *x.shape[1:]) if isinstance(x, Tensor) else x for x in self.inputs)


def names() -> tuple[str, ...]:
    """All models, small ones first, so that a run that is stopped has seen many.

    They are called "torchvision:NAME" or "timm:NAME", and "torchvision:NAME.backbone" where only the backbone is taken.
    """
    listed: dict[str, int] = json.loads(LIST.read_text(encoding="utf-8"))
    return tuple(sorted(listed, key=lambda name: (listed[name], name)))


def build(name: str, seed: int) -> Subject:
    """Build a model of the list and find the smallest inputs that it takes in eval and training mode.

    Raises:
        ModelError: if the library is missing or no input size fits.
    """
    library, _, own = name.partition(":")
    seed_everything(seed)
    model = _torchvision(own) if library == "torchvision" else load_library("timm").create_model(own, pretrained=False)
    model.eval()
    error: Exception | None = None
    for inputs in _torchvision_inputs(own) if library == "torchvision" else _timm_inputs(model):
        try:
            with torch.no_grad():
                for training in (True, False):
                    model.train(training)
                    model(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
            return Subject(model, inputs)
        except Exception as failure:
            error = failure
    raise ModelError(f"{name} runs on none of the input sizes that were tried. {error}")


def _torchvision(name: str) -> nn.Module:
    models = load_library("torchvision").models
    if name.endswith(BACKBONE):
        return models.get_model(name.removesuffix(BACKBONE), weights=None, weights_backbone=None).backbone
    if name in models.list_models(module=models.segmentation):
        return models.get_model(name, weights=None, weights_backbone=None)
    if name in ("googlenet", "inception_v3"):
        return models.get_model(name, weights=None, init_weights=False)
    return models.get_model(name, weights=None)


def _torchvision_inputs(name: str) -> Iterator[tuple[Any, ...]]:
    if name.startswith("raft"):
        yield torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128), 2  # two updates of the flow
    elif name.startswith(("r3d", "mc3", "r2plus1d", "swin3d", "mvit", "s3d")):
        for frames, side in ((8, 56), (8, 64), (16, 64), (16, 224)):
            yield (torch.randn(2, 3, frames, side, side),)
    else:
        for side in (*SIDES, 224, 299):
            yield (torch.randn(2, 3, side, side),)


def _timm_inputs(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    made_for: Any = model.default_cfg
    channels, height, width = made_for["input_size"]
    for side in SIDES if not made_for.get("fixed_input_size") else ():
        if side < height:
            yield (torch.randn(2, channels, side, side),)
    yield (torch.randn(2, channels, height, width),)


def listed() -> dict[str, int]:
    """What models.json holds, name and parameters: torchvision's models but quantized ones, the smallest of every timm module."""
    models = load_library("torchvision").models
    found = {}
    for kind in (models, models.segmentation, models.optical_flow, models.video, models.detection):
        for name in models.list_models(module=kind):
            own = f"{name}{BACKBONE}" if kind is models.detection else name
            found[f"torchvision:{own}"] = _size(_torchvision(own))
    registry = load_library("timm.models._registry")
    smallest: dict[str, tuple[int, str]] = {}
    for name in load_library("timm").list_models():
        try:
            with torch.device("meta"):
                size = _size(registry.model_entrypoint(name)(pretrained=False))
        except Exception:  # a few read numbers off their tensors while they are built
            continue
        family = registry._model_to_module[name]
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return found | {f"timm:{name}": size for size, name in smallest.values()}


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    LIST.write_text(json.dumps(listed(), indent=1) + "\n", encoding="utf-8")
