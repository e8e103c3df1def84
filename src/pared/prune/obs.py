"""Optimal brain surgery of one layer: which weights go, and how the others make up for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pared.core.errors import ModelError
from pared.core.layers import Layer
from pared.prune.masks import alive, set_mask, set_weight
from pared.prune.patterns import NofM, Pattern, from_matrix, pattern_of, to_matrix
from pared.prune.selection import highest
from pared.training import Task
from pared.training.layer_inputs import execution_order, layer_gram
from pared.training.samples import first_inputs

Pick = Callable[[Tensor], Tensor]
"""From scores of shape (rows, columns) to a boolean tensor that marks what stays, always equally many."""

_WINDOW = 16
"""Columns decided at a time. SparseGPT takes 128 in layers of thousands; in layers of a few hundred 16 loses up to half as much."""


def obs_prune(weight: Tensor, gram: Tensor, pick: Pick, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Remove weights of a layer so that its outputs on the calibration inputs change little, and refit those that stay.

    The change of the outputs is Σ (w - w')ᵀ G (w - w') over the rows. Removing one weight p costs w_p² / [G⁻¹]_pp (Hassibi & Stork 1993).
    What goes is found in two ways: by this cost alone, and by the sweep of SparseGPT (Frantar & Alistarh 2023, 2301.00774, algorithm 1),
    which decides a few columns at a time, moves their error to the columns on the right and ranks anew. After either the weights that
    stay are refitted exactly, row by row. The better of the two is returned, or plain magnitude if that were better still: the error
    is never larger than that of plain magnitude with the same count.

    Args:
        weight: shape (rows, columns), one row for each output.
        gram: XᵀX of the inputs, shape (columns, columns), any positive scale; X has one row for each sample or position.
        pick: marks what stays, from scores. It sees +inf where the sweep has decided for a weight, -inf where against it.
        damping: added to the diagonal of `gram`, as a share of its mean; 0.01 is SparseGPT's. It holds back weights of inputs that
            hardly vary.

    Returns:
        The new weight, with exact zeros, and the mask, True where a weight stays; weight in the dtype it came in.

    >>> from pared.prune.selection import select
    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> weight, mask = obs_prune(torch.tensor([[1.0, 0.5]]), gram, lambda scores: select(scores, 0.5), damping=0.0)
    >>> mask.tolist(), round(weight[0, 0].item(), 3)
    ([[True, False]], 1.45)
    """
    exact, dense = gram.double(), weight.double()
    damped = _damp(exact, damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    useful = dense.masked_fill(exact.diagonal() == 0, 0.0)  # the weights of an input that is always zero cost nothing
    masks = [pick(useful.square() / inverse.diagonal()), _sweep(useful, inverse, pick)]
    results = [(refit(dense, damped, inverse, mask), mask) for mask in masks]
    smallest = pick(dense.abs())
    results.append((dense.masked_fill(~smallest, 0.0), smallest))
    new, mask = min(results, key=lambda result: output_error(dense, result[0], exact))
    return new.to(weight.dtype), mask


def output_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """The squared change of a layer's outputs, summed over samples and outputs: ‖X (W - W')ᵀ‖² = Σ (w - w')ᵀ G (w - w').

    >>> output_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.eye(2))
    4.0
    """
    change = weight.double() - new.double()
    return float(((change @ gram.double()) * change).sum())


def refit(weight: Tensor, gram: Tensor, inverse: Tensor, mask: Tensor) -> Tensor:
    """The weights within `mask` whose outputs are nearest to those of `weight`, by least squares in every row.

    Args:
        weight: shape (rows, columns).
        gram: positive definite, shape (columns, columns).
        inverse: of `gram`.
        mask: True where a weight may be other than zero.

    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> refit(torch.tensor([[1.0, 0.5]]), gram, gram.inverse(), torch.tensor([[True, False]])).tolist()
    [[1.4500000476837158, 0.0]]
    """
    new, wanted = torch.zeros_like(weight), weight @ gram
    for row, keep in enumerate(mask):
        stays, goes = keep.nonzero().flatten(), (~keep).nonzero().flatten()
        if len(stays) <= len(goes):
            if len(stays):
                new[row, stays] = _solve(gram[stays][:, stays], wanted[row, stays])
        elif not len(goes):
            new[row] = weight[row]
        else:  # the same answer from the smaller system: what goes takes with it what it can be replaced by
            new[row] = weight[row] - inverse[:, goes] @ _solve(inverse[goes][:, goes], weight[row, goes])
            new[row, goes] = 0.0
    return new


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(matrix))[:, 0]


