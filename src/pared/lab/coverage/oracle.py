"""Is a cut network right? Asked without the cutting code, nor any bookkeeping of it.

All parameters of the original have distinct values. So the values that are left in the cut network say which entries were kept. The
reference is the original network with every other entry set to zero: what computes a removed neuron, and what reads it. Norms over a
cut axis take their statistics over the kept channels. A cut is right if it computes what the reference computes.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the largest output; some forwards have steps of float32 in float64 too


class NotComparable(Exception):
    """The cut network doesn't consist of the original's values."""


@dataclass(frozen=True)
class Comparison:
    """How two networks' outputs compare.

    Attributes:
        equal: within the tolerance, for all batches.
        error: the largest difference relative to the largest output.
        variation: how much the reference's outputs vary over inputs, in the same unit; an output that doesn't vary can't show an error.
        finite: whether the cut network's outputs are.
        shapes: whether all outputs have the same shapes.
        precision: "float64", or "float32" where a forward can't do the former.
    """

    equal: bool
    error: float
    variation: float
    finite: bool
    shapes: bool
    precision: str


def survivors(original: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """For every parameter of the original that lost entries: which entries are left (bool, of the original's shape).

    Raises:
        NotComparable: if a parameter is missing or holds values that the original doesn't have.
    """
    left = dict(small.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name, before in original.named_parameters():
        after = left.get(name)
        if after is None:
            raise NotComparable(f"the parameter {name} is gone")
        if after.shape == before.shape and torch.equal(before, after):
            continue
        if before.dtype is not torch.float32 or before.numel() == 1:
            raise NotComparable(f"the parameter {name} changed, but its values aren't distinct")
        alive = torch.isin(before.detach(), after.detach())
        if int(alive.sum()) != after.numel():
            raise NotComparable(f"the parameter {name} holds values that the original doesn't have")
        if not bool(alive.all()):
            found[name] = alive
    return found


def reference(original: nn.Module, alive: dict[str, Tensor]) -> nn.Module:
    """The original with all that isn't alive set to zero, and statistics of norms and standardised weights over what is."""
    model = copy.deepcopy(original)
    for name, parameter in model.named_parameters():
        if name in alive:
            parameter.data *= alive[name]
    for path, module in list(model.named_modules()):
        left = alive.get(f"{path}.weight")
        if left is not None:
            parent, _, leaf = path.rpartition(".")
            owner = model.get_submodule(parent)
            if left.dim() == 1 and _is_norm(module):
                owner._modules[leaf] = _NormOfSome(module, left.nonzero().reshape(-1))
            elif "Std" in type(module).__name__ and getattr(module, "groups", 0) > 0:
                owner._modules[leaf] = _StandardisedOfSome(module, left)
    return model


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or "RmsNorm" in type(module).__name__


class _NormOfSome(nn.Module):
    """A norm that looks at some channels only; zero elsewhere."""

    def __init__(self, norm: Any, index: Tensor) -> None:
        super().__init__()
        self.norm: Any = copy.deepcopy(norm)
        self.index = index
        count = norm.weight.numel()
        for name in ("weight", "bias"):
            if getattr(norm, name, None) is not None:
                setattr(self.norm, name, nn.Parameter(getattr(norm, name).detach()[index]))
        if isinstance(norm, nn.GroupNorm):
            self.norm.num_groups = len(set((index // (count // norm.num_groups)).tolist()))
            self.norm.num_channels = len(index)
        else:
            self.norm.normalized_shape = (len(index),)
        self.axis = 1 if isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__ else -1

    def forward(self, x: Tensor) -> Tensor:
        return _spread(self.norm(x.index_select(self.axis, self.index)), self.index, x.shape[self.axis], self.axis)


class _StandardisedOfSome(nn.Module):
    """A convolution that standardises its weights, with some inputs and outputs only; zero elsewhere."""

    def __init__(self, layer: Any, alive: Tensor) -> None:
        super().__init__()
        self.layer: Any = copy.deepcopy(layer)
        self.count = len(alive)
        blocks, width = alive.chunk(layer.groups), alive.shape[1]
        rows = [block.flatten(1).any(1) for block in blocks]
        columns = [block.transpose(0, 1).flatten(1).any(1) for block in blocks]
        kept = [number for number, row in enumerate(rows) if row.any()]
        self.rows = torch.cat(rows).nonzero().reshape(-1)
        self.columns = torch.cat([columns[number].nonzero().reshape(-1) + number * width for number in kept])
        for name, parameter in layer.named_parameters(recurse=False):
            parts = [part.detach()[row] for part, row in zip(parameter.chunk(layer.groups), rows, strict=True)]
            if name == "weight":
                parts = [part[:, column] for part, column in zip(parts, columns, strict=True)]
            setattr(self.layer, name, nn.Parameter(torch.cat([parts[number] for number in kept])))
        self.layer.groups, self.layer.in_channels, self.layer.out_channels = len(kept), len(self.columns), len(self.rows)

    def forward(self, x: Tensor) -> Tensor:
        return _spread(self.layer(x.index_select(1, self.columns)), self.rows, self.count, 1)


def _spread(x: Tensor, index: Tensor, count: int, axis: int) -> Tensor:
    """Put slices at their places on an axis of `count`, zero between them."""
    shape = list(x.shape)
    shape[axis] = count
    return x.new_zeros(shape).index_copy(axis, index, x)


def compare(left: nn.Module, right: nn.Module, batches: list[tuple[Any, ...]]) -> Comparison:
    """Compare the reference `left` with the cut network `right`, in float64 where their forwards can.

    A forward that rounds to a shorter type on its way, as some norms do, is held to the tolerance of float32, in which sums over fewer
    terms round otherwise.
    """
    try:
        ours, theirs = copy.deepcopy(left).double(), copy.deepcopy(right).double()
        with _Shorter() as seen:
            found = _compare(ours, theirs, batches, torch.float64)
    except Exception:  # whatever a forward that fixes float32 may raise
        return _compare(left, right, batches, torch.float32)
    if not seen.any or not found.shapes:
        return found
    equal = found.finite and found.error <= TOLERANCES[torch.float32]
    return dataclasses.replace(found, equal=equal, precision="float64 with float32 on the way")


class _Shorter(TorchDispatchMode):
    """Notices floating-point results shorter than float64."""

    any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, list | tuple) else [result]
        self.any = self.any or any(isinstance(x, Tensor) and x.is_floating_point() and x.element_size() < 8 for x in parts)
        return result


def _compare(left: nn.Module, right: nn.Module, batches: list[tuple[Any, ...]], dtype: torch.dtype) -> Comparison:
    error, variation, finite = 0.0, 0.0, True
    precision = str(dtype).removeprefix("torch.")
    for batch in batches:
        batch = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch)
        with torch.no_grad():
            ours, theirs = outputs(left, batch), outputs(right, batch)
        if [x.shape for x in ours] != [x.shape for x in theirs]:
            return Comparison(False, float("inf"), variation, finite, False, precision)
        for a, b in zip(ours, theirs, strict=True):
            finite = finite and bool(torch.isfinite(b).all())
            scale = max(float(a.abs().max()), torch.finfo(a.dtype).tiny)
            difference = float((a - b).abs().max()) / scale
            error = max(error, difference if difference == difference else float("inf"))
            variation = max(variation, float((a - a[:1]).abs().max()) / scale)
    return Comparison(error <= TOLERANCES[dtype] and finite, error, variation, finite, True, precision)


def outputs(model: nn.Module, batch: tuple[Any, ...]) -> list[Tensor]:
    """All floating-point tensors that a model returns, in order."""
    copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in batch)
    return [x for x in pytree.tree_leaves(model(*copies)) if isinstance(x, Tensor) and x.is_floating_point()]
