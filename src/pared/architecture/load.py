"""A model by its name, with weights from a file."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pared.architecture import nets
from pared.core.errors import ModelError, WeightsError
from pared.data.callables import call, is_callable_spec
from pared.training import check_weights


def load_model(spec: str, *, classes: int, channels: int, size: int, weights: str | Path | None = None) -> nn.Module:
    """Build a model by its name and load its weights.

    Args:
        spec: a name of `pared.architecture.nets`; `timm:NAME`; `hf:NAME`, an image classifier of Hugging Face transformers;
            `package.module:callable` or `path/file.py:callable`, a function that returns a model (`classes`, `channels` and
            `size` are passed to it if it has such parameters).
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels.
        weights: a .safetensors file, or a .pt or .pth file of tensors (no pickled code is run). None: initial weights, except
            that `hf:NAME` comes with its own.

    Returns:
        The model in eval mode.

    Raises:
        ModelError: if there is no such model or it can't be built.
        WeightsError: if the weights can't be read, don't fit, or hold NaN or infinity.

    >>> load_model("lenet300", classes=10, channels=1, size=28).fc3.out_features
    10
    """
    if spec.startswith("timm:"):
        model = _timm(spec.removeprefix("timm:"), classes, channels, size)
    elif spec.startswith("hf:"):
        model = _hugging_face(spec.removeprefix("hf:"), classes, channels, size)
    elif spec in nets.__all__:
        model = getattr(nets, spec)(classes=classes, channels=channels, size=size)
    elif is_callable_spec(spec):
        model = call(spec, {"classes": classes, "channels": channels, "size": size}, ModelError)
        if not isinstance(model, nn.Module):
            raise ModelError(f"{spec}: must return a torch.nn.Module. Got {type(model).__name__}.")
    else:
        forms = f"Known are {', '.join(nets.__all__)}, timm:NAME, hf:NAME, package.module:callable and path/file.py:callable."
        raise ModelError(f"{spec}: no such model.{_near(spec, nets.__all__)} {forms}")
    if weights is not None:
        load_weights(model, weights)
    check_weights(model)
    return (Logits(model) if spec.startswith("hf:") else model).eval()


class Logits(nn.Module):
    """An image classifier of Hugging Face transformers as a function from pixels to scores alone.

    Args:
        classifier: a `…ForImageClassification`.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to (batch, classes)."""
        return self.classifier(images).logits


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of tensors into `model`, in place; names and shapes must fit exactly.

    Args:
        model: as built.
        path: .safetensors, .pt or .pth; the latter may hold a state_dict or a dict with one under "state_dict" or "model".

    Raises:
        WeightsError: if the file can't be read, tensors are missing, unexpected or of another shape, or not all numbers are finite.
    """
    path = Path(path)
    loaded = read_weights(path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    # tied weights are stored once in safetensors: a name is missing only if no other name of the same tensor is there
    for name in _tied_to_stored(model, loaded):
        expected.pop(name)
    missing = [name for name in expected if name not in loaded]
    unexpected = [name for name in loaded if name not in model.state_dict()]
    shaped = [
        f"{name} {tuple(loaded[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in loaded and tuple(loaded[name].shape) != shape
    ]
    mistakes = {"missing": missing, "unexpected": unexpected, "of another shape": shaped}
    problems = [f"{len(names)} {kind}: {_first(names)}." for kind, names in mistakes.items() if names]
    if problems:
        raise WeightsError(f"{path}: the weights don't fit the model. {' '.join(problems)} Choose the model that they were saved from.")
    bad = [name for name, tensor in loaded.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        raise WeightsError(f"{path}: NaN or infinity in {_first(bad)}. Save the weights of a healthy training.")
    model.load_state_dict(loaded, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file by name.

    Raises:
        WeightsError: if it is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file.")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise WeightsError(f"{path}: weights must be a .safetensors, .pt or .pth file.")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        advice = "Save model.state_dict() instead, best as .safetensors."
        raise WeightsError(f"{path}: holds more than tensors, or is damaged. {advice}") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise WeightsError(f"{path}: can't be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}).") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise WeightsError(f"{path}: must hold a state_dict, tensors by name. Save model.state_dict().")
    return content


def _tied_to_stored(model: nn.Module, loaded: dict[str, Tensor]) -> list[str]:
    """Names that aren't in the file, of parameters that are in it under another name."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return [name for names in by_tensor.values() if any(name in loaded for name in names) for name in names if name not in loaded]


def _timm(name: str, classes: int, channels: int, size: int) -> nn.Module:
    try:
        import timm
    except Exception as error:  # not only ImportError: a torchvision that doesn't fit torch raises others
        raise ModelError(f"timm:{name} needs the package timm ({error}): pip install timm") from error
    if not timm.is_model(name):
        raise ModelError(f"timm:{name}: timm has no such model.{_near(name, timm.list_models())}")
    arguments: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    try:
        try:
            return timm.create_model(name, img_size=size, **arguments)
        except TypeError:  # convolutional networks take any size and have no such argument
            return timm.create_model(name, **arguments)
    except Exception as error:
        raise ModelError(f"timm:{name}: {error} (classes={classes}, channels={channels}, size={size}).") from error


def _hugging_face(name: str, classes: int, channels: int, size: int) -> nn.Module:
    try:
        from transformers import AutoModelForImageClassification  # pyright: ignore[reportMissingImports]
    except Exception as error:  # not only ImportError: a torchvision that doesn't fit torch raises others
        raise ModelError(f"hf:{name} needs the package transformers ({error}): pip install transformers") from error
    arguments = {"num_labels": classes, "num_channels": channels, "image_size": size, "ignore_mismatched_sizes": True}
    try:
        return AutoModelForImageClassification.from_pretrained(name, **arguments)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"hf:{name}: {reason}") from error


def _near(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
