"""Logistic functions in integers: tables that come out alike on every machine."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

FRACTION = 8
"""Bits behind the point of a logit."""

LIMIT = 12 << FRACTION
"""The largest logit: odds of e^12, about 163,000 to 1."""

PRECISION = 16
"""Bits of a probability."""

_WORKING = 192
"""Bits behind the point while the tables are made; no entry comes that near to a half."""


@functools.cache
def squash_table() -> NDArray[np.int32]:
    """Probabilities of all logits from -`LIMIT` to `LIMIT`, in units of 2^-`PRECISION`, never 0 or 1.

    >>> table = squash_table()
    >>> int(table[LIMIT]), int(table[0]), len(table)
    (32768, 1, 6145)
    """
    one = 1 << _WORKING
    step, term = one, one
    for n in range(1, 64):  # e^(1 / 256) by its series, in integers
        term //= n << FRACTION
        step += term
    power, powers = one, []
    for _ in range(LIMIT + 1):
        powers.append(power)
        power = power * step >> _WORKING
    whole = 1 << PRECISION
    upper = [(2 * whole * value + one + value) // (2 * (one + value)) for value in powers]  # rounded to nearest
    table = [whole - value for value in reversed(upper[1:])] + upper
    return np.clip(np.array(table, np.int64), 1, whole - 1).astype(np.int32)


@functools.cache
def stretch_table() -> NDArray[np.int16]:
    """The logit of every probability: of those whose `squash_table` entry is nearest from below, the middle one.

    >>> table = stretch_table()
    >>> int(table[32768]), int(table[1] < -2500), len(table)
    (0, 1, 65536)
    """
    probabilities = np.arange(1 << PRECISION)
    table = squash_table()
    last = np.searchsorted(table, probabilities, side="right") - 1
    first = np.searchsorted(table, table[np.maximum(last, 0)], side="left")
    return np.clip((first + last) // 2 - LIMIT, -LIMIT, LIMIT).astype(np.int16)
