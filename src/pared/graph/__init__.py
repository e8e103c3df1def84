"""The analysis that all families share: capture, labels, cutting, counting, folding."""

from pared.graph.capture import Captured, capture
from pared.graph.counts import Counts, ModuleCount, count
from pared.graph.fold import fold_batch_norm
from pared.graph.staged import Staged

__all__ = ["Captured", "Counts", "ModuleCount", "Staged", "capture", "count", "fold_batch_norm"]
