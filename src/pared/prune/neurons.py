"""Prune neurons: channels, hidden units and head dimensions that really leave the tensors, in rounds with fine-tuning between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from pared.core.problems import Problems
from pared.prune.importance import AnyImportance, Importance, Magnitude
from pared.prune.loop import prune_in_rounds
from pared.prune.targets import Of
from pared.training import Task, Train


@dataclass(frozen=True)
class Neurons:
    """Remove the least important neurons, fine-tune, and repeat until the share `keep` is left.

    The loop of the lecture: importance, remove, fine-tune, again. With one round everything goes at once.

    Args:
        keep: the share that stays of what `of` names; for neurons of each layer also a mapping from module path to share (layers not
            named keep all).
        of: what is to shrink to that share. "neurons", of each class or of all; "macs" or "parameters", as `graph.count` has them; "bytes"
            of the deployed file; "latency", the median time of one sample in the deployed file on one thread. For all but neurons the
            result costs at most that share where `floor`, `cap`, `leave` and `only` allow it; else what comes nearest, and the log says so.
            For latency, how many neurons a class keeps follows from measured times (see `cost_table`): no cut is made that doesn't pay,
            and a result that isn't faster than the input isn't returned.
        scope: "layer" keeps the same share of every class, "global" ranks the neurons of all classes together: the importance's own
            `normalize` brings scores to one scale, and where it has none they are divided by the mean of their class. For a target
            that isn't neurons, scores are divided by what a neuron costs (multiply-adds for "macs" and "latency", parameters for
            "parameters" and "bytes"), so that the most importance is kept for it.
        floor: the least share that a class keeps. A sixteenth by default, one channel of a block of 16: a layer through which nothing
            gets is worse than all others being whole, and a ranking over classes would empty some.
        cap: the most that a class keeps; below 1 it keeps a ranking from sparing a layer altogether.
        importance: which neurons go first.
        rounds: how often to remove and fine-tune; round r leaves keep^(r / rounds), so that every round removes the same share.
        tune: fine-tuning after every round ("2ep" or a plan); None leaves the weights as they are.
        teacher: fine-tune by the answers of the original (the task's teacher, else the model given) as well as by the labels, with the
            temperature 4 and the weight 0.9 of `distill.Teach`.
        repair: what is done before tuning, without labels: "batch-norm" measures its statistics again, "least-squares" solves the weights
            that read what was cut.
        guard: the most of the validation metric that may be lost to the original, as a fraction (0.01 of accuracy: one point). A
            round that loses more ends the loop, and the network before it is returned. None: no limit.
        round_to: round channel counts to the nearest multiple. 8 by default, the block in which ONNX Runtime computes convolutions on
            AVX2: counts between two multiples cost as much as the upper one. Classes of at most that many are cut to the exact share.
            Not used for latency, where the block is measured.
        leave: module paths whose outputs keep their width.
        only: module paths; where given, only neurons that these compute go, with all that is tied to them.
        norms: cut also where a norm, a mean or a softmax runs over the cut axis.

    Raises:
        SettingsError: if a setting is out of range, a path names no module, or the weights of all layers are clustered already. Where
            those of some are, these layers stay as they are, and the log says so.

    >>> Neurons(keep=0.5, of="macs", scope="global", rounds=4, tune="2ep").tune.epochs
    2
    """

    keep: float | Mapping[str, float] = 0.5
    of: Of = "neurons"
    scope: Literal["layer", "global"] = "layer"
    floor: float = 0.0625
    cap: float = 1.0
    importance: AnyImportance | Importance = field(default_factory=Magnitude)
    rounds: int = 1
    tune: Train | str | None = None
    teacher: bool = False
    repair: Literal["none", "batch-norm", "least-squares"] = "none"
    guard: float | None = None
    round_to: int = 8
    leave: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    norms: bool = False

    def __post_init__(self) -> None:
        problems = Problems("prune.neurons")
        self._check_shares(problems)
        problems.check(self.scope in ("layer", "global"), "scope", "layer or global", self.scope)
        problems.number("rounds", self.rounds, low=1, integer=True)
        problems.number("round_to", self.round_to, low=1, integer=True)
        known = callable(self.importance) and not isinstance(self.importance, type)
        problems.check(known, "importance", "an importance such as Magnitude()", self.importance)
        problems.check(isinstance(self.teacher, bool), "teacher", "true or false", self.teacher)
        problems.check(not self.teacher or self.tune is not None, "tune", "given where teacher is", self.tune)
        repairs = ("none", "batch-norm", "least-squares")
        problems.check(self.repair in repairs, "repair", "none, batch-norm or least-squares", self.repair)
        if self.guard is not None:
            problems.number("guard", self.guard, low=0, high=1e6)
        for name in ("leave", "only"):
            problems.check(not isinstance(getattr(self, name), str), name, "a list of module paths", getattr(self, name))
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))
        object.__setattr__(self, "only", tuple(self.only))

    def _check_shares(self, problems: Problems) -> None:
        shares = self.keep if isinstance(self.keep, Mapping) else {"": self.keep}
        for path, share in shares.items():
            problems.number(f"keep[{path!r}]" if path else "keep", share, low=0, high=1)
        problems.check(self.of in get_args(Of), "of", "neurons, macs, parameters, bytes or latency", self.of)
        single = not isinstance(self.keep, Mapping) or (self.of == "neurons" and self.scope == "layer")
        problems.check(single, "keep", "one number where of or scope is given", self.keep)
        problems.number("floor", self.floor, low=0, high=1)
        problems.number("cap", self.cap, above=0, high=1)
        if not problems.found:
            problems.check(self.floor <= self.cap, "floor", f"at most cap ({self.cap:g})", self.floor)

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a smaller copy of `model`."""
        return prune_in_rounds(self, model, task)
