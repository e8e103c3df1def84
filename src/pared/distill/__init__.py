"""Distillation: a small network learns what a large one says (lecture, part 2)."""

from pared.distill.soft_targets import distillation_loss, soft_targets
from pared.distill.teach import Teach

__all__ = ["Teach", "distillation_loss", "soft_targets"]
