"""Masks on the weights of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.core.layers import Layer, readers, stored
from pared.core.rules import Mask, add_rule, find_rule


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
