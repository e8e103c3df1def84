"""Prune depth: residual blocks that change their input little are removed, as a whole."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.graph.capture import Captured
from pared.graph.counts import count
from pared.graph.depth import Block, shorten, without
from pared.prune.observe import Watch, fitting, isolated
from pared.training import Task, Train, evaluate
from pared.training.samples import first_inputs

Scores = NDArray[np.float64]

_log = logging.getLogger(__name__)


def change(before: Tensor, after: Tensor, axis: int = -1) -> Tensor:
    """One minus the cosine between a block's input and output, at every position: ShortGPT's Block Influence before its mean.

    Where both vectors are zero nothing changed (0); where one is, all did (1).

    Args:
        before: a block's input.
        after: its output, of the same shape.
        axis: of the features; all others are positions (samples, tokens, pixels).

    Returns:
        The shape of the inputs without `axis`; values in [0, 2].

    Source: Men et al. 2024, 2403.03853, section 3 (Block Influence).

    >>> import torch
    >>> change(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])).tolist()
    [0.0, 1.0, 0.0]
    """
    before, after = (F.normalize(x.double(), dim=axis, eps=1e-300) for x in (before, after))
    both_zero = ~before.any(dim=axis) & ~after.any(dim=axis)
    return (1 - (before * after).sum(dim=axis)).masked_fill(both_zero, 0).clamp(0, 2)


def lowest_blocks(scores: Scores, count: int, inside: Sequence[frozenset[int]]) -> list[int]:
    """The blocks that go: those of lowest score until `count` are gone; among equals the later ones first.

    A block takes the blocks inside it along. One that would take more than are left to go is passed over.

    Args:
        scores: one for each block; infinite where it has to stay.
        count: how many go.
        inside: for every block, the places of the blocks inside it.

    Returns:
        Their places, in order.

    >>> lowest_blocks(np.array([0.3, 0.1, 0.2, 0.1]), 2, [frozenset()] * 4)
    [1, 3]
    >>> lowest_blocks(np.array([0.1, 0.2, 0.3]), 1, [frozenset({1}), frozenset(), frozenset()])
    [1]
    """
    gone: set[int] = set()
    for place in sorted(range(len(scores)), key=lambda place: (scores[place], -place)):
        more = gone | {place} | inside[place]
        if len(more) <= count and not any(np.isinf(scores[one]) for one in more):
            gone = more
    return sorted(gone)


@dataclass(frozen=True)
class Similarity:
    """How much a block changes its input: one minus their cosine, averaged over samples and positions. Needs no labels.

    Vectors are those of features: channels at a pixel, the width at a token. Source: ShortGPT, Men et al. 2024, 2403.03853, section 3.

    Args:
        samples: how many training samples to look at; each gives as many cosines as it has positions, so that 256 are plenty.

    Raises:
        SettingsError: if a setting is out of range.

    >>> Similarity(samples=64)
    Similarity(samples=64)
    """

    samples: int = 256

    def __post_init__(self) -> None:
        problems = Problems("prune.similarity")
        problems.number("samples", self.samples, low=1, integer=True)
        problems.raise_if_any()

    def __call__(self, captured: Captured, blocks: Sequence[Block], task: Task) -> Scores:
        """The mean change of every block; small means that it can go."""
        purpose = "prune.blocks looks at them to see which blocks change little"
        batches = fitting(captured, first_inputs(task, self.samples, purpose))
        starts = {block.start for block in blocks}
        total, positions = np.zeros(len(blocks)), np.zeros(len(blocks))
        given: dict[fx.Node, Tensor] = {}

        def see(node: fx.Node, _: Any, value: Tensor) -> None:
            for place, block in enumerate(blocks):
                if node is block.out:
                    changed = change(given[block.start], value, block.channel_axis)
                    total[place] += float(changed.sum())
                    positions[place] += changed.numel()
            if node in starts:
                given[node] = value.clone()  # a later operator may change it in place

        watch = Watch(captured.module, starts | {block.out for block in blocks}, see)
        for batch in batches:
            watch.look(batch)
        return total / np.maximum(positions, 1)


@dataclass(frozen=True)
class Removal:
    """What the validation metric loses when a block is removed, one block at a time; nothing is tuned in between.

    It is what counts, but costs one run over the validation split for each block, and labels.

    >>> Removal()
    Removal()
    """

    def __call__(self, captured: Captured, blocks: Sequence[Block], task: Task) -> Scores:
        """The loss of every block; small (or negative) means that it can go."""
        sign = 1.0 if task.metric.higher_is_better else -1.0
        whole = evaluate(isolated(captured).module, task)
        return np.array([sign * (whole - evaluate(copy.deepcopy(without(captured, [block])), task)) for block in blocks])


@dataclass(frozen=True)
class Blocks:
    """Remove residual blocks, x + f(x), that do least, and tune what is left.

    A removed block becomes what goes into it: nothing is computed in its place, so that the network gets faster by all of it.

    Args:
        keep: the share of blocks that stays, rounded up. Three quarters by default: about what ShortGPT
            leaves of the layers of language models without training.
        remove: instead of `keep`, how many blocks go.
        importance: which blocks go first; `Similarity()` by default, since it needs no labels and one run for all blocks.
        rounds: how often to rank, remove and tune; every round removes the same number, up to rounding.
        tune: fine-tuning after every round ("2ep" or a plan); None leaves the weights as they are.
        leave: module paths whose blocks stay; a path covers everything below it.

    Raises:
        SettingsError: if a setting is out of range, or a path names no block.

    >>> Blocks(keep=0.5, rounds=2, tune="1ep").tune.epochs
    1
    """

    keep: float = 0.75
    remove: int | None = None
    importance: Similarity | Removal = field(default_factory=Similarity)
    rounds: int = 1
    tune: Train | str | None = None
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("prune.blocks")
        problems.number("keep", self.keep, low=0, high=1)
        if self.remove is not None:
            problems.number("remove", self.remove, low=0, integer=True)
        problems.check(isinstance(self.importance, Similarity | Removal), "importance", "Similarity() or Removal()", self.importance)
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with fewer blocks; a network without residual blocks comes back as it is, and the log says so.

        Of every round in which blocks are ranked an event says what went:
        `{"event": "blocks", "round", "rounds", "removed", "scores", "macs", "original_macs"}`.
        """
        result, example = copy.deepcopy(model).to(task.machine.device), task.example_inputs()
        macs = count(result, example).macs
        gone = 0
        for number in range(1, self.rounds + 1):
            this = _Round(self, task, number, gone)
            found = shorten(result, example, this)
            result, gone = found.model, gone + len(found.removed)
            if this.scores:
                event = {"event": "blocks", "round": number, "rounds": self.rounds, "removed": list(found.removed), "scores": this.scores}
                task.report({**event, "macs": count(result, example).macs, "original_macs": macs})
            if found.removed and isinstance(self.tune, Train):
                task.tune(result, self.tune)
        return result


