"""The rows of the tables of a report, as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pared.report import words
from pared.report.run import Profile, Run


@dataclass(frozen=True)
class Cell:
    """A number as text, and what changed."""

    value: str
    change: str = ""


@dataclass(frozen=True)
class SummaryRow:
    """One measure of the original and the compressed network."""

    name: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class StepRow:
    """One step: what it took, and cells for parameters, MACs, file, latency and metric."""

    name: str
    seconds: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class BaselineRow:
    """One baseline, or the compressed network that it stands against."""

    name: str
    description: str
    cells: tuple[str, ...]
    ours: bool = False


@dataclass(frozen=True)
class ComparisonRow:
    """One network among several runs; a compressed one has a link to its own page and its run in one sentence."""

    name: str
    cells: tuple[Cell, ...]
    detail: str | None = None
    link: str | None = None
    headline: str = ""


def summary_rows(run: Run) -> list[SummaryRow]:
    """Original against compressed, one row for each measure that either has."""
    before, after = run.original, run.compressed
    change = words.change_of_drop(run)
    rows = [
        SummaryRow(
            words.metric_title(after.metric or before.metric),
            words.metric(before.metric),
            words.metric(after.metric),
            change or words.UNKNOWN,
        ),
        _counted("Parameters", before.params, after.params, run.ratios.get("params"), "fewer", "more"),
    ]
    if before.nonzero != before.params or after.nonzero != after.params:
        ratio = before.nonzero / after.nonzero if before.nonzero and after.nonzero else None
        rows.append(_counted("Not zero", before.nonzero, after.nonzero, ratio, "fewer", "more"))
    rows.append(_counted("MACs", before.macs, after.macs, run.ratios.get("macs"), "fewer", "more"))
    for title, key in (("File", "file_bytes"), ("On the wire", "wire_bytes")):
        sizes = getattr(before, key), getattr(after, key)
        rows.append(SummaryRow(title, words.size(sizes[0]), words.size(sizes[1]), _times(run.ratios.get(key), "smaller", "larger")))
    rows.append(SummaryRow("… program", words.size(before.program_bytes), words.size(after.program_bytes), words.UNKNOWN))
    weights = _weight_bytes(before), _weight_bytes(after)
    ratio = weights[0] / weights[1] if weights[0] and weights[1] else None
    rows.append(SummaryRow("… weights", words.size(weights[0]), words.size(weights[1]), _times(ratio, "smaller", "larger")))
    if before.latency is not None or after.latency is not None:
        for title, part in (("Latency, median", "median"), ("Latency, p90", "p90")):
            times = [getattr(profile.latency, part) if profile.latency else None for profile in (before, after)]
            ratio = run.ratios.get("latency") if part == "median" else times[0] / times[1] if times[0] and times[1] else None
            rows.append(SummaryRow(title, words.milliseconds(times[0]), words.milliseconds(times[1]), _times(ratio, "faster", "slower")))
    return [row for row in rows if (row.before, row.after) != (words.UNKNOWN, words.UNKNOWN)]


def _weight_bytes(profile: Profile) -> int | None:
    """Of the packed file; None where that isn't known."""
    return None if profile.wire_bytes is None or profile.program_bytes is None else profile.wire_bytes - profile.program_bytes


def step_rows(run: Run) -> list[StepRow]:
    """The steps in order; each is compared with the one before it, the first with the original."""
    rows, before = [], run.original
    for step in run.steps:
        rows.append(StepRow(step.name, words.seconds(step.seconds), _changes(before, step.profile)))
        before = step.profile
    return rows


def baseline_rows(run: Run) -> list[BaselineRow]:
    """The compressed network first, then the baselines."""
    ours = BaselineRow("compressed", "This run's result.", _plain(run.compressed), ours=True)
    return [ours, *(BaselineRow(entry.name, entry.description, _plain(entry.profile)) for entry in run.baselines)]


