"""pared cuts a trained PyTorch network down to fit a device, and measures the file that it hands back.

The public names are listed once, below; each is imported when it is first used, so that `import pared` is instant.

>>> import pared
>>> pared.Recipe(pared.prune.Neurons(keep=0.5), pared.quantize.Int8()).steps[0].keep
0.5
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PACKAGES = (
    "architecture",
    "codec",
    "data",
    "distill",
    "dynamic",
    "graph",
    "measure",
    "prune",
    "quantize",
    "recipe",
    "report",
    "runtime",
    "training",
)
_NAMES = {
    "Accuracy": "training",
    "Budget": "recipe",
    "CaptureError": "core.errors",
    "DataError": "core.errors",
    "FileError": "core.errors",
    "Journal": "training",
    "Machine": "training",
    "Method": "core.method",
    "ModelError": "core.errors",
    "ParedError": "core.errors",
    "Recipe": "core.method",
    "Result": "recipe",
    "RunError": "core.errors",
    "SettingsError": "core.errors",
    "Task": "training",
    "Train": "training",
    "TrainingError": "core.errors",
    "WeightsError": "core.errors",
    "bake": "core.rules",
    "compress": "recipe",
    "evaluate": "training",
    "fit": "training",
    "load": "runtime",
}
__all__ = sorted(["__version__", *_PACKAGES, *_NAMES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _PACKAGES:
        return import_module(f"pared.{name}")
    if name in _NAMES:
        return getattr(import_module(f"pared.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'pared' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
