"""Reports: tables on the terminal, one self-contained HTML page, and progress while a run is going."""

from __future__ import annotations

from pared.report.page import write_comparison, write_page
from pared.report.progress import Progress
from pared.report.run import Run, parse_result, read_run
from pared.report.table import comparison_table, print_table, result_table
from pared.report.words import headline

__all__ = [
    "Progress",
    "Run",
    "comparison_table",
    "headline",
    "parse_result",
    "print_table",
    "read_run",
    "result_table",
    "write_comparison",
    "write_page",
]