def profile_cells(profile: Profile, ratios: Mapping[str, float]) -> tuple[Cell, ...]:
    """Metric, parameters, MACs, file, wire and latency, with the ratio to the original where it is known."""
    latency = profile.latency.median if profile.latency else None
    return (
        Cell(words.metric(profile.metric)),
        Cell(words.count(profile.params), _factor(ratios.get("params"))),
        Cell(words.count(profile.macs), _factor(ratios.get("macs"))),
        Cell(words.size(profile.file_bytes), _factor(ratios.get("file_bytes"))),
        Cell(words.size(profile.wire_bytes), _factor(ratios.get("wire_bytes"))),
        Cell(words.milliseconds(latency), _factor(ratios.get("latency"))),
    )


def budget_words(budget: Mapping[str, Any], metric: str = "metric") -> str:
    """A budget as a person reads it; limits that weren't set are left out.

    >>> budget_words({"size": 0.1, "size_bytes": None, "latency": None, "drop": 0.01}, "accuracy")
    'file at most 0.1 of the original, accuracy at most 1 point lower'
    """
    parts = []
    for name, limit in budget.items():
        if limit is None:
            continue
        number = limit if isinstance(limit, int | float) and not isinstance(limit, bool) else None
        if name == "size" and number is not None:
            parts.append(f"file at most {number:.3g} of the original")
        elif name == "size_bytes" and number is not None:
            parts.append(f"file at most {words.size(number)}")
        elif name == "latency" and number is not None:
            parts.append(f"latency at most {number:.3g} of the original")
        elif name == "drop" and number is not None:
            points = f"{100 * number:.3g}"
            lower = f"{points} {'point' if points == '1' else 'points'} lower" if "accuracy" in metric.lower() else f"{number:.3g} worse"
            parts.append(f"{metric} at most {lower}" if number else f"{metric} no worse")
        else:
            parts.append(f"{name.replace('_', ' ')} {words.value(limit)}")
    return ", ".join(parts)


def _changes(before: Profile, after: Profile) -> tuple[Cell, ...]:
    times = [profile.latency.median if profile.latency else None for profile in (before, after)]
    return (
        Cell(words.count(after.params), words.change(before.params, after.params)),
        Cell(words.count(after.macs), words.change(before.macs, after.macs)),
        Cell(words.size(after.file_bytes), words.change(before.file_bytes, after.file_bytes)),
        Cell(words.milliseconds(times[1]), words.change(times[0], times[1])),
        Cell(words.metric(after.metric), _metric_change(before, after)),
    )


def _metric_change(before: Profile, after: Profile) -> str:
    """The difference of two qualities, if both were computed on the same split."""
    first, second = before.metric, after.metric
    if first is None or second is None or (first.name, first.split) != (second.name, second.split):
        return ""
    difference = second.value - first.value
    scale, unit, digits = (100, " points", 2) if second.is_share else (1, "", 4)
    text = f"{abs(scale * difference):.{digits}f}"
    return "unchanged" if float(text) == 0 else f"{'+' if difference > 0 else words.MINUS}{text}{unit}"


def _plain(profile: Profile) -> tuple[str, ...]:
    latency = profile.latency.median if profile.latency else None
    return (
        words.metric(profile.metric),
        words.count(profile.params),
        words.count(profile.macs),
        words.size(profile.file_bytes),
        words.milliseconds(latency),
    )


def _counted(title: str, before: float | None, after: float | None, ratio: float | None, fewer: str, more: str) -> SummaryRow:
    return SummaryRow(title, words.count(before), words.count(after), _times(ratio, fewer, more))


def _times(ratio: float | None, better: str, worse: str) -> str:
    """A ratio in words, for a cell: "6.1 times fewer", "1.2 times slower", "the same"."""
    if ratio is None or ratio <= 0:
        return words.UNKNOWN
    if abs(ratio - 1) < 0.0005:
        return "the same"
    value, word = (ratio, better) if ratio > 1 else (1 / ratio, worse)
    return f"{value:.2f} times {word}" if value < 1.095 else f"{words.ratio(value)} times {word}"


def _factor(ratio: float | None) -> str:
    return "" if ratio is None else f"ratio {words.ratio(ratio)}"
