"""The lab: one folder an experiment, with its card, its code and its committed result."""

from __future__ import annotations

from pared.lab.catalogue import Entry, entries, entry
from pared.lab.experiment import Experiment, Row, Verdict, run
from pared.lab.results import Results

__all__ = ["Entry", "Experiment", "Results", "Row", "Verdict", "entries", "entry", "run"]
