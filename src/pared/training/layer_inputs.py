"""What a layer multiplies its weights by: the columns of im2col, and their Gram matrix over calibration inputs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pared.core.layers import Layer, readers
from pared.graph.equations import Equations
from pared.training.check import run
from pared.training.evaluate import evaluating

_ELEMENTS = 2**24
"""Columns are made for as many samples at a time as fit into 64 MB."""


def unfold(layer: Layer, inputs: Tensor) -> Tensor:
    """The inputs of every output of a layer: shape (samples and positions, groups, inputs of a group, positions of the kernel).

    With strides, padding of every mode, dilation, groups and transposition: `unfold(x) · weight`, summed over the last two axes, is
    what the layer computes, less its bias.

    Args:
        layer: a linear layer or a convolution.
        inputs: what it is called with; a convolution may be given one sample without a batch axis.

    >>> unfold(nn.Conv2d(4, 2, 3, groups=2, padding=1), torch.zeros(5, 4, 8, 8)).shape
    torch.Size([320, 2, 2, 9])
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, 1, inputs.shape[-1], 1)
    x = inputs if _is_batch(layer, inputs) else inputs[None]
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    equations = _equations(layer)
    rows = equations.rows(x, torch.arange(len(x) * math.prod(_output_sizes(equations, x)), device=x.device))
    patches = rows.transpose(0, 1).unflatten(2, (-1, math.prod(layer.kernel_size)))
    return patches.flip(3) if equations.transposed else patches


def _equations(layer: Layer) -> Equations:
    """Those of a convolution; padding by other values than zero has to be done beforehand."""
    assert isinstance(layer, _ConvNd)
    axes = range(len(layer.kernel_size))
    if isinstance(layer, _ConvTransposeNd):
        edges = [layer.dilation[at] * (layer.kernel_size[at] - 1) - int(layer.padding[at]) for at in axes]
        padding = tuple((edge, edge + layer.output_padding[at]) for at, edge in zip(axes, edges, strict=True))
        return Equations(layer.kernel_size, (1,) * len(axes), padding, layer.dilation, layer.stride, layer.groups, transposed=True)
    sides = layer._reversed_padding_repeated_twice if layer.padding_mode == "zeros" else [0] * (2 * len(axes))
    padding = tuple((sides[2 * at], sides[2 * at + 1]) for at in reversed(axes))
    return Equations(layer.kernel_size, layer.stride, padding, layer.dilation, groups=layer.groups)


def _output_sizes(equations: Equations, x: Tensor) -> list[int]:
    sizes = []
    for at, size in enumerate(x.shape[2:]):
        size = (size - 1) * equations.stretch[at] + 1 if equations.transposed else size
        reach = equations.dilation[at] * (equations.kernel[at] - 1)
        sizes.append((size + sum(equations.padding[at]) - reach - 1) // equations.stride[at] + 1)
    return sizes


def gram_of(layer: Layer, inputs: Tensor, inputs_last: bool = False) -> Tensor:
    """XᵀX of the columns of every group: shape (groups, columns, columns), in double precision.

    Args:
        layer: a linear layer or a convolution.
        inputs: what it is called with.
        inputs_last: columns are (*kernel, inputs) flattened, instead of (inputs, *kernel).

    >>> gram_of(nn.Linear(2, 3), torch.tensor([[1.0, 2.0]])).tolist()
    [[[1.0, 2.0], [2.0, 4.0]]]
    """
    kernel = 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)
    spread = math.prod(layer.stride) if isinstance(layer, _ConvTransposeNd) else 1
    at_once = max(1, _ELEMENTS // max(1, inputs[:1].numel() * kernel * spread))
    total = None
    for part in inputs.split(at_once) if _is_batch(layer, inputs) else [inputs]:
        columns = unfold(layer, part).movedim(0, 1)
        rows = (columns.transpose(2, 3) if inputs_last else columns).flatten(2)
        found = (rows.transpose(1, 2) @ rows).double()
        total = found if total is None else total + found
    assert total is not None
    return total


def execution_order(model: nn.Module, layers: Mapping[str, Layer], inputs: tuple[Tensor, ...]) -> list[str]:
    """The paths of the layers that `model` calls, in the order of their first call.

    A layer whose weight is read without calling it, such as the output projection of `nn.MultiheadAttention`, is not among them.
    """
    called: dict[str, None] = {}
    with _watching(model, layers, lambda path, module, x: called.setdefault(path)), evaluating(model):
        run(model, inputs)
    return list(called)


def layer_gram(model: nn.Module, path: str, layer: Layer, batches: Iterable[tuple[Tensor, ...]], inputs_last: bool = False) -> Tensor:
    """XᵀX of all that the layer is called with while `model` runs over the batches, in all the places where its weight is used."""
    total = torch.zeros(())

    def add(_: str, module: Layer, inputs: Tensor) -> None:
        nonlocal total
        total = total.to(inputs.device) + gram_of(module, inputs.detach().float(), inputs_last)

    with _watching(model, {path: layer}, add), evaluating(model):
        for inputs in batches:
            run(model, inputs)
    return total


@contextlib.contextmanager
def _watching(model: nn.Module, layers: Mapping[str, Layer], note: Callable[[str, Layer, Tensor], object]) -> Iterator[None]:
    """While it lasts, `note` is called with path, module and input of every call of a layer, or of one that is tied to it."""
    handles = []

    def hook(path: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(module, Layer)
        note(path, module, inputs[0] if inputs else named["input"])

    for path, layer in layers.items():
        for _, owner, _name in readers(model, layer):
            if isinstance(owner, type(layer)):
                handles.append(owner.register_forward_pre_hook(functools.partial(hook, path), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_batch(layer: Layer, inputs: Tensor) -> bool:
    return isinstance(layer, nn.Linear) or inputs.dim() == len(layer.kernel_size) + 2
