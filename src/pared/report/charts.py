"""Charts as SVG text that takes its colours from the page, and whose bytes depend on nothing but the numbers."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pared.report.labels import Box, place

Kind = Literal["original", "step", "compressed", "baseline"]

# matplotlib knows no CSS, so each role gets a colour of its own that is replaced by the page's variable afterwards
_ROLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    "#050505": "var(--rival)",
    "#060606": "var(--paper)",
}
_INK, _MUTED, _LINE, _ACCENT, _RIVAL, _PAPER = _ROLES
_MARKS: dict[Kind, tuple[str, str, str, float]] = {  # marker, fill, edge, area
    "original": ("s", _INK, _INK, 42),
    "step": ("o", _PAPER, _ACCENT, 34),
    "compressed": ("o", _ACCENT, _ACCENT, 62),
    "baseline": ("^", _RIVAL, _RIVAL, 50),
}
_WIDTH = 360.0  # of a chart, in CSS pixels: a phone shows it at about its natural size
_FONT = 11.0
_LETTER = 0.57 * _FONT  # mean width of a letter; browsers choose the font, so it can only be estimated
_BOLD_LETTER = 0.66 * _FONT
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.size": _FONT,
    "font.family": ["DejaVu Sans"],  # the page's style sheet puts its own font in its place
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
}


@dataclass(frozen=True)
class Point:
    """One network in a chart."""

    label: str
    x: float
    y: float
    kind: Kind


@dataclass(frozen=True)
class Axis:
    """What an axis says and how its numbers are written."""

    title: str
    write: Callable[[float], str]


def scatter(points: Sequence[Point], x: Axis, y: Axis, title: str, key: str) -> Markup:
    """A chart of points, each with its name beside it.

    The horizontal axis is logarithmic where the values span a factor of three or more. Steps are joined in order by a line that
    starts at the original and ends at the compressed network.

    Args:
        points: what to show; x must be greater than 0.
        x: horizontal axis.
        y: vertical axis.
        title: one sentence for people who can't see the chart.
        key: a short word, different for each chart of a page, from which the ids in the SVG are made.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(_WIDTH / 72, 270 / 72))
        axes = figure.add_axes((0.14, 0.16, 0.82, 0.74))
        _frame_points(axes, points, x, y)
        path = [point for point in points if point.kind == "original"] + [point for point in points if point.kind == "step"]
        path += [point for point in points if point.kind == "compressed"]
        if any(point.kind == "step" for point in points):
            axes.plot([p.x for p in path], [p.y for p in path], color=_ACCENT, linewidth=1, alpha=0.45, zorder=1)
        for point in points:
            marker, fill, edge, area = _MARKS[point.kind]
            axes.scatter([point.x], [point.y], s=area, marker=marker, c=fill, edgecolors=edge, linewidths=1.4, zorder=3)
        _name_points(axes, figure, points)
        return _svg(figure, title, key)


