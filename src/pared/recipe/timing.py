"""Latency of the files of a run, all of them in one interleaved measurement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from pared.measure import Latency, latency, sample_inputs
from pared.measure.profile import ADAPTIVE_SAMPLES
from pared.training import Task


def time_files(files: Mapping[str, Path], task: Task, threads: int = 1, quick: bool = False) -> dict[str, Latency]:
    """Time deployed files on samples of the test split, one sample a call.

    If one of the files decides by its input what to compute, all of them are timed on the same several samples.

    Raises:
        RunError, ModelError: if a file can't be loaded or run.
    """
    count = ADAPTIVE_SAMPLES if any(adapts(path) for path in files.values()) else 1
    return latency(files, sample_inputs(task, "test", count), threads, quick=quick)


def adapts(path: Path) -> bool:
    """Whether a file computes more for some inputs than for others: it has a branch."""
    return any(node.op_type in ("If", "Loop") for node in onnx.load(str(path), load_external_data=False).graph.node)
