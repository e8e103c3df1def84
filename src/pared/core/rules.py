"""Weight rules: limits on what a weight may be, as PyTorch parametrizations, and `bake`, which ends them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class WeightRule(nn.Module):
    """Base of the parametrizations that pared puts on weights, and that `bake` takes off again."""


class Mask(WeightRule):
    """A weight rule that holds some entries of a tensor at exactly zero.

    The mask multiplies the weight wherever it is read, so no optimiser state (momentum, weight decay, Adam) can revive an entry.

    Args:
        keep: boolean tensor of the weight's shape; False entries are zero.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> add_rule(layer, "weight", Mask(torch.tensor([[True, False]])))
    >>> layer.weight[0, 1].item()
    0.0
    """

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        if keep.dtype != torch.bool:
            raise TypeError(f"a mask must be a boolean tensor, got {keep.dtype}")
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` with the removed entries set to zero (`where`, so that an infinite entry can't leak through as NaN)."""
        return torch.where(self.keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Accept a new value for the weight; the removed entries stay zero."""
        return self.forward(weight)


def add_rule(module: nn.Module, name: str, rule: nn.Module) -> None:
    """Put `rule` on parameter `name` of `module`; rules stack, and a mask replaces nothing that stands before it."""
    if parametrize.is_parametrized(module):
        _own_class(module)
    parametrize.register_parametrization(module, name, rule)


def find_rule(module: nn.Module, name: str, kind: type[nn.Module]) -> nn.Module | None:
    """The last rule of type `kind` on parameter `name` of `module`, or None."""
    if not parametrize.is_parametrized(module, name):
        return None
    rules = [rule for rule in _parametrizations(module)[name] if isinstance(rule, kind)]
    return rules[-1] if rules else None


def bake(model: nn.Module) -> nn.Module:
    """End all weight rules of `model` in place: plain parameters are left that happen to obey them.

    Parametrizations of the model's author, such as weight norm, are left alone unless a rule of pared stands on the same weight.

    Returns:
        The same model, without pared's parametrizations: its class, its state_dict names and its outputs are those of a plain network.

    >>> layer = nn.Linear(2, 2)
    >>> add_rule(layer, "weight", Mask(torch.eye(2, dtype=torch.bool)))
    >>> sorted(bake(layer).state_dict())
    ['bias', 'weight']
    """
    values: dict[int, tuple[Tensor, Tensor]] = {}  # of tied weights, which become plain at the first and aren't to be ruled once more
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        rules = _parametrizations(module)
        for name in list(rules):
            if any(isinstance(rule, WeightRule) for rule in rules[name]):
                original = rules[name].original
                value = values.setdefault(id(original), (original, getattr(module, name).detach().clone()))[1]
                drop_rules(module, name)
                if isinstance(original, nn.Parameter) and getattr(module, name) is original:
                    original.data = value
    return model


def drop_rules(module: nn.Module, name: str) -> None:
    """End the rules on one parameter of a module: a plain parameter with its present value is left."""
    _own_class(module)
    trainable = _parametrizations(module)[name].original.requires_grad
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    getattr(module, name).requires_grad_(trainable)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: PyTorch makes one for it, which deep copies share and later changes would alter."""
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))  # pyright: ignore[reportAttributeAccessIssue]


def _parametrizations(module: nn.Module) -> Any:
    """The parametrizations of a module by parameter; torch types them as a bare module."""
    return module.parametrizations
