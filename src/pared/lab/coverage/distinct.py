"""Parameters all of whose values differ, so that what a cut kept can be read off the cut network itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

OCTAVE = 2**23  # float32 numbers between a power of two and the next
ONE = 0x3F800000  # the bits of 1.0


def distinct_values(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random float32 values of the same shape and about the same size, no two of the same magnitude.

    What is smaller than 0.001 (an untrained head, a layer scale, a token) gets a size of 0.1, and a matrix at least one over the root of
    its inputs, so that every branch counts and an error behind it shows. A positive constant (a norm's weight) stays positive.
    Magnitudes are log-uniform over two octaves or more.

    >>> values = distinct_values(torch.zeros(1000), torch.Generator().manual_seed(0))
    >>> len(values.abs().unique())
    1000
    """
    count = tensor.numel()
    if count == 0:
        return tensor.clone()
    constant = bool((tensor == tensor.reshape(-1)[0]).all())
    size = float(tensor.double().square().mean().sqrt())
    if tensor.dim() > 1 and len(tensor) > 1:
        size = max(size, (count / len(tensor)) ** -0.5)
    if size < 1e-3:
        size = 0.1
    octaves = max(2, math.ceil(count / OCTAVE))
    order = torch.randperm(count, generator=generator, dtype=torch.int32)
    values = (order * (octaves * OCTAVE // count) + (ONE - octaves * OCTAVE)).view(torch.float32)
    # a power of two keeps all of them apart
    values *= 2.0 ** round(math.log2(size / float(values.double().square().mean().sqrt())))
    if not (constant and float(tensor.reshape(-1)[0]) > 0):
        values *= torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
    return values.reshape(tensor.shape)


def make_distinct(model: nn.Module, seed: int) -> None:
    """Fill all float32 parameters of `model`, in place; a single number keeps its value unless it is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dtype is not torch.float32 or (parameter.numel() == 1 and float(parameter.detach().reshape(-1)[0]) != 0):
            continue
        parameter.data = distinct_values(parameter.detach(), generator)


def settle_batch_norms(model: nn.Module, inputs: tuple[Tensor, ...], rounds: int = 2) -> None:
    """Let batch norms see random inputs, so that their statistics fit the weights and no activation grows without bound."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(rounds):
            model(*(torch.randn(4, *x.shape[1:]) if isinstance(x, Tensor) else x for x in inputs))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
