"""Prune neurons: channels, hidden units and head dimensions that really leave the tensors, in rounds with fine-tuning between."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from pared.core.problems import Problems
from pared.graph.analysis import analyse
from pared.graph.capture import capture
from pared.prune.chooser import Chooser
from pared.prune.importance import Activity, Magnitude, Random
from pared.training import Task, Train


@dataclass(frozen=True)
class Neurons:
    """Remove the least important neurons of every class, fine-tune, and repeat until the share `keep` is left.

    The loop of the lecture: importance, remove, fine-tune, again. With one round everything goes at once.

    Args:
        keep: the share of neurons that stays in each class, or a mapping from module path to share (layers not named keep all).
        importance: which neurons go first.
        rounds: how often to remove and fine-tune; round r leaves keep^(r / rounds), so that every round removes the same share.
        tune: fine-tuning after every round ("2ep" or a plan); None leaves the weights as they are.
        round_to: round channel counts to the nearest multiple. 8 by default, the block in which ONNX Runtime computes convolutions on
            AVX2: counts between two multiples cost as much as the upper one. Classes of at most that many are cut to the exact share.
        leave: module paths whose outputs keep their width.
        norms: cut also where a norm, a mean or a softmax runs over the cut axis.

    Raises:
        SettingsError: if a setting is out of range.

    >>> Neurons(keep=0.5, importance=Activity(), rounds=4, tune="2ep").tune.epochs
    2
    """

    keep: float | Mapping[str, float] = 0.5
    importance: Magnitude | Activity | Random = field(default_factory=Magnitude)
    rounds: int = 1
    tune: Train | str | None = None
    round_to: int = 8
    leave: tuple[str, ...] = ()
    norms: bool = False

    def __post_init__(self) -> None:
        problems = Problems("prune.neurons")
        shares = self.keep if isinstance(self.keep, Mapping) else {"": self.keep}
        for path, share in shares.items():
            problems.number(f"keep[{path!r}]" if path else "keep", share, low=0, high=1)
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.number("round_to", self.round_to, low=1, integer=True)
        known = isinstance(self.importance, Magnitude | Activity | Random)
        problems.check(known, "importance", "an importance such as Magnitude()", self.importance)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.raise_if_any()
        if isinstance(self.tune, str):
            object.__setattr__(self, "tune", Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a smaller copy of `model`."""
        example = task.example_inputs()
        result = copy.deepcopy(model)
        sizes = {found.name: len(found.neurons) for found in analyse(capture(result, example)).classes}
        for number in range(1, self.rounds + 1):
            chooser = Chooser(
                _share(self.keep, number / self.rounds), self.importance, norms=self.norms, round_to=self.round_to, task=task, sizes=sizes
            )
            result = chooser.cut(result, example, self.leave).model
            if isinstance(self.tune, Train):
                task.tune(result, self.tune)
        return result


def _share(keep: float | Mapping[str, float], progress: float) -> float | Mapping[str, float]:
    """The share to keep when a part of the rounds is done, so that every round removes the same share of what is left."""
    if isinstance(keep, Mapping):
        return {path: float(share) ** progress for path, share in keep.items()}
    return float(keep) ** progress
