"""What the reference networks share: checks of their settings, and widths."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pared.core.errors import ModelError


def check_settings(net: str, *, classes: int, channels: int, size: int, width: float, smallest: int, also: Sequence[str] = ()) -> None:
    """Refuse settings that a network can't be built with.

    Args:
        net: name for the messages.
        classes: outputs.
        channels: of the input.
        size: side of the input in pixels.
        width: factor on all hidden widths.
        smallest: the least `size` for which every layer still has an input of at least one pixel.
        also: further mistakes, to be named together with these.

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
    wrong += also
    if wrong:
        raise ModelError("\n".join(wrong))


def scaled(units: int, width: float) -> int:
    """`units` times `width`, rounded, at least 1."""
    return max(1, round(units * width))


def rounded(units: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `units`, at least `divisor` and never below 90 % of `units`, as the MobileNets round widths.

    >>> rounded(24 * 0.5), rounded(16 * 0.7), rounded(3)
    (16, 16, 8)
    """
    nearest = max(divisor, int(units + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * units else nearest
