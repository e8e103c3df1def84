"""Linear layers and convolutions as chains of thinner ones, and such chains as one layer again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pared.architecture.factors import cp, spatial, tucker2

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: tuple[type[Convolution], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def svd_linear(layer: nn.Linear, rank: int, inputs: Tensor | None = None) -> nn.Sequential:
    """Two linear layers, inputs → rank → outputs, whose product is the best approximation of the layer's weight.

    The error in Frobenius norm is the root of the sum of the squared singular values left out (Eckart & Young 1936).
    Each factor gets the roots of the singular values, so that both train at the same pace; only the second has the bias.

    Args:
        layer: weight of shape (outputs, inputs).
        rank: from 1 to min(outputs, inputs); at the upper end the two layers compute exactly what the one did.
        inputs: mean of x xᵀ over inputs x, shape (inputs, inputs): then the mean squared error of the outputs is least, and not that
            of the weight.

    >>> svd_linear(nn.Linear(6, 4), 2)
    Sequential(
      (0): Linear(in_features=6, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=4, bias=True)
    )
    """
    outward, inward = svd(layer.weight, rank, inputs)
    device, dtype = layer.weight.device, layer.weight.dtype
    first = nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False, device=device, dtype=dtype)
    second = nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=layer.bias is not None, device=device, dtype=dtype)
    return _filled(((first, inward), (second, outward)), layer)


def svd_convolution(layer: Convolution, rank: int, inputs: Tensor | None = None) -> nn.Sequential:
    """A convolution to `rank` channels only, and a 1×1 convolution from there to the outputs (Denton et al. 2014, 1404.0736).

    Stride, padding and dilation stay with the first, which sees the image; only the second has the bias. The weight is decomposed as a
    matrix of shape (outputs, inputs · kernel), so the error is that of `svd_linear`.

    Args:
        layer: a convolution without groups.
        rank: from 1 to min(outputs, inputs · kernel).
        inputs: as for `svd_linear`, of all patches that the kernel sees.

    >>> svd_convolution(nn.Conv2d(16, 32, 3, stride=2, padding=1), 8)
    Sequential(
      (0): Conv2d(16, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
      (1): Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    outward, inward = svd(layer.weight.flatten(1), rank, inputs)
    first = _like(layer, layer.in_channels, rank)
    return _filled(((first, inward), (_pointwise(layer, rank, layer.out_channels, last=True), outward)), layer)


def tucker_convolution(layer: Convolution, output_rank: int, input_rank: int) -> nn.Sequential:
    """1×1 to `input_rank` channels, the kernel from there to `output_rank`, 1×1 to the outputs (Kim et al. 2016, 1511.06530).

    The first has no bias, so that the padding of the second stays what zeros became.

    Args:
        layer: a convolution without groups.
        output_rank: from 1 to outputs.
        input_rank: from 1 to inputs.

    >>> [tuple(part.weight.shape) for part in tucker_convolution(nn.Conv2d(16, 32, 3), 12, 6)]
    [(6, 16, 1, 1), (12, 6, 3, 3), (32, 12, 1, 1)]
    """
    found = tucker2(layer.weight, output_rank, input_rank)
    parts = (
        (_pointwise(layer, layer.in_channels, input_rank), found.inward),
        (_like(layer, input_rank, output_rank), found.core),
        (_pointwise(layer, output_rank, layer.out_channels, last=True), found.outward),
    )
    return _filled(parts, layer)


def spatial_convolution(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """A k×1 convolution to `rank` channels, and a 1×k from there to the outputs (Jaderberg et al. 2014, 1405.3866, scheme 2).

    Stride, padding and dilation are split: that down the rows is the first's, that along the columns the second's.

    Args:
        layer: a two-dimensional convolution without groups.
        rank: from 1 to min(inputs · height, outputs · width).

    >>> spatial_convolution(nn.Conv2d(16, 32, 3, stride=2, padding=1), 8)
    Sequential(
      (0): Conv2d(16, 8, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), bias=False)
      (1): Conv2d(8, 32, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1))
    )
    """
    down, along = spatial(layer.weight, rank)
    first = _like(layer, layer.in_channels, rank, axes=(0,))
    second = _like(layer, rank, layer.out_channels, axes=(1,), last=True)
    return _filled(((first, down), (second, along)), layer)


def cp_convolution(layer: Convolution, rank: int) -> nn.Sequential:
    """1×1 to `rank` channels, one depthwise convolution for each axis of the image, 1×1 to the outputs (Lebedev et al. 2015, 1412.6553).

    Tuning it wants a low learning rate: what it stands for is a product of four and more.

    Args:
        layer: a convolution without groups.
        rank: at least 1.

    >>> [tuple(part.weight.shape) for part in cp_convolution(nn.Conv2d(16, 32, 3), 12)]
    [(12, 16, 1, 1), (12, 1, 3, 1), (12, 1, 1, 3), (32, 12, 1, 1)]
    """
    outward, inward, *axes = cp(layer.weight, rank)
    parts: list[tuple[nn.Module, Tensor]] = [(_pointwise(layer, layer.in_channels, rank), inward.T)]
    parts += [(_like(layer, rank, rank, axes=(axis,), groups=rank), factor.T) for axis, factor in enumerate(axes)]
    return _filled((*parts, (_pointwise(layer, rank, layer.out_channels, last=True), outward)), layer)


def merged(first: nn.Linear | Convolution, second: nn.Linear | Convolution) -> nn.Module:
    """The one layer that two in a row are, exactly: a wide layer of low rank is two thin ones, read backwards.

    Args:
        first: a linear layer, or a convolution without groups.
        second: a linear layer after a linear one, a convolution of kernel 1, stride 1 and no padding after a convolution.

    Raises:
        ValueError: if the two aren't such a pair.

    >>> wide = nn.Linear(6, 4)
    >>> again = merged(*svd_linear(wide, 4))
    >>> torch.allclose(again.weight, wide.weight, atol=1e-6), torch.equal(again.bias, wide.bias)
    (True, True)
    """
    inward, outward = first.weight.detach().double(), second.weight.detach().double()
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and first.out_features == second.in_features:
        has_bias = first.bias is not None or second.bias is not None
        found: Any = nn.utils.skip_init(
            nn.Linear, first.in_features, second.out_features, bias=has_bias, device=first.weight.device, dtype=first.weight.dtype
        )
    elif _is_chain(first, second):
        has_bias = first.bias is not None or second.bias is not None
        assert isinstance(first, Convolution)
        found = _like(first, first.in_channels, len(outward), last=has_bias)
        outward = outward.flatten(1)
    else:
        raise ValueError(f"{first} and {second} aren't one layer.")
    with torch.no_grad():
        found.weight.copy_((outward @ inward.flatten(1)).view(found.weight.shape))
        if has_bias:
            through = 0 if first.bias is None else outward @ first.bias.double()
            found.bias.copy_(through + (0 if second.bias is None else second.bias.double()))
    return found.train(first.training)


def svd(weight: Tensor, rank: int, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors of shape (outputs, rank) and (rank, inputs), in double precision so that full rank is exact to the last bits.

    With `inputs`, the mean of x xᵀ, their product W̃ makes the mean of ‖(W - W̃) x‖² least: it is the singular value decomposition of
    W S with S Sᵀ = mean of x xᵀ.
    """
    weight = weight.detach().double()
    if inputs is None:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = s[:rank].sqrt()
        return u[:, :rank] * root, root[:, None] * v[:rank]
    root, inverse = square_root(inputs)
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    half = s[:rank].sqrt()
    return u[:, :rank] * half, half[:, None] * (v[:rank] @ inverse)


def square_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive semidefinite matrix and its inverse; what never occurs counts as a millionth of the mean."""
    moment = moment.double()
    values, vectors = torch.linalg.eigh(moment)
    floor = max(1e-6 * float(values.clamp(min=0).mean()), torch.finfo(values.dtype).tiny)
    roots = values.clamp(min=floor).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


def _is_chain(first: nn.Module, second: nn.Module) -> bool:
    return (
        isinstance(first, Convolution)
        and type(second) is type(first)
        and first.groups == second.groups == 1
        and first.out_channels == second.in_channels
        and {*second.kernel_size, *second.stride} == {1}
        and (second.padding in ("same", "valid") or set(second.padding) == {0})
    )


def _like(
    layer: Convolution, inputs: int, outputs: int, *, axes: Sequence[int] | None = None, groups: int = 1, last: bool = False
) -> nn.Module:
    """A convolution as `layer` along some axes of the image, of kernel 1 along the others; only the last of a chain has a bias."""
    size = len(layer.kernel_size)
    own = range(size) if axes is None else axes

    def along(values: Any, other: int) -> Any:
        return values if isinstance(values, str) else tuple(value if axis in own else other for axis, value in enumerate(values))

    shape = {"stride": along(layer.stride, 1), "padding": along(layer.padding, 0), "dilation": along(layer.dilation, 1)}
    kind = CONVOLUTIONS[size - 1]
    bias = last and (axes is None or layer.bias is not None)
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype, "padding_mode": layer.padding_mode}
    return nn.utils.skip_init(kind, inputs, outputs, along(layer.kernel_size, 1), groups=groups, bias=bias, **shape, **place)


def _pointwise(layer: Convolution, inputs: int, outputs: int, *, last: bool = False) -> nn.Module:
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    return nn.utils.skip_init(CONVOLUTIONS[len(layer.kernel_size) - 1], inputs, outputs, 1, bias=last and layer.bias is not None, **place)


def _filled(parts: Sequence[tuple[nn.Module, Tensor]], layer: nn.Linear | Convolution) -> nn.Sequential:
    """Layers in a row with the weights given; the last gets the bias."""
    with torch.no_grad():
        for part, weight in parts:
            target = part.get_parameter("weight")
            target.copy_(weight.reshape(target.shape))
            target.requires_grad_(layer.weight.requires_grad)
        if layer.bias is not None:
            bias = parts[-1][0].get_parameter("bias")
            bias.copy_(layer.bias)
            bias.requires_grad_(layer.bias.requires_grad)
    return nn.Sequential(*(part for part, _ in parts)).train(layer.training)
