"""Weights that share their values: the rule that holds them together while the values are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.core.layers import Layer, readers, stored
from pared.core.rules import Mask, WeightRule, add_rule


class Shared(WeightRule):
    """A weight rule under which all weights of a cluster are one number, and some are exactly zero.

    The parameter behind the weight is the table of shared values, shape (clusters,): it is what an optimiser sees. The gradient of a
    shared value is the sum over its weights (Deep Compression, 1510.00149, equation 3), added up in 32 bits at least. Which weight
    belongs to which cluster is fixed. Training plans apply no weight decay to the table, which has a single axis.

    Args:
        index: whole numbers of the weight's shape: 0 holds a weight at zero, i gives it the i-th shared value. Every cluster from 1
            to the largest must have a weight.

    Raises:
        TypeError: if `index` doesn't hold whole numbers.

    >>> layer = nn.Linear(3, 1, bias=False)
    >>> layer.weight = nn.Parameter(torch.tensor([[1.0, 3.0, 9.0]]))
    >>> add_rule(layer, "weight", Shared(torch.tensor([[1, 1, 0]])))
    >>> layer.weight.tolist()
    [[2.0, 2.0, 0.0]]
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> layer.parametrizations.weight.original.grad.tolist()
    [2.0]
    """

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"the clusters of weights must be whole numbers, got {index.dtype}")
        self.register_buffer("index", index.to(torch.int32))
        self.clusters = int(index.max()) if index.numel() else 0

    def forward(self, values: Tensor) -> Tensor:
        """Return the weight, from the shared values."""
        if values.dim() > 1:  # of tied weights, `bake` makes the parameter whole at the first, and the others find it so
            return values
        wide = values.to(torch.promote_types(values.dtype, torch.float32))  # 16 bits can't add up thousands of gradients
        table = torch.cat([wide.new_zeros(1), wide])
        return table.index_select(0, self.index.flatten()).view(self.index.shape).to(values.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Accept a new value for the weight: each cluster takes the mean of its weights, zeros stay zero."""
        values, index = weight.detach().double().flatten(), self.index.flatten().long()
        sums = values.new_zeros(self.clusters + 1)
        # as distances from the least, so that the mean of equal weights is that number to the last bit
        least = sums.scatter_reduce(0, index, values, "amin", include_self=False)
        counts = torch.bincount(index, minlength=len(sums)).clamp(min=1)
        return (least + sums.index_add(0, index, values - least[index]) / counts)[1:].to(weight.dtype)


def share(model: nn.Module, layer: Layer, rule: Shared) -> None:
    """Put `rule` on the weight of `layer` wherever the model reads it, in the place of its masks, in place."""
    weight = layer.weight.detach().clone()
    parameter = _replace_rules(model, layer, rule)
    parameter.data = rule.right_inverse(weight)


def unshare(model: nn.Module, layer: Layer, rule: Shared) -> None:
    """Undo `share`, in place: the weight has its present values, each trained by itself, and a mask where it is held at zero."""
    weight, mask = layer.weight.detach().clone(), Mask(rule.index != 0)
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList) and any(each is rule for each in module):
            _only(module, mask)
    parameter = stored(layer, "weight")
    assert parameter is not None
    parameter.data, parameter.grad = weight, None


def _replace_rules(model: nn.Module, layer: Layer, rule: Shared) -> nn.Parameter:
    parameter = stored(layer, "weight")
    assert parameter is not None
    for _, owner, name in readers(model, layer):
        if not parametrize.is_parametrized(owner, name):
            add_rule(owner, name, Mask(torch.ones_like(parameter, dtype=torch.bool)))  # keeps the parameter as it is, also a tied one
        assert isinstance(owner.parametrizations, nn.ModuleDict)
        _only(owner.parametrizations[name], rule)
    parameter.grad = None
    return parameter


def _only(rules: nn.Module, rule: WeightRule) -> None:
    assert isinstance(rules, parametrize.ParametrizationList)
    rules[0] = rule
    del rules[1:]
