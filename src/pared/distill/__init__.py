"""Distillation: a small network learns what a large one says (lecture, part 2)."""

from pared.distill.teach import Teach
from pared.training.soft_targets import distillation_loss, soft_targets

__all__ = ["Teach", "distillation_loss", "soft_targets"]
