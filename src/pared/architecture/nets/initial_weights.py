"""The initial weights of the reference networks."""

from __future__ import annotations

import math

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


def init_fan_out(net: nn.Module) -> nn.Module:
    """Give convolutions normal values of variance 2 / fan_out, linear layers of standard deviation 0.01, all biases zero.

    fan_out is kernel² · outputs / groups, the products that each input takes part in (He et al. 2015, section 2.2, backward case).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) / module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return net
