"""Where data sets are looked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pared.core.errors import DataError

SYSTEM = Path("/usr/share/datasets")


def places(name: str) -> list[Path]:
    """The folders that are searched for data set `name`, in order: $PARED_DATA, the user's cache, the system's data sets.

    >>> places("cifar10")[-1].as_posix()
    '/usr/share/datasets/cifar10'
    """
    found: list[Path] = []
    if own := os.environ.get("PARED_DATA"):
        found += [Path(own).expanduser() / name, Path(own).expanduser()]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [*found, Path(cache).expanduser() / "pared" / name, SYSTEM / name]


def find(name: str, candidates: Iterable[str], advice: str) -> Path:
    """The first of `candidates` (paths relative to a place) that exists in the first place that has one.

    Raises:
        DataError: saying what was looked for, where, and how to get it.
    """
    candidates = list(candidates)
    for place in places(name):
        for candidate in candidates:
            if (place / candidate).exists():
                return place / candidate
    raise missing(name, candidates, advice)


def missing(name: str, candidates: Iterable[str], advice: str) -> DataError:
    """The error for a data set that isn't there."""
    looked = ", ".join(str(place) for place in places(name))
    return DataError(f"{name}: found none of {', '.join(candidates)} in {looked}. {advice}, or set PARED_DATA to the folder that holds it.")
