"""The layers whose weights can be masked, and the masks on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.core.errors import SettingsError
from pared.core.layers import Layer, readers, stored, weight_names
from pared.core.problems import Problems
from pared.core.rules import Mask, add_rule, find_rule


def prunable(model: nn.Module, leave: tuple[str, ...] = (), where: str = "prune.weights") -> dict[str, Layer]:
    """The convolutions and linear layers of `model` by path, without those in `leave`; a shared weight is listed once.

    Args:
        model: any module.
        leave: paths of modules that are left out, with all that is inside them.
        where: the method, for messages.

    Raises:
        SettingsError: for an unknown path in `leave`, no layer at all, or a weight that is computed from other parameters.

    >>> list(prunable(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), leave=("2",)))
    ['0']
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    problems = Problems(where)
    for path in leave:
        problems.check(path in paths and path != "", "leave", "the path of a module of the model", path)
    problems.raise_if_any()
    left = {id(stored(owner, name)) for path in leave for owner in paths[path].modules() for name in weight_names(owner)}
    layers: dict[str, Layer] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, Layer) or any(path == name or path.startswith(f"{name}.") for name in leave):
            continue
        if stored(layer, "weight") is None:
            raise SettingsError(
                f"{where}: {path}.weight is computed from other parameters (weight_norm, spectral_norm or the like) and can't be "
                f"masked. Take that off first (torch.nn.utils.parametrize.remove_parametrizations), or add it to leave: [{path}]."
            )
        if id(stored(layer, "weight")) not in left:
            left.add(id(stored(layer, "weight")))
            layers[path] = layer
    if not layers:
        raise SettingsError(f"{where}: {type(model).__name__} has no convolution or linear layer to prune.")
    return layers


def alive(layer: Layer) -> Tensor:
    """The weights that no mask has removed: a boolean tensor of the weight's shape."""
    mask = find_rule(layer, "weight", Mask)
    return mask.keep.clone() if isinstance(mask, Mask) else torch.ones_like(layer.weight, dtype=torch.bool)


def set_mask(model: nn.Module, layer: Layer, keep: Tensor) -> Mask:
    """Put one mask on the weight wherever the model reads it, or narrow the mask that is there."""
    existing = find_rule(layer, "weight", Mask)
    if isinstance(existing, Mask):
        existing.keep &= keep
        return existing
    mask = Mask(keep)
    for _, owner, name in readers(model, layer):
        add_rule(owner, name, mask)
    return mask


def set_weight(layer: Layer, weight: Tensor) -> None:
    """Write the parameter behind the layer's weight, in place."""
    parameter = stored(layer, "weight")
    assert parameter is not None
    with torch.no_grad():
        parameter.copy_(weight)


def swap_rule(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put rule `new` in the place of rule `old`, wherever it stands."""
    for rules in model.modules():
        if isinstance(rules, parametrize.ParametrizationList):
            for at, rule in enumerate(rules):
                if rule is old:
                    rules[at] = new
