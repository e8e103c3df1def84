"""Imported once, by the process from which the workers are forked: none of them pays for the imports."""

import contextlib

import onnxscript  # noqa: F401

import pared.lab.coverage.worker  # noqa: F401
from pared.core.errors import ModelError
from pared.lab.libraries import load_library

with contextlib.suppress(ModelError):  # the worker will say so
    for library in ("torchvision", "timm"):
        load_library(library)
with contextlib.suppress(ImportError):
    import torch_pruning  # noqa: F401
