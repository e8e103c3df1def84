"""Fold batch norms into the layers of a model as it is, instead of into its graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils import _pytree as pytree

from pared.core.layers import Layer
from pared.graph.capture import Inputs, as_inputs, capture, training_mode
from pared.graph.fold import argument, can_fold, folded, packet, read
from pared.graph.record import module_path


def fold_layers(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> nn.Module:
    """Return a copy of `model` with its batch norms folded into the layers before them; an `nn.Identity` takes the place of each.

    What is folded is what `fold_batch_norm` folds, where both are torch's own modules: the model keeps its class, and its outputs in
    eval mode stay the same but for rounding. In training mode the copy has no batch norm there any more. A model whose forward asks
    something of a norm that an identity doesn't have comes back as it was.

    Args:
        model: any module.
        example_inputs: a tensor or a tuple of positional inputs.

    Raises:
        ModelError: if the model can't run on the example inputs.
        CaptureError: if `torch.export` can't follow the forward.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> type(fold_layers(model, torch.zeros(2, 3, 5, 5))[1]).__name__
    'Identity'
    """
    result = copy.deepcopy(model)
    graph = capture(result, example_inputs).module
    modules = dict(result.named_modules(remove_duplicate=False))
    for node in graph.graph.nodes:
        if packet(node) is not torch.ops.aten.batch_norm or not can_fold(graph, node):
            continue
        norm, layer = modules.get(module_path(node)), layer_of(graph, result, argument(node, 0))
        if norm is result or layer is None or not isinstance(norm, _BatchNorm) or not _plain(norm):
            continue
        _fold(layer, norm)
        drop_norm(result, norm)
    try:
        evaluated(result, as_inputs(example_inputs))
    except Exception:  # whatever the forward missed
        return copy.deepcopy(model)
    return result


def drop_norm(model: nn.Module, norm: nn.Module) -> None:
    """Put an identity in the place of a norm, under all names that it has, in place."""
    identity = nn.Identity().train(norm.training)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is norm:
                setattr(module, name, identity)


def evaluated(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs of a model in eval mode, those that are numbers with a fraction."""
    with training_mode(model, False), torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def layer_of(graph: fx.GraphModule, model: nn.Module, node: fx.Node) -> Layer | None:
    """The module of `model` whose own weight (and bias) an operator of its captured graph reads, or None.

    Args:
        graph: `capture(model, …).module`, or one that reads the same parameters.
        model: whose layers are looked for.
        node: a convolution or linear operator of the graph.
    """
    sources = [source for source in node.args[1:3] if source is not None]
    if not sources or not all(isinstance(source, fx.Node) and source.op == "get_attr" for source in sources):
        return None
    tensors = [read(graph, str(source.target)) for source in sources if isinstance(source, fx.Node)]
    for layer in model.modules():
        own = layer._parameters
        if isinstance(layer, Layer) and own.get("weight") is tensors[0] and own.get("bias") is (tensors[1] if tensors[1:] else None):
            return layer
    return None


def _plain(norm: nn.Module) -> bool:
    """Whether the module computes what torch's norm does: one with an activation inside doesn't."""
    return type(norm).forward is _BatchNorm.forward and not norm._forward_hooks and not norm._forward_pre_hooks


def _fold(layer: Layer, norm: _BatchNorm) -> None:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    groups = layer.groups if isinstance(layer, _ConvTransposeNd) else None
    with torch.no_grad():
        weight, bias = folded(layer.weight, layer.bias, (norm.weight, norm.bias, mean, var), norm.eps, groups)
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
        else:
            layer.bias = nn.Parameter(bias, layer.weight.requires_grad)
