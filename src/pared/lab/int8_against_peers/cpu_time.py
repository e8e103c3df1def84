"""Processor time of deployed files, call by call in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pared.runtime import Engine

CALLS = 60


def cpu_milliseconds(files: Mapping[str, Path], inputs: tuple[Tensor, ...], calls: int = CALLS) -> dict[str, float]:
    """The median processor time of a call on one thread, in milliseconds.

    Files take turns call by call, forwards and then backwards; each timed call follows an untimed one. Processor time, not that on the
    clock, so that other programs of a busy machine count less.
    """
    arrays = [part.numpy() for part in inputs]
    engines = {name: Engine(file) for name, file in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for call in range(calls):
        for name in list(engines)[:: 1 if call % 2 == 0 else -1]:
            engines[name].run(*arrays)
            begin = time.process_time()
            engines[name].run(*arrays)
            times[name].append(1000 * (time.process_time() - begin))
    return {name: round(statistics.median(each), 4) for name, each in times.items()}
