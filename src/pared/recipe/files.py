"""The smaller files of a run: weights to train on with, counts by layer, and on what machine it ran."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import pared
from pared.core.files import atomic_path
from pared.graph import Counts
from pared.training import Machine


def save_weights(model: nn.Module, path: Path, described: dict[str, str]) -> None:
    """Write all parameters and persistent buffers as safetensors, to go on training from without a pickle.

    The metadata has one entry, "architecture", in JSON: "modules" lists every module with its class and settings, "shared" the further
    names of tensors that have several (they are written once). One entry, because safetensors writes several in random order.

    Args:
        model: a baked network.
        path: the file.
        described: further entries of that JSON.

    Raises:
        RunError: if the file can't be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    owners: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in owners:
            shared[name] = owners[key]
            continue
        owners[key] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    modules = [
        {"path": name, "class": f"{type(module).__module__}.{type(module).__qualname__}", "settings": _settings(module)}
        for name, module in model.named_modules()
    ]
    architecture = json.dumps({**described, "modules": modules, "shared": shared, "pared": pared.__version__})
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"architecture": architecture})
        except Exception as error:
            # safetensors reports a full disk with an exception of its own
            raise OSError(str(error)) from error


def layers(counts: Counts) -> list[dict[str, Any]]:
    """Parameters and multiply-adds of every layer that has any, for the report."""
    return [{"path": each.path, "params": each.params, "macs": each.macs} for each in counts.modules if each.params or each.macs]


def environment(machine: Machine) -> dict[str, Any]:
    """What a measured number depends on: versions, processor, threads, and the day."""
    versions = {name: metadata.version(name) for name in ("torch", "onnx", "onnxruntime", "numpy")}
    return {
        "pared": pared.__version__,
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "training threads": torch.get_num_threads(),
        "training device": machine.device.type,
        "precision": machine.precision,
        "date": datetime.date.today().isoformat(),
    }


def _settings(module: nn.Module) -> str:
    # a graph's own description is its whole code; layers say theirs in one line
    return module.extra_repr() if type(module).__module__.startswith("torch.nn.modules") else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")
