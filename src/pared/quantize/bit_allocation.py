"""How many bits each layer gets: what a layer's rounding does to the outputs is measured, and bits go where they help most."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.core.layers import Layer
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.graph.capture import training_mode
from pared.training.samples import Inputs

CHOICES = (2, 3, 4, 5, 6, 8)


def bit_errors(
    model: nn.Module, layers: Sequence[str], batches: Inputs, quantize: Callable[[Layer, int], Tensor], choices: Sequence[int] = CHOICES
) -> dict[str, dict[int, float]]:
    """How far the outputs of a network move when one layer alone is quantized: the squared difference, summed over all outputs.

    It needs no labels, and a run of the network for each layer and each choice.

    Args:
        model: isn't changed.
        layers: paths of layers.
        batches: prepared inputs.
        quantize: (layer, bits) -> its weight on a grid, in its shape.
        choices: bits that are tried.

    Returns:
        By path and bits.

    >>> from pared.quantize.grid import fake_quantize, find_grid
    >>> model, inputs = nn.Linear(2, 1, bias=False), [(torch.eye(2),)]
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.25]]))
    >>> bit_errors(model, [""], inputs, lambda layer, bits: fake_quantize(layer.weight, find_grid(layer.weight, bits, "minmax")), [2])
    {'': {2: 0.0625}}
    """
    network = bake(copy.deepcopy(model))
    errors: dict[str, dict[int, float]] = {path: {} for path in layers}
    with training_mode(network, False), torch.no_grad():
        expected = [_outputs(network, batch) for batch in batches]
        for path in layers:
            layer = network.get_submodule(path)
            assert isinstance(layer, Layer)
            weight = layer.weight.clone()
            for bits in choices:
                layer.weight.copy_(weight)
                layer.weight.copy_(quantize(layer, bits))
                errors[path][bits] = sum(_distance(_outputs(network, batch), known) for batch, known in zip(batches, expected, strict=True))
            layer.weight.copy_(weight)
    return errors


def choose_bits(errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    """Choose the bits of each layer, so that a weight has at most `mean_bits` in the mean, by error per bit.

    All layers begin with the fewest. The step that takes away most error for each bit that it costs is made as long as one fits; a
    step may jump over choices. Errors of several layers are taken to add up.

    Args:
        errors: of each layer by bits; all layers have the same choices.
        sizes: weights of each layer.
        mean_bits: the budget.

    Raises:
        SettingsError: if even the fewest bits are more.

    >>> choose_bits({"a": {2: 9.0, 4: 1.0}, "b": {2: 2.0, 4: 1.0}}, {"a": 10, "b": 10}, 3)
    {'a': 4, 'b': 2}
    """
    bits = {path: min(choices) for path, choices in errors.items()}
    fewest = max(bits.values())
    problems = Problems("quantize.bits")
    problems.number("budget", mean_bits, low=fewest)
    problems.raise_if_any()
    room = mean_bits * sum(sizes[path] for path in errors) - sum(sizes[path] * count for path, count in bits.items())
    while True:
        steps = [
            ((errors[path][bits[path]] - error) / (sizes[path] * (more - bits[path])), path, more)
            for path, choices in errors.items()
            for more, error in choices.items()
            if more > bits[path] and sizes[path] * (more - bits[path]) <= room and error < errors[path][bits[path]]
        ]
        if not steps:
            return bits
        _, path, more = max(steps, key=lambda step: step[0])
        room -= sizes[path] * (more - bits[path])
        bits[path] = more


def _outputs(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(model(*batch)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return sum(float((ours.double() - theirs.double()).square().sum()) for ours, theirs in zip(found, expected, strict=True))
