"""New random weights for any network."""

from __future__ import annotations

import math

import torch
from torch import nn


def reinitialize(model: nn.Module) -> None:
    """Give every parameter a new value in place, as is usual: convolutions He-normal (2015, 1502.01852), matrices uniform within
    1/sqrt(inputs) (torch's own), biases 0, scales 1; running statistics start over.

    It goes by names and shapes, not by `reset_parameters`, because a rewritten graph has no layer classes. Masks hold.

    >>> layer = nn.Conv2d(16, 8, 5)
    >>> reinitialize(layer)
    >>> bool(abs(layer.weight.std() - (2 / 400) ** 0.5) < 0.002), layer.bias.sum().item()
    (True, 0.0)
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = max(1, math.prod(parameter.shape[1:]))
            if parameter.dim() >= 3:
                parameter.normal_(0.0, math.sqrt(2.0 / fan_in))
            elif parameter.dim() == 2:
                parameter.uniform_(-1.0 / math.sqrt(fan_in), 1.0 / math.sqrt(fan_in))
            else:
                is_scale = name.split(".")[-1] in ("weight", "gamma", "scale") or name.endswith(".weight.original")
                parameter.fill_(1.0 if is_scale else 0.0)
        for name, buffer in model.named_buffers():
            kind = name.split(".")[-1]
            if kind in ("running_mean", "num_batches_tracked"):
                buffer.zero_()
            elif kind == "running_var":
                buffer.fill_(1.0)
