"""Tensors as products of smaller ones: the maths of low-rank layers, in double precision."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_SWEEPS = 30
_CP_SWEEPS = 60
_ENOUGH = 1e-7  # relative change of the error at which sweeps end
_CP_ENOUGH = 1e-5  # it creeps where components are alike
_RIDGE = 1e-10


class Tucker2(NamedTuple):
    """A kernel as `outward` × `core` × `inward`: outputs and inputs are mixed, the places in the kernel stay.

    Attributes:
        outward: shape (outputs, output rank), orthonormal columns.
        core: shape (output rank, input rank, *kernel).
        inward: shape (input rank, inputs), orthonormal rows.
    """

    outward: Tensor
    core: Tensor
    inward: Tensor


def tucker2(weight: Tensor, output_rank: int, input_rank: int, sweeps: int = _SWEEPS) -> Tucker2:
    """The Tucker-2 decomposition of a convolution's weight (Kim et al. 2016, 1511.06530, section 3.1).

    It begins with the singular vectors of both unfoldings (HOSVD) and improves each in turn (HOOI; De Lathauwer et al. 2000), which never
    makes the error larger. With full ranks it is exact.

    Args:
        weight: shape (outputs, inputs, *kernel).
        output_rank: from 1 to outputs.
        input_rank: from 1 to inputs.
        sweeps: at most so many improvements; 0 leaves HOSVD.

    >>> weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    >>> found = tucker2(weight, 6, 4)
    >>> again = torch.einsum("or,rihw,ij->ojhw", found.outward, found.core, found.inward)
    >>> torch.allclose(again, weight)
    True
    """
    w = weight.detach().double().flatten(2)
    outward = _leading(w.flatten(1), output_rank)
    inward = _leading(w.transpose(0, 1).flatten(1), input_rank)
    last = math.inf
    for _ in range(sweeps):
        outward = _leading(torch.einsum("oik,ij->ojk", w, inward).flatten(1), output_rank)
        half = torch.einsum("oik,or->irk", w, outward)
        inward = _leading(half.flatten(1), input_rank)
        # both have orthonormal columns, so what the core holds is what isn't lost
        error = float(w.square().sum() - torch.einsum("irk,ij->rjk", half, inward).square().sum())
        if last - error <= _ENOUGH * max(last, 0.0) or error <= 0:
            break
        last = error
    core = torch.einsum("oik,or,ij->rjk", w, outward, inward)
    return Tucker2(outward, core.view(output_rank, input_rank, *weight.shape[2:]), inward.T)


def spatial(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A two-dimensional kernel as one down the rows, then one along the columns (Jaderberg et al. 2014, 1405.3866, scheme 2).

    It is the best of its rank: the weight as a matrix with a row for every input and row of the kernel and a column for every output and
    column of it has the same error.

    Args:
        weight: shape (outputs, inputs, height, width).
        rank: from 1 to min(inputs · height, outputs · width).

    Returns:
        Weights of shape (rank, inputs, height, 1) and (outputs, rank, 1, width).

    >>> first, second = spatial(torch.randn(5, 3, 3, 3), 9)
    >>> tuple(first.shape), tuple(second.shape)
    ((9, 3, 3, 1), (5, 9, 1, 3))
    """
    outputs, inputs, height, width = weight.shape
    matrix = weight.detach().double().permute(1, 2, 0, 3).reshape(inputs * height, outputs * width)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    first = (u[:, :rank] * root).T.reshape(rank, inputs, height, 1)
    second = (root[:, None] * v[:rank]).reshape(rank, outputs, 1, width).transpose(0, 1)
    return first, second.contiguous()


def spatial_values(weight: Tensor) -> Tensor:
    """The singular values that `spatial` cuts off, in descending order."""
    outputs, inputs, height, width = weight.shape
    return torch.linalg.svdvals(weight.detach().double().permute(1, 2, 0, 3).reshape(inputs * height, outputs * width))


