"""`pared pack`, `pared unpack` and `pared inspect`: small files, and where their bytes go."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from pared import codec
from pared.cli.setting import print_json
from pared.codec import Inspection
from pared.codec.tensors import Prefer
from pared.core.errors import SettingsError
from pared.report import print_table
from pared.report.pictures import check_picture
from pared.report.tensors import draw_tensors

_PREFER: dict[str, Prefer] = {name: name for name in ("auto", "smallest", "static", "huffman", "raw")}


def pack(source: Path, target: Path, prefer: str, *, threads: int, json: bool, quiet: bool) -> int:
    """Pack SOURCE, check what was written, and say how large it is."""
    if prefer not in _PREFER:
        raise SettingsError(f"pack: --prefer must be one of {', '.join(_PREFER)}. Got {prefer!r}.")
    with _progress("packing", quiet or json) as step:
        codec.pack(source, target, _PREFER[prefer], threads=threads, progress=step)
    before, after = source.stat().st_size, target.stat().st_size
    packed = codec.PackedFile(target)
    program = packed.head_bytes
    if json:
        print_json({"source_bytes": before, "bytes": after, "program_bytes": program, "weight_bytes": after - program})
        return 0
    typer.echo(f"{target}: {after:,} bytes, program {program:,} and weights {after - program:,}; {before / after:.2f} times smaller.")
    return 0


def unpack(source: Path, target: Path, *, threads: int, json: bool, quiet: bool) -> int:
    """Unpack SOURCE to the file that it was made from."""
    with _progress("unpacking", quiet or json) as step:
        codec.unpack(source, target, threads=threads, progress=step)
    if json:
        print_json({"bytes": target.stat().st_size})
        return 0
    typer.echo(f"{target}: {target.stat().st_size:,} bytes.")
    return 0


def inspect(source: Path, picture: Path | None, *, json: bool) -> int:
    """Print where the bytes of a packed file go, tensor by tensor."""
    if picture is not None:
        check_picture(picture)
    found = codec.inspect(source)
    if picture is not None:
        draw_tensors(found, picture)
    if json:
        print_json(_as_dict(found))
        return 0
    print_table(_table(found))
    typer.echo(
        f"{found.total:,} bytes: program {found.program:,}, weights {found.weights:,}. "
        f"Unpacked {found.original:,} bytes, {found.original / found.total:.2f} times as many ({found.source})."
    )
    return 0


def _table(found: Inspection) -> Table:
    table = Table("Tensor", "Type", "Shape", "Coding", box=None, pad_edge=False)
    for title in ("Bytes", "Stored", "Bits each"):
        table.add_column(title, justify="right")
    for row in found.tensors:
        shape = " x ".join(map(str, row.shape)) or "one"
        cells = (row.name, row.element, shape, row.coding, f"{row.size:,}", f"{row.stored:,}", f"{row.bits:.3f}")
        table.add_row(*map(Text, cells))
    return table


def _as_dict(found: Inspection) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(row), "bits": row.bits} for row in found.tensors]
    whole = {"bytes": found.total, "program_bytes": found.program, "weight_bytes": found.weights, "unpacked_bytes": found.original}
    return {"source": found.source, **whole, "tensors": rows}


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, nothing in a pipe: what is counted are bytes of tensors."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(pulse_style="white"), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda size: bar.advance(task, size)
