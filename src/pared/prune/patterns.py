"""Patterns of zeros that hardware can use: N of each M consecutive inputs, or whole blocks of the weight matrix."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pared.core.layers import Layer, inputs_of_group, join_weight, split_weight
from pared.core.problems import Problems
from pared.prune.selection import Scope, check_scores, choose


@dataclass(frozen=True)
class NofM:
    """`kept` of each `of` consecutive entries of a row stay (Mishra et al. 2021, 2104.08378: 2 of 4 on NVIDIA's sparse tensor cores).

    Args:
        kept: N, at least 1.
        of: M, at least N.
        run: groups start anew after this many columns; 0: they run through the whole row.

    Raises:
        SettingsError: if not 0 < kept <= of.

    >>> NofM(2, 4).mask(torch.tensor([[1.0, 3.0, 2.0, 0.0, 5.0]]))
    tensor([[False,  True,  True, False,  True]])
    """

    kept: int
    of: int
    run: int = 0

    def __post_init__(self) -> None:
        problems = Problems("prune.pattern")
        problems.check(0 < self.kept <= self.of, "N:M", "such that 0 < N <= M", f"{self.kept}:{self.of}")
        problems.raise_if_any()

    @property
    def share(self) -> float:
        """The share of the weights that stays where groups are complete."""
        return self.kept / self.of

    def on_the_way(self, share: float) -> NofM:
        """The pattern of a round of pruning that leaves `share`: as many of each group as that is, rounded up, but not fewer than N.

        >>> [NofM(1, 4).on_the_way(share).kept for share in (0.6, 0.3, 0.25)]
        [3, 2, 1]
        """
        return dataclasses.replace(self, kept=min(self.of, max(self.kept, math.ceil(share * self.of - 1e-9))))

    def mask(self, scores: Tensor) -> Tensor:
        """Mark the highest scores of every group; of equal scores those that stand first.

        An incomplete group at the end of a run keeps its proportion, rounded up, so that a layer with one input isn't emptied.

        Args:
            scores: shape (…, columns).
        """
        run = self.run or scores.shape[-1]
        counts = torch.full((-(-run // self.of),), self.kept, device=scores.device)
        if run % self.of:
            counts[-1] = -(-self.kept * (run % self.of) // self.of)
        rows = scores.reshape(-1, run)
        groups = functional.pad(rows, (0, -run % self.of), value=-torch.inf).view(len(rows), -1, self.of)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        marks = order.argsort(dim=-1) < counts[:, None]
        return marks.view(len(rows), -1)[:, :run].reshape(scores.shape)


@dataclass(frozen=True)
class Block:
    """Weights stay or go in blocks of `rows` outputs and `columns` inputs; blocks at the edges are smaller.

    Args:
        rows: outputs of a block, at least 1.
        columns: inputs of a block, at least 1.

    Raises:
        SettingsError: if one of them is 0.

    >>> Block(1, 2).pool(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[3., 3.]])
    """

    rows: int = 1
    columns: int = 1

    def __post_init__(self) -> None:
        problems = Problems("prune.pattern")
        problems.number("rows", self.rows, low=1, integer=True)
        problems.number("columns", self.columns, low=1, integer=True)
        problems.raise_if_any()

    def pool(self, values: Tensor) -> Tensor:
        """The sum of each block: shape (…, blocks down, blocks across) for values of shape (…, rows, columns)."""
        if self.rows == self.columns == 1:
            return values
        *front, rows, columns = values.shape
        padded = functional.pad(values, (0, -columns % self.columns, 0, -rows % self.rows))
        down, across = padded.shape[-2] // self.rows, padded.shape[-1] // self.columns
        return padded.view(*front, down, self.rows, across, self.columns).sum((-3, -1))

    def spread(self, marks: Tensor, rows: int, columns: int) -> Tensor:
        """What `pool` takes together, apart again: marks of blocks become marks of shape (…, rows, columns)."""
        if self.rows == self.columns == 1:
            return marks
        return marks.repeat_interleave(self.rows, -2).repeat_interleave(self.columns, -1)[..., :rows, :columns]

    def score(self, scores: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """The score of each block, the sum over weights that are alive, and whether it has any."""
        return self.pool(scores.masked_fill(~alive, 0.0)), self.pool(alive.to(scores.dtype)) > 0


Pattern = NofM | Block


def parse_pattern(text: str, where: str = "prune.weights") -> Pattern:
    """Read a pattern: "2:4" is N:M, "1x8" a block of 1 output and 8 inputs, "" single weights.

    Raises:
        SettingsError: if it is none of these.

    >>> parse_pattern("2:4"), parse_pattern("8x1"), parse_pattern("")
    (NofM(kept=2, of=4, run=0), Block(rows=8, columns=1), Block(rows=1, columns=1))
    """
    if text == "":
        return Block()
    found = re.fullmatch(r"([1-9][0-9]{0,3})([:x])([1-9][0-9]{0,3})", text) if isinstance(text, str) else None
    valid = found is not None and (found[2] == "x" or int(found[1]) < int(found[3]))
    problems = Problems(where)
    problems.check(valid, "pattern", "empty, N:M with N < M such as 2:4, or a block such as 1x8 or 8x1", text)
    problems.raise_if_any()
    assert found is not None
    return (NofM if found[2] == ":" else Block)(int(found[1]), int(found[3]))


def pattern_of(layer: Layer, pattern: Pattern) -> Pattern:
    """The pattern in the matrix of a layer: N:M groups don't go over from one position of the kernel to the next."""
    return dataclasses.replace(pattern, run=inputs_of_group(layer)) if isinstance(pattern, NofM) else pattern