def cp(weight: Tensor, rank: int, sweeps: int = _CP_SWEEPS) -> tuple[Tensor, ...]:
    """A weight as a sum of `rank` products of one vector for each axis (CP; Lebedev et al. 2015, 1412.6553).

    Alternating least squares from three starts, of which the best goes on: the leading singular vectors of every unfolding, padded by
    random ones from a fixed seed where an axis is shorter than the rank, and twice random ones alone. CP has no best approximation in
    general, and no order of its components, so ranks aren't nested. All factors of a component get the same norm.

    Args:
        weight: any shape of two axes or more.
        rank: at least 1.
        sweeps: at most so many passes over the axes.

    Returns:
        For each axis a factor of shape (length of the axis, rank).

    >>> product = torch.einsum("i,j,k->ijk", torch.randn(4), torch.randn(5), torch.randn(3))
    >>> torch.allclose(compose(cp(product, 1)), product.double(), atol=1e-5)
    True
    """
    w = weight.detach().double()
    generator = torch.Generator().manual_seed(0)
    unfoldings = [w.movedim(axis, 0).flatten(1) for axis in range(w.dim())]
    starts = [[_start(each, rank, generator, leading=leading) for each in unfoldings] for leading in (True, False, False)]
    first = max(sweeps // 10, 1)
    _, factors = min((_alternate(w, each, first) for each in starts), key=lambda found: found[0])
    _, factors = _alternate(w, factors, sweeps - first)
    norms = torch.stack([each.norm(dim=0) for each in factors])
    equal = norms.prod(0) ** (1 / len(factors))
    return tuple(each / norm.clamp(min=1e-30) * equal for each, norm in zip(factors, norms, strict=True))


def _alternate(w: Tensor, factors: list[Tensor], sweeps: int) -> tuple[float, list[Tensor]]:
    """Solve for one factor after the other; the squared error at the end, and the factors."""
    factors = list(factors)
    total, last = float(w.square().sum()), math.inf
    for _ in range(sweeps):
        for axis in range(w.dim()):
            others = [each for at, each in enumerate(factors) if at != axis]
            gram = torch.stack([each.T @ each for each in others]).prod(0)
            gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean()) + torch.finfo(gram.dtype).tiny)
            factors[axis] = torch.linalg.solve(gram, _contracted(w, factors, axis).T).T
            if axis < w.dim() - 1:  # the norms live in the last factor, so that products stay in range
                factors[axis] = factors[axis] / factors[axis].norm(dim=0).clamp(min=1e-30)
        error = float((w - compose(factors)).square().sum())
        if last - error <= _CP_ENOUGH * last or error <= 1e-16 * total:
            break
        last = error
    return float((w - compose(factors)).square().sum()), factors


def compose(factors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """The sum of products that the factors of `cp` stand for."""
    letters = "abcdefgh"[: len(factors)]
    return torch.einsum(",".join(f"{letter}r" for letter in letters) + "->" + letters, *factors)


def kernels_by_input(weight: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The best approximation of what every input has by `count` kernels, mixed for each output: a depthwise separable convolution.

    Args:
        weight: shape (outputs, inputs, *kernel).
        count: kernels for each input, from 1 to min(outputs, places of the kernel).

    Returns:
        Depthwise kernels of shape (inputs · count, 1, *kernel), those of an input side by side, and a pointwise weight of shape (outputs,
        inputs · count). The squared error is that of the squared singular values left out, input by input.

    >>> depthwise, pointwise = kernels_by_input(torch.einsum("oi,ik->oik", torch.randn(4, 2), torch.randn(2, 9)))
    >>> tuple(depthwise.shape), tuple(pointwise.shape)
    ((2, 1, 9), (4, 2))
    """
    matrices = weight.detach().double().transpose(0, 1).flatten(2)  # inputs, outputs, places
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    root = s[:, :count].sqrt()
    depthwise = (root[:, :, None] * v[:, :count]).reshape(-1, 1, *weight.shape[2:])
    return depthwise, (root[:, None] * u[:, :, :count]).transpose(0, 1).flatten(1)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, shape (rows, rank)."""
    if rank == 0:
        return matrix.new_zeros(len(matrix), 0)
    gram = matrix @ matrix.T  # far smaller than the matrix where there are more columns
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)


def _start(unfolding: Tensor, rank: int, generator: torch.Generator, *, leading: bool) -> Tensor:
    length = len(unfolding)
    found = _leading(unfolding, min(rank, length) if leading else 0)
    more = torch.randn(length, rank - found.shape[1], dtype=unfolding.dtype, generator=generator).to(unfolding.device)
    return torch.cat([found, more / math.sqrt(length)], 1)


def _contracted(w: Tensor, factors: list[Tensor], axis: int) -> Tensor:
    """`w` times the factors of all other axes, component by component: shape (length of the axis, rank). The longest axis goes first."""
    left = [other for other in range(w.dim()) if other != axis]
    longest = max(left, key=lambda other: w.shape[other])
    found = w.movedim(longest, -1) @ factors[longest]
    axes = [other for other in range(w.dim()) if other != longest]
    for other in reversed([other for other in axes if other != axis]):
        place = axes.index(other)
        shape = [1] * found.dim()
        shape[place], shape[-1] = factors[other].shape
        found = (found * factors[other].view(shape)).sum(place)
        axes.remove(other)
    return found
