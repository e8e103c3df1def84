"""Neurons that always emit the same number: what they add to the next layers becomes part of these layers' biases."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pared.graph.analysis import Analysis, analyse
from pared.graph.axes import neuron_axes
from pared.graph.capture import as_inputs, capture, training_mode
from pared.graph.silence import constant_neurons

_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Constant(NamedTuple):
    """Inputs of a layer that never change.

    Attributes:
        path: of the layer.
        inputs: which ones, as indices of its weight's second axis.
        shift: what they add to the layer's outputs, shape (outputs,), in double precision.
    """

    path: str
    inputs: Tensor
    shift: Tensor


def fold_constants(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> nn.Module:
    """Return a copy of `model` in which no layer reads a neuron that always emits the same; outputs in eval mode stay the same.

    A neuron whose incoming weights are all zero emits a constant, such as relu(bias). What a layer adds up from it goes into the
    layer's bias, and the weights that read it become zero, so that `silent_neurons` finds it and `cut_model` removes it. Layers are linear
    layers and ungrouped convolutions; where a convolution pads with zeros, the sum is smaller at the border, so that only
    constants of 0 are taken. That a neuron is constant is seen in the weights, and what it emits on the example inputs.

    Args:
        model: a plain model, without rules on its weights.
        example_inputs: a tensor or a tuple of positional inputs.

    Raises:
        ModelError, CaptureError: as `capture`.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = model[0].weight.data[1].zero_(), model[0].bias.data[1].fill_(3.0), model[2].weight.data.fill_(0.5), model[2].bias.data.zero_()
    >>> folded = fold_constants(model, torch.zeros(2, 2))
    >>> folded[2].weight.tolist(), folded[2].bias.tolist()
    ([[0.5, 0.0]], [1.5])
    """
    model = copy.deepcopy(model)
    inputs = as_inputs(example_inputs)
    analysis = analyse(capture(model, inputs))
    while found := list(constant_inputs(analysis, model, inputs)):  # a layer that reads nothing else makes constants of its own neurons
        for constant in found:
            _fold(model.get_submodule(constant.path), constant)
    return model


def constant_inputs(analysis: Analysis, model: nn.Module, inputs: Sequence[Any]) -> Iterator[Constant]:
    """The inputs of layers that are constant, and that some weight of the layer still reads.

    Args:
        analysis: of `model`.
        model: whose weights may have changed since.
        inputs: examples, by which the constants are told.
    """
    constant = constant_neurons(analysis)
    if not constant.any():
        return
    layers = _sole_readers(model)
    wanted: dict[str, Tensor] = {}
    for axis in neuron_axes(analysis):
        path = layers.get(id(axis.parameter))
        if path is not None and not axis.computes and axis.axis == 1:
            marks = torch.from_numpy(constant[axis.roots]).to(axis.parameter.device)
            marks &= axis.parameter.detach().ne(0).transpose(0, 1).flatten(1).any(1)
            if marks.any():
                wanted[path] = marks
    for path, values in _seen(model, list(wanted), inputs).items():
        layer: Any = model.get_submodule(path)
        same = values.eq(values[:, :1]).all(1) & wanted[path]
        if _pads_with_zeros(layer):
            same &= values[:, 0] == 0
        chosen = same.nonzero().flatten()
        if len(chosen):
            weight = layer.weight.detach()[:, chosen].double().flatten(2 if layer.weight.dim() > 2 else 1)
            weight = weight.sum(2) if layer.weight.dim() > 2 else weight
            yield Constant(path, chosen, weight @ values[chosen, 0].double())


def _sole_readers(model: nn.Module) -> dict[int, str]:
    """The paths of layers by their weights; layers that share a parameter with another module are left out."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, _READERS) and getattr(layer, "groups", 1) == 1:
            own = [layer._parameters.get("weight"), layer._parameters.get("bias")]
            if own[0] is not None and all(owners[id(parameter)] == 1 for parameter in own if parameter is not None):
                found[id(own[0])] = path
    return found


def _seen(model: nn.Module, paths: Sequence[str], inputs: Sequence[Any]) -> dict[str, Tensor]:
    """What layers are given in eval mode, shape (input channels, values); only layers that are called exactly once."""
    calls: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [_record(model.get_submodule(path), calls[path]) for path in paths]
    try:
        with training_mode(model, False), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, given in calls.items():
        axes = model.get_parameter(f"{path}.weight".lstrip(".")).dim()
        if len(given) == 1 and (axes == 2 or given[0].dim() == axes):
            found[path] = given[0].movedim(-1 if axes == 2 else 1, 0).flatten(1)
    return found


def _record(layer: nn.Module, calls: list[Tensor]) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.extend(value.detach().clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _pads_with_zeros(layer: Any) -> bool:
    padding = getattr(layer, "padding", 0)
    sizes = padding if isinstance(padding, tuple) else (padding,)
    return getattr(layer, "padding_mode", "zeros") == "zeros" and any(size not in (0, "valid") for size in sizes)


@torch.no_grad()
def _fold(layer: Any, constant: Constant) -> None:
    layer.weight[:, constant.inputs] = 0
    if layer.bias is not None:
        layer.bias += constant.shift.to(layer.bias)
    elif constant.shift.any():
        layer.bias = nn.Parameter(constant.shift.to(layer.weight), layer.weight.requires_grad)
