"""The layers that multiply by a weight: which modules share it, and what it looks like as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.core.rules import Mask

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def stored(module: nn.Module, name: str, *rules: type[nn.Module]) -> nn.Parameter | None:
    """The parameter behind `name`, or None if the tensor is computed from others by anything else than masks and `rules`."""
    if parametrize.is_parametrized(module, name):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        found = module.parametrizations[name]
        own = isinstance(found, parametrize.ParametrizationList) and all(isinstance(rule, (Mask, *rules)) for rule in found)
        return found.original if own and isinstance(found.original, nn.Parameter) else None
    return module._parameters.get(name)


def compressible(
    model: nn.Module, leave: tuple[str, ...], where: str, behind: Callable[[nn.Module, str], nn.Parameter | None] = stored
) -> dict[str, Layer]:
    """The convolutions and linear layers of `model` by path, without those in `leave`; a shared weight is listed once, an empty one not.

    Args:
        model: any module.
        leave: paths of modules that are left out, with all that is inside them.
        where: the method as recipes name it, for messages; its family is what it does to layers.
        behind: the parameter behind a tensor of a module, or None for one that the method can't take.

    Raises:
        SettingsError: for an unknown path in `leave`, no layer at all, or a weight that is computed from other parameters.

    >>> list(compressible(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ("2",), "prune.weights"))
    ['0']
    """
    paths = paths_with(model, leave, where)
    seen = {id(behind(owner, name)) for path in leave for owner in paths[path].modules() for name in weight_names(owner)}
    layers: dict[str, Layer] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, Layer) or any(path == name or path.startswith(f"{name}.") for name in leave):
            continue
        parameter = behind(layer, "weight")
        if parameter is None:
            name = path or "the model"
            raise SettingsError(
                f"{where}: {name}.weight is computed from other parameters (weight_norm, spectral_norm, or quantization already). Take "
                f"that off first (pared.bake, or torch.nn.utils.parametrize.remove_parametrizations), or add it to leave: [{path}]."
            )
        if id(parameter) not in seen and parameter.numel():
            seen.add(id(parameter))
            layers[path] = layer
    if not layers:
        verb = where.partition(".")[0]
        raise SettingsError(f"{where}: {type(model).__name__} has no convolution or linear layer to {verb}.")
    return layers


def paths_with(model: nn.Module, leave: Collection[str], where: str) -> dict[str, nn.Module]:
    """All modules of `model` by path, a module that stands in several places under each of them.

    Raises:
        SettingsError: for a path in `leave` that isn't among them; `where` is the method's name.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    problems = Problems(where)
    for path in leave:
        problems.check(path in paths and path != "", "leave", "the path of a module of the model", path)
    problems.raise_if_any()
    return paths


def readers(model: nn.Module, layer: Layer) -> list[tuple[str, nn.Module, str]]:
    """The modules of `model` that read the layer's weight, with their paths and the name that it has there; tied layers are several."""
    parameter = stored(layer, "weight")
    found = []
    for path, owner in model.named_modules():
        if not isinstance(owner, parametrize.ParametrizationList):
            found += [(path, owner, name) for name in list(weight_names(owner)) if stored(owner, name) is parameter]
    return found


def weight_names(module: nn.Module) -> Iterator[str]:
    """The names of a module's own parameters, those under a parametrization among them."""
    yield from module._parameters
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        yield from module.parametrizations


def split_weight(layer: Layer, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape with its axes told apart: shape (groups, outputs, inputs, positions of the kernel).

    Outputs and inputs are those of one group.

    >>> import torch
    >>> split_weight(nn.Conv2d(4, 2, 3, groups=2), torch.zeros(2, 2, 3, 3)).shape
    torch.Size([2, 1, 2, 9])
    """
    positions = tensor.shape[2:].numel()
    if isinstance(layer, _ConvTransposeNd):
        return tensor.reshape(layer.groups, inputs_of_group(layer), tensor.shape[1], positions).transpose(1, 2)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return tensor.reshape(groups, tensor.shape[0] // groups, tensor.shape[1], positions)


def join_weight(layer: Layer, split: Tensor) -> Tensor:
    """The way back from `split_weight`: a tensor of the weight's shape."""
    return (split.transpose(1, 2) if isinstance(layer, _ConvTransposeNd) else split).reshape(layer.weight.shape)


def inputs_of_group(layer: Layer) -> int:
    """Input channels of each group."""
    return layer.weight.shape[0] // layer.groups if isinstance(layer, _ConvTransposeNd) else layer.weight.shape[1]
