"""Fold batch norms into layers whose weights are on a grid, so that the folded weights are on a grid too."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from pared.core.errors import ModelError
from pared.core.layers import Layer
from pared.core.rules import bake, drop_rules
from pared.graph import Staged
from pared.graph.capture import Inputs, as_inputs, capture, training_mode
from pared.graph.fold import argument, fold_batch_norm, folded, packet, read
from pared.graph.fold_layers import drop_norm, evaluated
from pared.quantize.rate_grid import RateGrid
from pared.quantize.weight_grid import DoReFaGrid, FixedGrid, scale_outputs

GridRule: TypeAlias = FixedGrid | DoReFaGrid | RateGrid

_TOLERANCE = 1e-3
"""Of the largest output."""


def fold_norms(model: nn.Module, inputs: Inputs, rules: Mapping[str, GridRule]) -> nn.Module:
    """Return `model` with batch norms folded into the layers before them, as `graph.fold_batch_norm` does, or as it is.

    The grid of an output is multiplied by the factor that its weights are multiplied by, so the integers stay the same. A folded
    norm leaves an `nn.Identity` in its place, and a layer without bias gets one; the class of the network stays. Where the forward can't
    be captured, or doesn't give the same outputs without its norms, nothing is folded.

    The stages and heads of a network with exits are folded one by one.

    Args:
        model: with rules on its weights; only a network with exits is changed, whose parts are replaced.
        inputs: an example.
        rules: on the weights of layers, by the layers' paths.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return model
    if isinstance(model, Staged):
        return _staged(model, inputs, rules)
    try:
        graph = capture(bake(copy.deepcopy(model)), inputs).module
    except ModelError:  # CaptureError among it
        return model
    without = fold_batch_norm(graph)
    candidate = copy.deepcopy(model)
    pairs = [(layer, norm, node) for layer, norm, node in _pairs(graph, without) if layer in rules and _is_norm(candidate, norm)]
    for path, norm, node in pairs:
        layer = candidate.get_submodule(path)
        assert isinstance(layer, Layer)
        _fold(layer, _factor(graph, node), read(without, f"{path}.bias".lstrip(".")))
        drop_norm(candidate, candidate.get_submodule(norm))
    return candidate if pairs and _same(model, candidate, inputs) else model


def _staged(network: Any, inputs: Inputs, rules: Mapping[str, GridRule]) -> nn.Module:
    def part(name: str, inputs: Inputs) -> nn.Module:
        inner = {path.removeprefix(f"{name}."): rule for path, rule in rules.items() if path.startswith(f"{name}.")}
        return fold_norms(network.get_submodule(name), inputs, inner)

    for index in range(len(network.stages)):
        network.stages[index] = part(f"stages.{index}", inputs)
        with training_mode(network.stages[index], False), torch.no_grad():
            inputs = as_inputs(network.stages[index](*inputs))
        network.heads[index] = part(f"heads.{index}", inputs)
    return network


def _pairs(graph: fx.GraphModule, without: fx.GraphModule) -> Iterator[tuple[str, str, fx.Node]]:
    """The paths of layers and of the norms that were folded into them, and the norms' nodes."""
    left = set(without.state_dict())
    for node in graph.graph.nodes:
        layer: Any = argument(node, 0)
        mean: Any = argument(node, 3)
        if packet(node) is torch.ops.aten.batch_norm and mean is not None and str(mean.target) not in left:
            yield str(layer.args[1].target).rpartition(".")[0], str(mean.target).rpartition(".")[0], node


def _is_norm(model: nn.Module, path: str) -> bool:
    modules = dict(model.named_modules(remove_duplicate=False))
    return path != "" and isinstance(modules.get(path), nn.modules.batchnorm._BatchNorm)


def _factor(graph: fx.GraphModule, norm: fx.Node) -> Tensor:
    """What each output is multiplied by, shape (outputs,)."""
    sources: Any = norm.args[1:5]
    parts: Any = [None if source is None else read(graph, str(source.target)) for source in sources]
    ones = torch.ones(len(parts[2]), 1, dtype=torch.float64, device=parts[2].device)
    return folded(ones, None, tuple(parts), argument(norm, 7))[0][:, 0].detach()


def _fold(layer: Layer, factor: Tensor, bias: Tensor) -> None:
    rules: Any = layer.parametrizations
    parameter: nn.Parameter = rules["weight"].original
    rule = next(rule for rule in rules["weight"] if isinstance(rule, GridRule))
    if isinstance(rule, FixedGrid):
        with torch.no_grad():
            parameter.copy_(scale_outputs(layer, parameter, factor))
    rule.follow(layer, factor)
    if parametrize.is_parametrized(layer, "bias"):
        drop_rules(layer, "bias")
    trainable = parameter.requires_grad if layer.bias is None else layer.bias.requires_grad
    layer.bias = nn.Parameter(bias.detach().clone(), trainable)


def _same(model: nn.Module, candidate: nn.Module, inputs: Inputs) -> bool:
    """Whether both give the same outputs in eval mode, up to rounding."""
    try:
        ours, theirs = (evaluated(network, inputs) for network in (model, candidate))
    except Exception:  # the forward reads something of a norm that an identity doesn't have
        return False
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return False
    return all(bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) for a, b in zip(ours, theirs, strict=True) if a.numel())
