"""What the reference networks share: checks of their settings, widths, initial weights."""

from __future__ import annotations

import math

from torch import nn

from pared.core.errors import ModelError


def check_settings(net: str, *, classes: int, channels: int, size: int, width: float, smallest: int) -> None:
    """Refuse settings that a network can't be built with.

    Args:
        net: name for the messages.
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels.
        width: factor on all hidden widths.
        smallest: the least `size` for which every layer still has an input of at least one pixel.

    Raises:
        ModelError: naming the setting; several are named together.
    """
    wrong = [
        f"{net}: {name} must be a whole number of at least {least}. Got {value!r}."
        for name, value, least in (("classes", classes, 1), ("channels", channels, 1), ("size", size, 1))
        if isinstance(value, bool) or not isinstance(value, int) or value < least
    ]
    if not wrong and size < smallest:
        wrong.append(f"{net}: the smallest input is {smallest}x{smallest} pixels. Got {size}x{size}.")
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < math.inf:
        wrong.append(f"{net}: width must be a number greater than 0. Got {width!r}.")
    if wrong:
        raise ModelError("\n".join(wrong))


def scaled(units: int, width: float) -> int:
    """`units` times `width`, rounded, at least 1."""
    return max(1, round(units * width))


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
