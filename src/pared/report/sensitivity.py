"""A picture of how the metric falls when one class of neurons is cut at a time."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pared.prune.sensitivity import ClassSensitivity, Sensitivity
from pared.report.charts import shorten
from pared.report.pictures import FONT, LINE, MUTED, STYLE, check_picture, save

NAMED = 8  # lines with a colour and a name; more can't be told apart
# dark enough for text on white, and different in lightness as well as in hue
_COLOURS = ("#0b6b63", "#d55e00", "#0072b2", "#aa3377", "#8a6d00", "#56a0d3", "#6b4c9a", "#4d4d4d")


def write_sensitivity(found: Sensitivity, path: str | Path) -> Path:
    """Draw the metric against the share that is kept, one line for each class, to an SVG or PNG file.

    Lines start at the uncut network on the left. The eight classes that lose most have a colour and their name at the end; the
    others are thin and grey, so that a network of many classes stays readable. The bytes depend on nothing but the numbers.

    Args:
        found: from `prune.sensitivity`.
        path: ends in .svg or .png.

    Raises:
        SettingsError: for another ending.
        RunError: if the folder doesn't exist, or the file can't be written.
    """
    path = check_picture(path)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2))
        axes = figure.add_axes((0.08, 0.13, 0.62, 0.77))
        _frame(axes, found)
        ranked = found.ranked()
        for each in reversed(ranked[NAMED:]):
            axes.plot(*_line(found, each), color=MUTED, linewidth=0.8, alpha=0.35)
        for each, colour in reversed(list(zip(ranked, _COLOURS, strict=False))):
            axes.plot(*_line(found, each), color=colour, linewidth=1.6, marker="o", markersize=3.5, clip_on=False)
        _name_lines(axes, found, ranked)
        save(figure, path)
    return path


def _line(found: Sensitivity, each: ClassSensitivity) -> tuple[list[float], list[float]]:
    """Shares in percent and values, from the uncut network down."""
    points = sorted([(1.0, found.original), *((point.share, point.metric) for point in each.points)], key=lambda point: -point[0])
    return [100 * share for share, _ in points], [value for _, value in points]


def _frame(axes: Axes, found: Sensitivity) -> None:
    least = 100 * min(found.shares)
    axes.set_xlim(100 + 0.01 * (100 - least) + 0.1, least - 0.1)
    axes.set_xticks(sorted({100.0, *(100 * share for share in found.shares)}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    axes.set_xlabel("neurons of one class that are kept")
    axes.set_title(f"{found.metric.capitalize()} on the validation split", loc="left", fontsize=FONT, color=MUTED)
    axes.axhline(found.original, color=LINE, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _name_lines(axes: Axes, found: Sensitivity, ranked: list[ClassSensitivity]) -> None:
    """The names of the coloured lines at their right ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    named = [(_end(_line(found, each)[1], low), each, colour) for each, colour in zip(ranked, _COLOURS, strict=False)]
    ends = sorted(named, key=lambda entry: entry[0])
    gap = (high - low) * 0.05
    heights = _apart([value for value, _, _ in ends], gap, low, high)
    right = axes.get_xlim()[1]
    for (value, each, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            shorten(each.layers[0], 20) + (f" +{len(each.layers) - 1}" if len(each.layers) > 1 else ""),
            (right, value),
            xytext=(1.04, (height - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)},
            annotation_clip=False,
            parse_math=False,
        )
    more = len(ranked) - len(named)
    if more > 0:
        axes.text(1.04, 1.06, f"{more} more in grey", transform=axes.transAxes, color=MUTED, va="center")
    axes.set_ylim(low, high)


def _end(values: list[float], otherwise: float) -> float:
    """The last value that is a number: a line breaks off where a network gives NaN."""
    return next((value for value in reversed(values) if math.isfinite(value)), otherwise)


def _apart(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Heights at least `gap` apart and inside the frame, near to ascending `values`."""
    heights: list[float] = []
    for value in values:
        heights.append(max(value, heights[-1] + gap if heights else low))
    ceiling = high
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - gap
    return heights
