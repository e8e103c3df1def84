"""What all pictures have in common: their look, the files they can be, and bytes that depend on nothing but the numbers."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pared.core.errors import RunError, SettingsError
from pared.core.files import write_atomic

INK, MUTED, LINE, PAPER = "#1b1f24", "#59636e", "#d8dde2", "#ffffff"
FONT = 10.0
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pared",
    "font.size": FONT,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
}


def check_picture(path: str | Path) -> Path:
    """A path that a picture can be written to.

    Raises:
        SettingsError: if it doesn't end in .svg or .png.
        RunError: if its folder doesn't exist.
    """
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise SettingsError(f"the picture must be a file that ends in .svg or .png. Got {path}.")
    if not path.parent.is_dir():
        raise RunError(f"{path.parent}: no such folder, so the picture can't be written there.")
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a figure as `check_picture` allows; the file appears whole or not at all."""
    stream = io.BytesIO()
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(stream, format=kind, dpi=160, metadata=metadata)
    write_atomic(path, stream.getvalue())
