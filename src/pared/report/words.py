"""Numbers as people read them, and the sentence at the head of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pared.report.run import Metric, Run

UNKNOWN = "–"
MINUS = "\N{MINUS SIGN}"
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, never in scientific notation.

    >>> significant(0.08512), significant(1234.5), significant(999.96)
    ('0.0851', '1,234', '1,000')
    """
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(places, 0)}f}" if places > 0 else f"{round(value):,}"


def _scaled(value: float, unit: str) -> str:
    for size, prefix in _STEPS:
        if abs(value) >= size * 0.9995 or size == 1.0:
            return f"{significant(value / size)} {prefix}{unit}".rstrip()
    raise AssertionError("the last step takes every number")


def count(value: float | None) -> str:
    """Parameters or multiply-accumulates: exact up to 9,999, then three digits and k, M, G, T.

    >>> count(9870), count(44426), count(999_950)
    ('9,870', '44.4 k', '1.00 M')
    """
    if value is None:
        return UNKNOWN
    return f"{round(value):,}" if abs(value) < 9999.5 else _scaled(value, "")


def size(value: float | None) -> str:
    """Bytes on disk; kB and MB are powers of 1000.

    >>> size(812), size(999_999), size(180_512)
    ('812 B', '1.00 MB', '181 kB')
    """
    if value is None:
        return UNKNOWN
    return f"{round(value)} B" if abs(value) < 999.5 else _scaled(value, "B")


def milliseconds(value: float | None) -> str:
    """A time given in milliseconds; nothing below a microsecond is shown of one that lasts at least ten.

    >>> milliseconds(12.345), milliseconds(0.04056), milliseconds(0.00123)
    ('12.3 ms', '0.041 ms', '0.00123 ms')
    """
    if value is None:
        return UNKNOWN
    return f"{value:.3f} ms" if 0.01 <= value < 0.0995 else f"{significant(value)} ms"


def seconds(value: float | None) -> str:
    """A time given in seconds, as "12.3 s", "4 min 05 s" or "2 h 03 min"."""
    if value is None:
        return UNKNOWN
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def metric(value: Metric | None) -> str:
    """A quality: an accuracy in percent, anything else as it is."""
    if value is None:
        return UNKNOWN
    return f"{100 * value.value:.2f} %" if value.is_share else significant(value.value, 4).replace("-", MINUS)


def ratio(value: float | None) -> str:
    """A ratio with one decimal (two below 1, none from 100), without a word."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def change(before: float | None, after: float | None) -> str:
    """What a step did to a number, in percent of what was there before it; empty if unknown."""
    if not before or after is None:
        return ""
    percent = 100 * (after / before - 1)
    if abs(percent) < 0.05:
        return "unchanged"
    text = f"{abs(percent):.0f}" if abs(percent) >= 10 else f"{abs(percent):.1f}"
    return f"{'+' if percent > 0 else MINUS}{text} %"


def value(anything: Any) -> str:
    """A setting, as YAML would write it on one line."""
    if isinstance(anything, bool):
        return "true" if anything else "false"
    if anything is None:
        return "none"
    if isinstance(anything, dict):
        return ", ".join(f"{key}: {value(entry)}" for key, entry in anything.items())
    if isinstance(anything, list | tuple):
        return "[" + ", ".join(value(entry) for entry in anything) + "]"
    return f"{anything:g}" if isinstance(anything, float) else str(anything)


def metric_title(value: Metric | None) -> str:
    """The head of a column: "Accuracy, test"."""
    return "Metric" if value is None else value.name.capitalize() + (f", {value.where}" if value.where else "")


def drop(run: Run) -> float | None:
    """By how much the compressed network is worse (negative: better), in the metric's own unit."""
    if run.drop is not None:
        return run.drop
    before, after = run.original.metric, run.compressed.metric
    # without a recorded drop only a share tells which direction is worse
    if before is None or after is None or not before.is_share or before.split != after.split:
        return None
    return before.value - after.value


def drop_words(run: Run) -> str | None:
    """For example "0.4 points less accurate on test"."""
    worse, after = drop(run), run.compressed.metric
    if worse is None or after is None:
        return None
    where = f" on {after.where}" if after.where else ""
    if after.is_share:
        points = f"{abs(100 * worse):.1f}" if abs(100 * worse) >= 0.095 else f"{abs(100 * worse):.2f}"
        if float(points) == 0:
            return f"exactly as accurate{where}" if worse == 0 else f"as accurate{where}"
        return f"{points} {'point' if points == '1.0' else 'points'} {'less' if worse > 0 else 'more'} accurate{where}"
    if worse == 0:
        return f"the same {after.name}{where}"
    return f"{after.name} {'worse' if worse > 0 else 'better'} by {significant(abs(worse))}{where}"


