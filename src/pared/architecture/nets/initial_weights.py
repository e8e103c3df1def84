"""The initial weights of the reference networks."""

from __future__ import annotations

from torch import nn


def init_glorot(net: nn.Module) -> nn.Module:
    """Give all weights normal values of variance 2 / (fan_in + fan_out), all biases zero (Frankle and Carbin 2019, section 2)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


def init_kaiming(net: nn.Module) -> nn.Module:
    """Give all weights normal values of variance 2 / fan_in, all biases zero (He et al. 2015, section 2.2)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
