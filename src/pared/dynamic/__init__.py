"""Networks that adapt how much they compute (lecture, part 5)."""

from pared.dynamic.early_exit import EarlyExit
from pared.dynamic.exits import Exits
from pared.dynamic.thresholds import choose_thresholds

__all__ = ["EarlyExit", "Exits", "choose_thresholds"]
