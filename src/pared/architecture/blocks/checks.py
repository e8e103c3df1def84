"""Checks that the blocks share."""

from __future__ import annotations

from pared.core.problems import Problems


def whole_numbers(block: str, **values: int) -> Problems:
    """The mistakes among `values`, each of which must be a whole number of at least 1; `kernel` must be odd, so that padding keeps sizes.

    >>> whole_numbers("Fire", inputs=0, squeezed=16).found
    ['blocks.Fire: inputs must be a whole number at least 1. Got 0.']
    """
    problems = Problems(f"blocks.{block}")
    for name, value in values.items():
        problems.number(name, value, low=1, integer=True)
    kernel = values.get("kernel")
    if isinstance(kernel, int) and kernel > 0:
        problems.check(kernel % 2 == 1, "kernel", "odd", kernel)
    return problems
