"""What is done to a network after rate-aware training: norms folded, dead neurons removed, all of it still on its grids."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.core.errors import ModelError
from pared.core.layers import Layer
from pared.core.rules import Mask, add_rule, bake, find_rule
from pared.graph import Staged
from pared.graph.capture import Inputs
from pared.graph.constants import fold_constants
from pared.graph.cutting import cut_model
from pared.graph.silence import silent_neurons
from pared.quantize.fold_norms import fold_norms
from pared.quantize.rate_grid import RateGrid, set_grid

_BIAS_STEPS = 64
"""Steps of the grid in the root mean square of biases that norms leave: their error is then small against that of the weights."""

_log = logging.getLogger(__name__)


def without_norms(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Fold batch norms into layers on rate grids, whose outputs get steps of their own; the biases that come of it are put on grids."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Layer)}
    rules = {path: rule for path, layer in layers.items() if isinstance(rule := find_rule(layer, "weight", RateGrid), RateGrid)}
    folded = fold_norms(model, inputs, rules)
    if folded is not model:
        for path in rules:
            layer: Any = folded.get_submodule(path)
            if layer.bias is not None and not parametrize.is_parametrized(layer, "bias") and bool(layer.bias.any()):
                set_grid(folded, layer, "bias", 1 / _BIAS_STEPS)
    return folded


def without_dead(model: nn.Module, inputs: Inputs, leave: tuple[str, ...] = ()) -> nn.Module:
    """Remove dead neurons exactly: what they emit goes into the next biases, then they are cut out; rules go along.

    A bias that leaves its grid by that, because a neuron died in the last steps of the training, stays off it.

    Returns:
        `model` itself where nothing is dead or its graph can't be captured.
    """
    if isinstance(model, Staged):
        return model
    plain = bake(copy.deepcopy(model))
    try:
        cut = cut_model(fold_constants(plain, inputs), inputs, silent_neurons, leave)
    except ModelError as error:  # CaptureError among it
        _log.info("quantize.rate: dead neurons stay, as the network can't be captured: %s", error)
        return model
    if not cut.kept:
        return model
    with torch.no_grad():
        for path, layer in list(model.named_modules()):
            if isinstance(layer, Layer):
                for name in ("weight", "bias"):
                    _carry(layer, cut.model, path, name, cut.kept.get(f"{path}.{name}".lstrip("."), {}))
    return cut.model


def _carry(layer: Layer, model: nn.Module, path: str, name: str, kept: Mapping[int, tuple[int, ...]]) -> None:
    """Put the rules of a parameter of `layer` on what is left of it in `model`."""
    rule = find_rule(layer, name, RateGrid)
    if not isinstance(rule, RateGrid):
        return
    try:
        small: Any = model.get_submodule(path)
    except AttributeError:  # only the graph is left, whose parameters are elsewhere
        return
    if parametrize.is_parametrized(small, name) or not isinstance(small._parameters.get(name), nn.Parameter):
        return  # a shared parameter is done
    weight = small._parameters[name].detach().clone()
    rules: Any = layer.parametrizations
    new = rule.at(weight.requires_grad_(small._parameters[name].requires_grad), gathered(rule.scale().detach(), kept))
    level = gathered(rules[name].original.detach(), kept)
    if not torch.equal(new(level), weight):
        level = new.right_inverse(weight.detach())
    if not torch.equal(new(level), weight):
        return
    mask = find_rule(layer, name, Mask)
    added = [Mask(gathered(mask.keep, kept)), new] if isinstance(mask, Mask) else [new]
    parameter = small._parameters[name]
    for owner in list(model.modules()):
        for own in [own for own, value in owner._parameters.items() if value is parameter]:
            for each in added:
                add_rule(owner, own, each)
    parameter.data = level


def gathered(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """What is left of a tensor of which some axes lose indices; an axis of length 1, along which it doesn't change, stays.

    >>> gathered(torch.arange(6).view(2, 3), {1: (0, 2)}).tolist()
    [[0, 2], [3, 5]]
    """
    for axis, index in kept.items():
        if tensor.dim() and tensor.shape[axis] > 1:
            tensor = tensor.index_select(axis, torch.tensor(index, device=tensor.device))
    return tensor