def to_matrix(layer: Layer, tensor: Tensor, pattern: Pattern) -> Tensor:
    """A tensor of the weight's shape as one matrix for each group of the layer: shape (groups, outputs, columns).

    Columns are those of im2col, (inputs, *kernel) flattened. For N:M they are (*kernel, inputs), so that consecutive columns are
    consecutive input channels at one position of the kernel, which is the axis that hardware contracts.

    >>> from torch import nn
    >>> to_matrix(nn.Conv2d(4, 2, 3, groups=2), torch.zeros(2, 2, 3, 3), Block()).shape
    torch.Size([2, 1, 18])
    """
    split = split_weight(layer, tensor)
    return (split.transpose(2, 3) if isinstance(pattern, NofM) else split).flatten(2)


def from_matrix(layer: Layer, matrix: Tensor, pattern: Pattern) -> Tensor:
    """The way back from `to_matrix`: a tensor of the weight's shape."""
    inputs, (groups, outputs, columns) = inputs_of_group(layer), matrix.shape
    if isinstance(pattern, NofM):
        return join_weight(layer, matrix.view(groups, outputs, columns // inputs, inputs).transpose(2, 3))
    return join_weight(layer, matrix.view(groups, outputs, inputs, columns // inputs))


def choose_weights(
    layers: Mapping[str, Layer], scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], keep: float, scope: Scope, pattern: Pattern
) -> dict[str, Tensor]:
    """Choose the weights that stay, in a pattern: masks of the weights' shapes, within what is alive.

    Args:
        layers: the layers by path.
        scores: importance of each weight, of its shape.
        alive: boolean tensors of the same shapes, False where a weight is already removed.
        keep: share that stays, of the weights or of the blocks; an N:M pattern says it itself.
        scope: rank all blocks together ("global") or those of each layer ("layer"); N:M groups are always ranked one by one.
        pattern: what goes together. The score of a block is the sum over its weights.

    Raises:
        WeightsError: naming a layer whose scores contain NaN.

    >>> from torch import nn
    >>> layer = nn.Linear(4, 1)
    >>> scores, alive = torch.tensor([[1.0, 4.0, 3.0, 3.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> choose_weights({"a": layer}, {"a": scores}, {"a": alive}, 0.5, "global", Block(1, 2))
    {'a': tensor([[False, False,  True,  True]])}
    """
    check_scores(scores)
    tables = {path: (to_matrix(layer, scores[path], pattern), to_matrix(layer, alive[path], pattern)) for path, layer in layers.items()}
    if isinstance(pattern, NofM):
        marks: dict[str, Tensor] = {}
        for path, (score, living) in tables.items():
            groups = dataclasses.replace(pattern, run=inputs_of_group(layers[path]))
            marks[path] = groups.mask(score.masked_fill(~living, -torch.inf))
    else:
        blocks = {path: pattern.score(score, living) for path, (score, living) in tables.items()}
        chosen = choose({path: block[0] for path, block in blocks.items()}, {path: block[1] for path, block in blocks.items()}, keep, scope)
        marks = {path: pattern.spread(chosen[path], *score.shape[1:]) for path, (score, _) in tables.items()}
    return {path: from_matrix(layers[path], mark, pattern) & alive[path] for path, mark in marks.items()}
