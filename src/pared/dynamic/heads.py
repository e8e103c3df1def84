"""Small classifiers for the activations in the middle of a network."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

_POOLS = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}
# operators after which channels stand first or last
_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d}
_FIRST = {*_CONVOLUTIONS, aten.batch_norm, aten.group_norm, aten.instance_norm}
_LAST = {aten.linear, aten.layer_norm, aten.rms_norm, aten.embedding, aten.scaled_dot_product_attention}


class TokenMean(nn.Module):
    """The mean over all axes between the batch and the channels, which stand last: (batch, …, channels) to (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean."""
        return x.flatten(1, -2).mean(1)


def make_head(shape: tuple[int, ...], classes: int, width: int | None, *, channels_last: bool) -> nn.Sequential:
    """Global average pooling and a linear layer, or two with `width` hidden units between; a vector isn't pooled.

    Args:
        shape: of the activation, with the batch first.
        classes: outputs.
        width: hidden units, or None for a single linear layer.
        channels_last: whether the channels are the last axis (tokens) or the second (images).

    >>> make_head((2, 8, 4, 4), 10, None, channels_last=False)
    Sequential(
      (0): AdaptiveAvgPool2d(output_size=1)
      (1): Flatten(start_dim=1, end_dim=-1)
      (2): Linear(in_features=8, out_features=10, bias=True)
    )
    """
    channels = shape[-1] if channels_last or len(shape) == 2 else shape[1]
    layers: list[nn.Module] = []
    if len(shape) > 2:
        pool = _POOLS.get(len(shape))
        layers += [TokenMean()] if channels_last or pool is None else [pool(1), nn.Flatten()]
    if width is not None:
        layers += [nn.Linear(channels, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(channels if width is None else width, classes))


def has_channels_last(node: fx.Node) -> bool:
    """Whether the last layer that made this value writes its channels last, as linear layers and attention do."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        current = waiting.pop(0)
        operator = getattr(current.target, "overloadpacket", None)
        if operator in _FIRST or operator in _LAST:
            return operator in _LAST
        seen.add(current)
        waiting += [argument for argument in current.all_input_nodes if argument not in seen]
    return False
