"""`pared bench`: time the two files of a run again, on this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from pared.cli.setting import load_task, print_json
from pared.core.errors import RunError
from pared.recipe import Result
from pared.recipe.timing import time_files


def bench(directory: Path, data: str | None, *, threads: int, quick: bool, seed: int, json: bool) -> int:
    """Time `original.onnx` and `small.onnx` of a run directory, interleaved."""
    result = Result.read(directory)
    files = {name: directory / f"{name}.onnx" for name in ("original", "small")}
    for path in files.values():
        if not path.exists():
            raise RunError(f"{path}: is not there. Run the recipe again.")
    times = time_files(files, load_task(data or result.data, seed), threads=threads, quick=quick)
    before, after = times["original"], times["small"]
    if json:
        print_json({**{name: time.to_dict() for name, time in times.items()}, "ratio": before.median / after.median})
        return 0
    for name, time in times.items():
        typer.echo(
            f"{name:<10} median {time.median:.4f} ms   p90 {time.p90:.4f} ms   batch {time.batch}   threads {time.threads}   {time.engine}"
        )
    typer.echo(f"{'ratio':<10} {before.median / after.median:.2f}")
    return 0