@dataclass(frozen=True)
class _Round:
    """Which blocks go in a round, when `gone` are gone already; notes their scores by name."""

    settings: Blocks
    task: Task
    number: int
    gone: int
    scores: dict[str, float] = field(default_factory=dict)

    def __call__(self, captured: Captured, blocks: tuple[Block, ...]) -> list[Block]:
        if self.number == 1:
            _check(self.settings, blocks)
        number = goal(self.settings, self.gone + len(blocks), self.number) - self.gone
        if number <= 0 or not blocks:
            return []
        scores = self.settings.importance(captured, blocks, self.task)
        stays = [any(_covers(path, block) for path in self.settings.leave) for block in blocks]
        inside = [frozenset(place for place, other in enumerate(blocks) if other.inside(block)) for block in blocks]
        self.scores.update({block.name: float(score) for block, score in zip(blocks, scores, strict=True)})
        return [blocks[place] for place in lowest_blocks(np.where(stays, np.inf, scores), number, inside)]


def goal(settings: Blocks, total: int, number: int) -> int:
    """How many of `total` blocks are gone after round `number`.

    >>> [goal(Blocks(keep=0.5, rounds=2), 7, number) for number in (1, 2)], goal(Blocks(remove=2), 7, 1)
    ([2, 3], 2)
    """
    whole = total - math.ceil(settings.keep * total - 1e-9) if settings.remove is None else settings.remove
    return math.ceil(whole * number / settings.rounds)


def _covers(path: str, block: Block) -> bool:
    return any(module == path or module.startswith(f"{path}.") for module in block.modules)


def _check(settings: Blocks, blocks: Sequence[Block]) -> None:
    if not blocks:
        _log.warning("prune.blocks: the network has no residual blocks that could be removed, so it stays as it is.")
    names = ", ".join(block.name for block in blocks)
    problems = [
        f"prune.blocks: leave: no block has a module {path!r}. Blocks are {names}."
        for path in settings.leave
        if blocks and not any(_covers(path, block) for block in blocks)
    ]
    if blocks and settings.remove is not None and settings.remove > len(blocks):
        problems.append(f"prune.blocks: remove must be at most {len(blocks)}, the number of blocks ({names}). Got {settings.remove}.")
    if problems:
        raise SettingsError(problems)
