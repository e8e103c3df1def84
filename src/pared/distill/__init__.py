"""Distillation: a small network learns what a large one says (lecture, part 2)."""

from pared.distill.assistants import Assistants
from pared.distill.attention import Attention, attention_loss, attention_map
from pared.distill.decoupled import Decoupled, decoupled_losses
from pared.distill.direction import Direction, direction_loss
from pared.distill.dist import Dist, pearson_distance
from pared.distill.ensemble import Ensemble, mean_scores
from pared.distill.generations import Generations
from pared.distill.hints import Hint, hint_loss
from pared.distill.likeness import Agreement, Cosine, Divergence, SquaredError
from pared.distill.logits import Logits, logit_loss
from pared.distill.mutual import Mutual
from pared.distill.pairs import Pair, cka, match_layers
from pared.distill.relations import Relations, angle_loss, distance_loss
from pared.distill.similarity import Similarity, similarity_loss
from pared.distill.teach import Teach
from pared.training.soft_targets import distillation_loss, soft_targets

__all__ = [
    "Agreement",
    "Assistants",
    "Attention",
    "Cosine",
    "Decoupled",
    "Direction",
    "Dist",
    "Divergence",
    "Ensemble",
    "Generations",
    "Hint",
    "Logits",
    "Mutual",
    "Pair",
    "Relations",
    "Similarity",
    "SquaredError",
    "Teach",
    "angle_loss",
    "attention_loss",
    "attention_map",
    "cka",
    "decoupled_losses",
    "direction_loss",
    "distance_loss",
    "distillation_loss",
    "hint_loss",
    "logit_loss",
    "match_layers",
    "mean_scores",
    "pearson_distance",
    "similarity_loss",
    "soft_targets",
]