def _frame_points(axes: Axes, points: Sequence[Point], x: Axis, y: Axis) -> None:
    """Limits, scale, grid and titles of a scatter chart."""
    across, up = [point.x for point in points], [point.y for point in points]
    low, high = min(across), max(across)
    if high >= 3 * low:
        axes.set_xscale("log")
        margin = (high / low) ** 0.16
        axes.set_xlim(low / margin, high * margin)
        # a decade or more: 1, 10, 100; less: 1, 2, 5
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0), numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
    else:
        margin = 0.2 * (high - low) or 0.2 * high
        axes.set_xlim(max(low - margin, 0), high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    spread = (max(up) - min(up)) or 0.02 * abs(max(up)) or 1.0
    axes.set_ylim(min(up) - 0.16 * spread, max(up) + 0.16 * spread)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_number(x.write(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_number(y.write(value))))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel(x.title)
    # a title that is turned by 90 degrees is hard to read; it stands above the axis
    axes.set_title(y.title, loc="left", x=-0.14, fontsize=_FONT, color=_MUTED)


def _round_number(text: str) -> str:
    """Drop the zeros behind the point: 20.0 kB is 20 kB on an axis."""
    return re.sub(r"(\.\d*?)0+(?!\d)", r"\1", text).replace(". ", " ").rstrip(".")


def _name_points(axes: Axes, figure: Figure, points: Sequence[Point]) -> None:
    """Write each point's name beside it, in units of 1/72 inch."""
    names = [shorten(point.label, 26) for point in points]
    scale = 72 / figure.dpi
    marks = [tuple(scale * axes.transData.transform((point.x, point.y))) for point in points]
    frame = axes.bbox
    order = sorted(range(len(points)), key=lambda index: ("original", "compressed", "baseline", "step").index(points[index].kind))
    places = place(
        [marks[index] for index in order],
        [((_BOLD_LETTER if points[index].kind == "compressed" else _LETTER) * len(names[index]), 1.15 * _FONT) for index in order],
        Box(scale * frame.x0, scale * frame.y0, scale * frame.x1 + 8, scale * frame.y1),
    )
    for index, chosen in zip(order, places, strict=True):
        box, (x, y), kind = chosen.box, marks[index], points[index].kind
        anchor = "left" if box.left > x else "right" if box.right < x else "center"
        across = {"left": box.left, "right": box.right, "center": (box.left + box.right) / 2}[anchor]
        axes.annotate(
            names[index],
            (points[index].x, points[index].y),
            xytext=(across - x, (box.bottom + box.top) / 2 - y),
            textcoords="offset points",
            ha=anchor,
            va="center_baseline",
            color={"original": _INK, "step": _MUTED, "compressed": _ACCENT, "baseline": _RIVAL}[kind],
            fontweight="bold" if kind == "compressed" else "normal",
            arrowprops={"arrowstyle": "-", "color": _LINE, "linewidth": 0.8, "shrinkB": 5} if chosen.far else None,
            parse_math=False,
            zorder=4,
        )


@dataclass(frozen=True)
class Bar:
    """One layer before and after."""

    label: str
    before: float
    after: float


def bars(rows: Sequence[Bar], write: Callable[[float], str], title: str, key: str) -> Markup:
    """Pairs of horizontal bars, the original above the compressed network; `write` turns a value into text."""
    height = 22 + 26 * len(rows)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(_WIDTH / 72, height / 72))
        names = [shorten(row.label, 20) for row in rows]
        left = min(0.4, 0.03 + _LETTER * max(len(name) for name in names) / _WIDTH)
        axes = figure.add_axes((left, 4 / height, 0.97 - left, 1 - 8 / height))
        largest = max(max(row.before, row.after) for row in rows) or 1.0
        for index, row in enumerate(rows):
            # thin bars that touch: the pair reads as one row
            axes.barh(index - 0.17, row.before, height=0.34, color=_MUTED, alpha=0.55)
            axes.barh(index + 0.17, row.after, height=0.34, color=_ACCENT)
            text = f"{write(row.before)} \N{RIGHTWARDS ARROW} {write(row.after)}" if row.before != row.after else write(row.before)
            axes.text(max(row.before, row.after) + 0.015 * largest, index, text, va="center_baseline", color=_MUTED, parse_math=False)
        longest = max(len(write(row.before) + write(row.after)) + 3 for row in rows)
        room = 1 - _LETTER * longest / (_WIDTH * (0.97 - left))
        axes.set_xlim(0, largest / max(room, 0.3))
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), names, parse_math=False)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, title, key)


def shorten(text: str, length: int) -> str:
    """Cut the middle out of a text that is longer than `length`, and replace what can't be shown.

    >>> shorten("features.12.conv.pointwise", 13)
    'featur…ntwise'
    """
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    if len(text) <= length:
        return text
    head = length // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def _svg(figure: Figure, title: str, key: str) -> Markup:
    """The figure as an inline SVG element: no date, no XML prolog, ids that are unique on the page, CSS colours."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        # the browser brings the font; matplotlib's own lacks many scripts and says so
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-labelledby="{key}-title">', text, count=1)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{key}-', text).replace("url(#", f"url(#{key}-")
    for sentinel, variable in _ROLES.items():
        text = text.replace(sentinel, variable)
    # a style element would reach the whole page
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = text.replace(">", f'>\n <title id="{key}-title">{escape(title)}</title>', 1)
    return Markup("\n".join(line.rstrip() for line in text.splitlines()))
