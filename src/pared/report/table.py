"""Results as tables for the terminal; in a pipe the same text, plain and aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pared.report import words
from pared.report.rows import Cell, profile_cells, summary_rows
from pared.report.run import Run, parse_result, read_run

_UNBOUNDED = 10_000  # columns; wider than any table


@runtime_checkable
class Finished(Protocol):
    """The result of a run as `pared.compress` returns it."""

    directory: Path

    def to_dict(self) -> dict[str, Any]:
        """The content of result.json."""
        ...


Result = Run | Finished | Mapping[str, Any] | str | Path


def result_table(result: Result) -> Table:
    """Original against compressed: accuracy, parameters, MACs, bytes and latency with their units, and the change in words.

    Args:
        result: what `pared.compress` returned, the content of a result.json, a `Run`, or the path of a run directory.

    Raises:
        RunError: if the result can't be read; the message names the file and field.

    >>> table = result_table({"schema": 1, "model": "m", "data": "d", "original": {"params": 8}, "compressed": {"params": 2}})
    >>> print_table(table)
    m on d      Original  Compressed  Change
    Parameters         8           2  4.0 times fewer
    """
    run = _as_run(result)
    table = _table(f"{run.model} on {run.data}", ["Original", "Compressed"])
    table.add_column("Change")
    for row in summary_rows(run):
        table.add_row(Text(row.name), Text(row.before), Text(row.after, style="bold"), Text(row.change))
    return table


def comparison_table(results: Sequence[Result]) -> Table:
    """One row for the original and one for each recipe, with the ratio to the original behind each number.

    The original is the first result's; every ratio is that of the row's own run, so it is fair even if the machine's speed drifted.
    """
    runs = [_as_run(result) for result in results]
    title = words.metric_title(next((run.compressed.metric for run in runs if run.compressed.metric), None))
    table = _table("", [title, "Parameters", "MACs", "File", "On the wire", "Latency (median)"])
    if runs:
        table.add_row(Text("original"), *(_written(cell) for cell in profile_cells(runs[0].original, {})))
    for run in runs:
        cells = profile_cells(run.compressed, run.ratios)
        table.add_row(Text(run.name), *(_written(cell) for cell in cells))
    return table


def print_table(table: Table, file: IO[str] | None = None) -> None:
    """Print a table to `file` (the standard output if None); in a pipe no line is cut at 80 columns and nothing is coloured."""
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(file=file, highlight=False, width=_UNBOUNDED)
    with wide.capture() as capture:
        wide.print(table)
    # rich fills every line up to its table's width
    wide.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _table(corner: str, numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(Text(corner))
    for title in numbers:
        table.add_column(Text(title), justify="right")
    return table


def _written(cell: Cell) -> Text:
    text = Text(cell.value)
    if cell.change:
        text.append(f" ({cell.change.removeprefix('ratio ')}x)", style="dim")
    return text


def _as_run(result: Result) -> Run:
    if isinstance(result, Run):
        return result
    if isinstance(result, Finished):
        return parse_result(result.to_dict(), source="result", directory=result.directory)
    return read_run(result) if isinstance(result, str | Path) else parse_result(result, source="result")


__all__ = ["comparison_table", "print_table", "result_table"]
