"""A picture of a packed file: which tensor takes how many bytes, and how it is coded."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pared.codec import Inspection
from pared.report.charts import shorten
from pared.report.pictures import FONT, LINE, MUTED, STYLE, check_picture, save

SHOWN = 30
"""The most tensors that have a bar of their own."""

_STORED, _SAVED = "#0b6b63", LINE


def draw_tensors(found: Inspection, path: str | Path) -> Path:
    """Draw what each tensor takes before and after, the largest first, as bars with its coding and bits for each entry.

    Args:
        found: from `codec.inspect`.
        path: ends in .svg or .png.

    Raises:
        SettingsError: for another ending.
        RunError: if the folder doesn't exist, or the file can't be written.
    """
    path = check_picture(path)
    ranked = sorted(found.tensors, key=lambda row: -row.size)
    shown, others = ranked[:SHOWN], ranked[SHOWN:]
    names = [shorten(row.name, 28) for row in shown]
    bars = [(row.size, row.stored, f"{row.coding}, {row.bits:.2f} bits") for row in shown]
    if others:
        names.append(f"{len(others)} others")
        bars.append((sum(row.size for row in others), sum(row.stored for row in others), ""))
    with matplotlib.rc_context(STYLE):
        height = 1.1 + 0.24 * max(len(bars), 1)
        figure = Figure(figsize=(8.4, height))
        axes = figure.add_axes((0.26, 0.5 / height, 0.7, 1 - 1.0 / height))
        places = range(len(bars))
        axes.barh(places, [size for size, _, _ in bars], color=_SAVED, height=0.7)
        axes.barh(places, [stored for _, stored, _ in bars], color=_STORED, height=0.7)
        most = max([size for size, _, _ in bars], default=1)
        for place, (size, _, words) in enumerate(bars):
            inside = size > 0.6 * most
            axes.text(size - 0.008 * most if inside else size + 0.008 * most, place, words, va="center", ha="right" if inside else "left")
        axes.set_yticks(list(places), names)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("bytes")
        title = f"{found.total:,} bytes stored (dark) of {found.original:,}"
        figure.text(0.02, 1 - 0.3 / height, title, fontsize=FONT, color=MUTED)
        save(figure, path)
    return path
