"""A run as one self-contained HTML page: no script, no fetched font or picture, the same bytes for the same run."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from pared.core.errors import RunError
from pared.core.files import write_atomic
from pared.report import words
from pared.report.figures import Network, layer_charts, networks_of, notes_on, quality_charts
from pared.report.rows import ComparisonRow, baseline_rows, budget_words, profile_cells, step_rows, summary_rows
from pared.report.run import Run, read_run

PAGE = "report.html"


def write_page(run_directory: str | Path) -> Path:
    """Write `report.html` into a run directory from the files that are there; only result.json is needed.

    Args:
        run_directory: a directory that `pared.compress` left.

    Returns:
        The path of the page.

    Raises:
        RunError: if result.json is missing or damaged (the message names the file and field), or the page can't be written.

    >>> write_page("runs/lenet5")  # doctest: +SKIP
    PosixPath('runs/lenet5/report.html')
    """
    run = read_run(run_directory)
    networks = networks_of(run)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            headline=words.headline(run),
            budget=budget_words(run.budget, run.compressed.metric.name if run.compressed.metric else "metric") if run.budget else None,
            rows=summary_rows(run),
            charts=quality_charts(networks),
            chart_notes=notes_on(networks),
            steps=step_rows(run),
            step_metric=words.metric_title(next((step.profile.metric for step in run.steps if step.profile.metric), None)),
            baselines=baseline_rows(run) if run.baselines else [],
            metric_name=words.metric_title(run.compressed.metric),
            layers=layer_charts(run.layers),
            measured=words.measured_how(run),
            environment=_stamp(run.environment),
        )
    )
    return _write(Path(run_directory) / PAGE, page)


def write_comparison(directory: str | Path, runs: Sequence[str | Path]) -> Path:
    """Write `report.html` into `directory`: the original and one row for each run, with a link to each run's own page.

    Args:
        directory: where the page goes; no run directory itself, whose page it would replace.
        runs: run directories.

    Raises:
        RunError: if there is no run, one of them can't be read, or `directory` is one of them.
    """
    if not runs:
        raise RunError(f"{directory}: a comparison needs at least one run directory.")
    if any(Path(run).resolve() == Path(directory).resolve() for run in runs):
        raise RunError(f"{directory}: is one of the runs to compare. Write the comparison to another directory.")
    read = [read_run(run) for run in runs]
    networks = _networks_of_all(read)
    charts = quality_charts(networks)
    page = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            subject=", ".join(dict.fromkeys(f"{run.model} on {run.data}" for run in read)),
            title=words.comparison_headline(read),
            metric_name=words.metric_title(next((run.compressed.metric for run in read if run.compressed.metric), None)),
            originals=_original_rows(read),
            rows=[
                ComparisonRow(
                    run.name,
                    profile_cells(run.compressed, run.ratios),
                    words.change_of_drop(run),
                    _link(Path(path) / PAGE, Path(directory)),
                    words.headline(run),
                )
                for run, path in zip(read, runs, strict=True)
            ],
            charts=charts,
            chart_notes=notes_on(networks),
            measured=list(dict.fromkeys(sentence for run in read for sentence in words.measured_how(run))),
            environment=_stamp(next((run.environment for run in read if run.environment), None)),
        )
    )
    return _write(Path(directory) / PAGE, page)


def _networks_of_all(runs: Sequence[Run]) -> list[Network]:
    """The originals that differ, every compressed network under its run's name, and the baselines that differ."""
    originals = {run.original.file_bytes: Network(_original_name(run, runs), run.original, "original") for run in reversed(runs)}
    compressed = [Network(run.name, run.compressed, "compressed") for run in runs]
    rivals = {baseline.name: baseline for run in runs for baseline in run.baselines}
    # with many runs their baselines would hide them: each run's page shows its own
    shown = [Network(rival.name, rival.profile, "baseline") for rival in rivals.values()] if len(runs) == 1 or len(rivals) <= 3 else []
    return [*reversed(originals.values()), *compressed, *shown]


def _original_name(run: Run, runs: Sequence[Run]) -> str:
    return "original" if len({other.model for other in runs}) == 1 else f"{run.model}, original"


def _original_rows(runs: Sequence[Run]) -> list[ComparisonRow]:
    """One row for each original that differs, as its first run measured it."""
    first: dict[tuple[str, int | None], Run] = {}
    for run in runs:
        first.setdefault((run.model, run.original.file_bytes), run)
    return [ComparisonRow(_original_name(run, runs), profile_cells(run.original, {})) for run in first.values()]


def _stamp(environment: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The environment as pairs of name and text; nested objects are written out one below the other."""
    pairs = []
    for name, value in (environment or {}).items():
        if isinstance(value, Mapping):
            pairs += [(str(inner), words.value(entry)) for inner, entry in value.items()]
        else:
            pairs.append((str(name), words.value(value)))
    return pairs


def _link(target: Path, start: Path) -> str:
    return quote(Path(os.path.relpath(target.resolve(), start.resolve())).as_posix())


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pared.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    # the style sheet is part of pared, so it isn't escaped
    environment.globals["style"] = Markup(environment.loader.get_source(environment, "style.css")[0])
    return environment


def _write(path: Path, page: str) -> Path:
    # a name may hold half a character (a lone surrogate), which no file can
    write_atomic(path, page.encode("utf-8", errors="replace"))
    return path
