"""Libraries of networks that experiments take theirs from."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from pared.core.errors import ModelError


def load_library(name: str) -> Any:
    """Import torchvision or timm; beside a torch that torchvision wasn't built for, its operators are declared first.

    Raises:
        ModelError: if it isn't installed.
    """
    try:
        _declare_operators()
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"This experiment needs {name}, which can't be imported ({error}). Run: pip install torchvision timm") from None


_declared: list[torch.library.Library] = []


def _declare_operators() -> None:
    """Detection operators by name only: importing torchvision asks for them, no model of the lab calls them."""
    if _declared or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        import torchvision  # noqa: F401
    except ImportError:
        raise
    except RuntimeError:  # its binary doesn't fit this torch
        import sys

        for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for operator in ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
            library.define(f"{operator}(Tensor input) -> Tensor")
            library.define(f"_{operator}_backward(Tensor input) -> Tensor")
        _declared.append(library)