def size_words(ratio_of_bytes: float | None) -> str | None:
    """For example "12.3 times smaller"; within 5 percent it is "the same size"."""
    return _compared(ratio_of_bytes, "times smaller", "times larger", "about the same size")


def speed_words(latency: float | None, macs: float | None) -> str | None:
    """What was timed decides; multiply-accumulates are named where nothing was timed, or where fewer of them did not help."""
    timed = _compared(latency, "times faster", "times slower", "about as fast")
    fewer = f"{ratio(macs)} times fewer MACs" if macs is not None and macs >= 1.05 else None
    if timed is None:
        return fewer
    if latency is not None and latency < 1.05 and fewer is not None:
        return f"{timed} in spite of {fewer}"
    return timed


def _compared(measured: float | None, better: str, worse: str, same: str) -> str | None:
    if measured is None or measured <= 0:
        return None
    if measured >= 1.05:
        return f"{ratio(measured)} {better}"
    return f"{ratio(1 / measured)} {worse}" if 1 / measured >= 1.05 else same


def headline(run: Run) -> str:
    """The run in one sentence of measured ratios.

    >>> from pared.report.run import parse_result
    >>> before, after = {"file_bytes": 1230, "macs": 900}, {"file_bytes": 100, "macs": 300}
    >>> headline(parse_result({"schema": 1, "model": "lenet5", "data": "digits", "original": before, "compressed": after}))
    '12.3 times smaller, 3.0 times fewer MACs'
    """
    parts = [size_words(run.ratios.get("file_bytes")), speed_words(run.ratios.get("latency"), run.ratios.get("macs")), drop_words(run)]
    return ", ".join(part for part in parts if part) or "nothing was measured in this run"


def comparison_headline(runs: Sequence[Run]) -> str:
    """How many recipes, and which of them came out smallest and fastest, at what cost."""
    parts = []
    for key, better in (("file_bytes", "times smaller"), ("latency", "times faster")):
        best = max(runs, key=lambda run: run.ratios.get(key, 0.0))
        if (most := best.ratios.get(key, 0.0)) >= 1.05:
            cost = change_of_drop(best)
            parts.append(f"{ratio(most)} {better} ({best.name}{f', {cost}' if cost else ''})")
    start = f"{len(runs)} {'recipe' if len(runs) == 1 else 'recipes'}"
    return f"{start}: up to {' and '.join(parts)}" if parts else f"{start}, none smaller or faster than the original"


def measured_how(run: Run) -> list[str]:
    """How the numbers of a run came about, one sentence each, as far as it is recorded."""
    profile, sentences = run.compressed, []
    if profile.macs is not None:
        sentences.append("A MAC is one multiply-add; MACs are counted for one input.")
    if profile.wire_bytes is not None:
        sentences.append("On the wire is what one would send: the deployed file packed without loss, again as bytes on disk.")
    if profile.program_bytes is not None:
        sentences.append("Its program is the graph with all names; its weights are all else.")
    if (time := profile.latency) is not None:
        parts = [
            f"the engine {time.engine}" if time.engine else "",
            f"{time.threads} {'thread' if time.threads == 1 else 'threads'}" if time.threads else "",
            f"batches of {time.batch}" if time.batch else "",
        ]
        known = ", ".join(part for part in parts if part)
        tail = f", measured with {known}" if known else ""
        sentences.append(f"Latency is the median time of one call{tail}; original and compressed are timed in turns in one process.")
    if any(step.name.startswith("dynamic.") for step in run.steps):
        sentences.append("A network that stops early computes more for some inputs than for others; its MACs and latency are means.")
    if (quality := profile.metric) is not None:
        where = f" on the {quality.where} split" if quality.where else ""
        source = f", read from {quality.file}" if quality.file else ""
        sentences.append(f"{quality.name.capitalize()} was computed{where}{source}.")
    return sentences


def change_of_drop(run: Run) -> str | None:
    """The difference in quality for a table cell: "0.40 points less", "the same", or in the metric's own unit."""
    worse, after = drop(run), run.compressed.metric
    if worse is None or after is None:
        return None
    if worse == 0:
        return "the same"
    if after.is_share:
        return f"{abs(100 * worse):.2f} points {'less' if worse > 0 else 'more'}"
    return f"{significant(abs(worse))} {'worse' if worse > 0 else 'better'}"
