"""Time deployed files so that the ratio of two of them can be believed."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor

from pared.core.errors import DataError, SettingsError
from pared.runtime import Engine

CALLS = 60
"""Timed calls of a file at the least: in A/A tests the ratio of two medians of 60 calls is within 2 % of 1."""

SESSIONS = 3
"""Sessions a file is measured in: two sessions of one file can differ steadily by 1 %, by where their memory lies."""

WARM_UP = 0.2
"""Seconds of untimed calls after a session is made."""

FOREIGN = 0.05
"""Share of the machine that other processes may use before a measurement counts as disturbed."""


@dataclass(frozen=True)
class Latency:
    """What one call of a deployed file takes, in milliseconds.

    Attributes:
        median: of all calls; with several inputs, the mean over inputs of the median for each.
        p90: nine of ten calls are faster.
        batch: samples in a call.
        threads: of the engine.
        engine: name and version.
        minimum: the fastest call (mean over inputs); less exact than the median but blind to other programs.
        calls: how many were timed.
        quiet: False if other programs took more than 5 % of the machine meanwhile, also when measured again.
    """

    median: float
    p90: float
    batch: int
    threads: int
    engine: str
    minimum: float = field(default=float("nan"), compare=False)
    calls: int = field(default=0, compare=False)
    quiet: bool = field(default=True, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields that result.json holds."""
        return {"median": self.median, "p90": self.p90, "batch": self.batch, "threads": self.threads, "engine": self.engine}


def latency(
    files: Mapping[str, str | Path], inputs: Any, threads: int = 1, *, seconds: float = 2.0, quick: bool = False
) -> dict[str, Latency]:
    """Time several deployed files in turn, so that whatever disturbs one disturbs all.

    The files take turns call by call, forwards and then backwards; each timed call follows an untimed one of the same file, so that
    its own data is in the cache; sessions are made anew three times. A measurement disturbed by other programs is repeated once.

    Args:
        files: paths by name, such as {"original": …, "small": …}.
        inputs: a tensor or array, a tuple of them (one an input of the file), or for networks that adapt to their input a list of
            such tuples. Raw, as the file takes them. A file fixed to another batch gets as many samples as it wants.
        threads: of the engine.
        seconds: of timed calls of the slowest file; never fewer than 60 calls of each.
        quick: a tenth of the seconds, for demonstrations.

    Returns:
        A `Latency` for each name.

    Raises:
        RunError, ModelError: if a file can't be loaded, or can't take the inputs.
        SettingsError: if there are no files or threads.

    >>> import tempfile, torch
    >>> from pared.runtime import export
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = export(torch.nn.Linear(8, 2), torch.zeros(1, 8), folder + "/linear.onnx")
    ...     times = latency({"linear": file}, torch.zeros(1, 8), quick=True)
    >>> times["linear"].calls >= 60, times["linear"].batch
    (True, 1)
    """
    if not files:
        raise SettingsError("latency: files must name at least one file. Got none.")
    if threads < 1 or not seconds > 0:
        raise SettingsError(f"latency: threads must be at least 1 and seconds greater than 0. Got {threads!r} and {seconds!r}.")
    arrays = _input_list(inputs)
    wanted = seconds / 10 if quick else seconds
    result = _measure(files, arrays, threads, wanted)
    return result if all(entry.quiet for entry in result.values()) else _measure(files, arrays, threads, wanted)


@dataclass
class _Arm:
    """One file while it is measured: its session, its inputs, and the times of each input in seconds."""

    engine: Engine
    inputs: list[tuple[np.ndarray, ...]]
    times: list[list[float]]

    def call(self, index: int) -> None:
        arrays = self.inputs[index]
        self.engine.run(*arrays)
        begin = time.perf_counter()
        self.engine.run(*arrays)
        self.times[index].append(time.perf_counter() - begin)


def _measure(files: Mapping[str, str | Path], inputs: list[tuple[np.ndarray, ...]], threads: int, seconds: float) -> dict[str, Latency]:
    gathered: dict[str, list[list[float]]] = {name: [[] for _ in inputs] for name in files}
    batches: dict[str, int] = {}
    load = _Load()
    with _no_garbage_collection():
        for _ in range(SESSIONS):
            arms = {}
            for name, path in files.items():
                engine = Engine(path, threads)
                arms[name] = _Arm(engine, [fit_batch(arrays, engine.batch) for arrays in inputs], gathered[name])
                first = arms[name].inputs[0]
                batches[name] = len(first[0]) if first and first[0].ndim else 1
                _warm_up(arms[name])
            _take_turns(list(arms.values()), seconds / SESSIONS)
    quiet = load.foreign() <= FOREIGN
    return {name: replace(_summary(times, batches[name], threads), quiet=quiet) for name, times in gathered.items()}


def _warm_up(arm: _Arm) -> None:
    end = time.perf_counter() + WARM_UP
    while True:
        arm.engine.run(*arm.inputs[0])
        if time.perf_counter() >= end:
            return


def _take_turns(arms: Sequence[_Arm], seconds: float) -> None:
    """Call all arms in turn until they have their share of calls and of time; the order is reversed each round."""
    spent = [0.0] * len(arms)
    calls = 0
    for round_number in range(10**9):
        for index in range(len(arms[0].inputs)):
            order = range(len(arms)) if (round_number + index) % 2 == 0 else range(len(arms) - 1, -1, -1)
            for which in order:
                arms[which].call(index)
                spent[which] += arms[which].times[index][-1]
            calls += 1
        # the slowest has used its time; waiting for the fastest would take as many times longer as it is faster
        if calls * SESSIONS >= CALLS and max(spent) >= seconds:
            return


def _summary(times: list[list[float]], batch: int, threads: int) -> Latency:
    every = [value for one in times for value in one]
    return Latency(
        median=1000 * statistics.fmean(statistics.median(one) for one in times),
        p90=1000 * float(np.quantile(every, 0.9)),
        batch=batch,
        threads=threads,
        engine=f"onnxruntime {onnxruntime.__version__}",
        minimum=1000 * statistics.fmean(min(one) for one in times),
        calls=len(every),
    )


def _input_list(inputs: Any) -> list[tuple[np.ndarray, ...]]:
    entries = inputs if isinstance(inputs, list) else [inputs]
    if not entries:
        raise DataError("latency: there are no inputs to time.")
    return [tuple(_array(x) for x in (entry if isinstance(entry, tuple) else (entry,))) for entry in entries]


def _array(value: Tensor | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def fit_batch(arrays: tuple[np.ndarray, ...], batch: int | None) -> tuple[np.ndarray, ...]:
    """Give a file that is fixed to a batch as many samples as it takes: the first ones, or the given ones again and again."""
    if batch is None:
        return arrays
    return tuple(np.resize(array, (batch, *array.shape[1:])) if array.ndim and len(array) != batch else array for array in arrays)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Load:
    """How much of the machine other processes use from now on, where the system tells (Linux)."""

    def __init__(self) -> None:
        self._begin = self._now()

    def foreign(self) -> float:
        """Share of all cores that others used since; 0 where the system doesn't tell."""
        begin, end = self._begin, self._now()
        if begin is None or end is None:
            return 0.0
        wall, busy, own = (after - before for before, after in zip(begin, end, strict=True))
        return max(0.0, busy - own) / max(wall * (os.cpu_count() or 1), 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = (int(entry) for entry in fields[:8])
        own = os.times()
        ticks = os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), (user + nice + system + interrupts + soft_interrupts + stolen) / ticks, own.user + own.system
