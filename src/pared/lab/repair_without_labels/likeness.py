"""How near the outputs of one network are to those of another."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.distill import Cosine, Divergence


def scores_alike(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Of class scores: the share of samples with the same highest one, the mean divergence, the mean cosine of scores less their mean.

    >>> scores = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
    >>> scores_alike(scores, scores)
    {'agreement': 1.0, 'divergence': 0.0, 'cosine': 1.0}
    """
    centred = [scores - scores.mean(1, keepdim=True) for scores in (outputs, targets)]
    return {
        "agreement": float((outputs.argmax(1) == targets.argmax(1)).float().mean()),
        "divergence": float(Divergence()(outputs, targets).mean()),
        "cosine": float(Cosine()(*centred).mean()),
    }


def embeddings_alike(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Of embeddings of length 1: the mean cosine, and the rank correlation of the similarities of all pairs.

    >>> one = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 3.0]]))
    >>> embeddings_alike(one, one)
    {'cosine': 1.0, 'rank_correlation': 1.0}
    """
    return {
        "cosine": float(Cosine()(outputs, targets).mean()),
        "rank_correlation": rank_correlation(similarities(outputs), similarities(targets)),
    }


def similarities(embeddings: Tensor) -> Tensor:
    """The products of all pairs of rows, each pair once."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings @ embeddings.T)[first, second]


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's: the correlation of ranks; equal values share the mean of their ranks.

    >>> round(rank_correlation(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([2.0, 3.0, 900.0])), 6)
    1.0
    """
    ranks = torch.stack([mean_ranks(values) for values in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


def mean_ranks(values: Tensor) -> Tensor:
    """The place of every value in order, from 0.

    >>> mean_ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    before = counts.cumsum(0) - counts
    return (before + (counts - 1) / 2).double()[places]
