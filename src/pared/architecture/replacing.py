"""Layers replaced by chains of others: which may be, and the replacement itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from pared.core.errors import ModelError
from pared.core.layers import paths_with
from pared.training import Task, evaluating


def replaceable(model: nn.Module, kinds: Collection[type[nn.Module]], leave: Collection[str], where: str) -> dict[str, nn.Module]:
    """Layers by path that are of one of the very types `kinds` and that nothing else reads; one that is there several times comes once.

    A subclass may have a forward of its own, a composite module of torch (attention, transformer layers) reads the weights of its layers
    itself, and a weight that another module has too is one for both: all of these are left out, as is what lies in `leave`.

    Raises:
        SettingsError: for a path in `leave` that the model doesn't have; `where` is the method's name.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))
    >>> list(replaceable(model, [nn.Linear], ("0",), "x"))
    ['2']
    """
    paths = paths_with(model, leave, where)
    left = {id(inner) for path in leave for inner in paths[path].modules()}
    return {
        path: layer
        for path, layer in model.named_modules()
        if path != ""
        and type(layer) in kinds
        and id(layer) not in left
        and not _is_composite(paths[path.rpartition(".")[0]])
        and not _is_shared(model, layer)
    }


def replace(model: nn.Module, chains: Mapping[str, nn.Module], task: Task, where: str) -> nn.Module:
    """Put chains in the place of layers, wherever these stand, and return `model` itself.

    Raises:
        ModelError: if it doesn't run any more, because it reads the weight of a replaced layer itself.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    for path, chain in chains.items():
        for other in [other for other, layer in paths.items() if layer is paths[path]]:
            setattr(paths[other.rpartition(".")[0]], other.rpartition(".")[2], chain)
    if not chains:
        return model
    try:
        with torch.random.fork_rng(devices=[]), evaluating(model):
            model.to(task.machine.device)(*task.example_inputs())
    except Exception as error:
        raise ModelError(
            f"{where}: {type(model).__name__} doesn't run with other layers ({error}). It reads the weight of a layer "
            f"itself; name that layer in leave. Replaced were: {', '.join(chains)}."
        ) from error
    return model


def _is_composite(module: nn.Module) -> bool:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, containers)


def _is_shared(model: nn.Module, layer: nn.Module) -> bool:
    """Whether another module holds the layer's weight too (tied weights)."""
    weight = layer._parameters.get("weight")
    return weight is None or sum(weight is other for module in model.modules() for other in module._parameters.values()) > 1