def _damp(gram: Tensor, damping: float) -> Tensor:
    """The diagonal a little larger, and 1 where an input was always zero."""
    diagonal = gram.diagonal()
    more = damping * diagonal.mean()
    dead = (diagonal + more) == 0
    return gram + torch.diag(more + dead.to(gram.dtype))


def _sweep(weight: Tensor, inverse: Tensor, pick: Pick) -> Tensor:
    """Decide window by window from left to right; returns what stays."""
    factor = torch.linalg.cholesky(inverse, upper=True)  # row j: what the columns from j on do when those before are settled
    left, columns = weight.clone(), weight.shape[1]
    scores, mask = torch.empty_like(weight), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, columns, _WINDOW):
        stop = min(start + _WINDOW, columns)
        scores[:, start:] = (left[:, start:] / factor.diagonal()[start:]).square()
        mask[:, start:stop] = pick(scores)[:, start:stop]
        scores[:, start:stop] = torch.where(mask[:, start:stop], torch.inf, -torch.inf)
        errors = torch.zeros_like(left[:, start:stop])
        for at in range(start, stop):
            errors[:, at - start] = left[:, at].masked_fill(mask[:, at], 0.0) / factor[at, at]
            left[:, at:stop] -= errors[:, at - start, None] * factor[at, at:stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return mask


def prune_layers(
    model: nn.Module, task: Task, layers: Mapping[str, Layer], masks: Mapping[str, Tensor], pattern: Pattern, samples: int, damping: float
) -> None:
    """Mask the layers of `model` in place, one after another as they are executed, each refitted on what the pruned ones before it give.

    Args:
        model: runs on the task's inputs; its layers and masks are changed.
        task: gives the inputs; its labels aren't read.
        layers: the layers by path.
        masks: how many weights (or blocks) each layer keeps, and each of its groups; which ones is decided anew. A layer that is
            never called as a module gets this mask as it is, and its weights stay as they are.
        pattern: of the masks.
        samples: how many inputs to calibrate on.
        damping: see `obs_prune`.

    Raises:
        ModelError: if a layer reads values that aren't finite.
    """
    batches = first_inputs(task, samples, "they repair the weights (prune.weights)")
    order = execution_order(model, layers, batches[0])
    for path in order:
        layer = layers[path]
        gram = layer_gram(model, path, layer, batches, inputs_last=isinstance(pattern, NofM))
        if not bool(torch.isfinite(gram).all()):
            raise ModelError(
                f"prune.weights: {path} reads values that aren't finite, so it can't be repaired. Check the inputs and weights."
            )
        weight, mask = _pruned(layer, masks[path], gram, pattern, damping)
        set_weight(layer, weight)
        set_mask(model, layer, mask)
    for path in layers.keys() - set(order):
        set_mask(model, layers[path], masks[path])


def _pruned(layer: Layer, wanted: Tensor, grams: Tensor, pattern: Pattern, damping: float) -> tuple[Tensor, Tensor]:
    """Weight and mask of a layer, each of its groups by itself; `wanted` says how much stays."""
    living = to_matrix(layer, alive(layer), pattern)
    weights, counts = to_matrix(layer, layer.weight.detach(), pattern), to_matrix(layer, wanted, pattern)
    parts = [
        obs_prune(weight, gram, _picker(pattern_of(layer, pattern), count, live), damping)
        for weight, gram, count, live in zip(weights, grams, counts, living, strict=True)
    ]
    new, masks = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return from_matrix(layer, new, pattern), from_matrix(layer, masks, pattern)


def _picker(pattern: Pattern, wanted: Tensor, living: Tensor) -> Pick:
    """Marks as many weights or blocks as `wanted` does, among those that live."""
    if isinstance(pattern, NofM):
        return lambda scores: pattern.mask(scores.masked_fill(~living, -torch.inf)) & living
    count = int(pattern.score(wanted.double(), wanted)[1].sum())

    def pick(scores: Tensor) -> Tensor:
        blocks, lives = pattern.score(scores, living)
        return pattern.spread(highest(blocks.masked_fill(~lives, -torch.inf), count), *scores.shape) & living

    return pick
