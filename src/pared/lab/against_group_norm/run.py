"""Cut residual networks to the same multiply-adds by pared and by torch-pruning's group-norm pruner, with the same training."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from pared import data
from pared.architecture.nets import resnet8, resnet20
from pared.core.problems import Problems
from pared.core.seeds import seed_everything
from pared.lab.against_group_norm.arms import Arm, fast, measured, projected, sgd
from pared.lab.against_group_norm.peer import GroupNorm, obstacle
from pared.lab.against_group_norm.verdict import LEARNING, judge
from pared.lab.claims import fewer
from pared.lab.experiment import Progress, Row, Verdict
from pared.prune import Fisher, Neurons
from pared.training import Task

NETS: Mapping[str, Callable[..., nn.Module]] = {"resnet8": resnet8, "resnet20": resnet20}
RATE = 0.05


@dataclass(frozen=True)
class AgainstGroupNorm:
    """A row for every network and seed; in it, one dense network that all arms start from.

    Both tools' settings were chosen on the validation split, with resnet8, 12,000 training samples, eight epochs before and four after, at
    2.6 times; the card has the table.

    Args:
        seeds: of resnet8: weights, samples, augmentation.
        deep_seeds: those of them for which resnet20 is cut as well.
        speedups: how many times fewer multiply-adds.
        epochs: of the dense network.
        tune: epochs of every arm afterwards.
        sparse: how many of them the group-norm pruner learns sparsely.
        scope: of pared's ranking.
        rounds: in which pared cuts, each with its share of the epochs.
        repair: what pared does between cut and tuning.
        teacher: whether the dense network teaches what pared cuts.
        samples: how many training samples are used; None: all.
        data: a task of small pictures.
    """

    name: ClassVar[str] = "against_group_norm"
    claim: ClassVar[str] = (
        "Cut to 2.1 times fewer multiply-adds a residual network loses nothing on test, to 2.6 times at most 0.3 points; it is at least as "
        "accurate as after torch-pruning's group-norm pruner with the same training, and at least as fast in ONNX Runtime."
    )

    seeds: tuple[int, ...] = (0, 1, 2)
    deep_seeds: tuple[int, ...] = (0,)
    speedups: tuple[float, ...] = (2.1, 2.6)
    epochs: int = 4
    tune: int = 4
    sparse: int = 0
    scope: Literal["layer", "global"] = "global"
    rounds: int = 1
    repair: Literal["none", "batch-norm", "least-squares"] = "least-squares"
    teacher: bool = False
    samples: int | None = None
    data: str = "fashion-mnist"

    def __post_init__(self) -> None:
        problems = Problems("lab.against_group_norm")
        problems.number("epochs", self.epochs, low=0, integer=True)
        problems.number("tune", self.tune, low=0, integer=True)
        problems.number("sparse", self.sparse, low=0, high=self.tune, integer=True)
        problems.check(self.scope in ("layer", "global"), "scope", "layer or global", self.scope)
        problems.number("rounds", self.rounds, low=1, high=max(1, self.tune), integer=True)
        problems.check(self.tune % max(1, self.rounds) == 0, "rounds", "a divisor of tune", self.rounds)
        problems.check(self.repair in ("none", "batch-norm", "least-squares"), "repair", "none, batch-norm or least-squares", self.repair)
        problems.check(isinstance(self.teacher, bool), "teacher", "true or false", self.teacher)
        problems.check(len(self.speedups) > 0, "speedups", "one or more numbers", self.speedups)
        for speedup in self.speedups:
            problems.number("speedups", speedup, above=1, high=100)
        if self.samples is not None:
            problems.number("samples", self.samples, low=1, integer=True)
        problems.check(set(self.deep_seeds) <= set(self.seeds), "deep_seeds", "some of seeds", self.deep_seeds)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """Networks by seed."""
        return (*(f"resnet8 seed {seed}" for seed in self.seeds), *(f"resnet20 seed {seed}" for seed in self.deep_seeds))

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Measure the rows that aren't done; their deployed files are left in `out`."""
        for key in self.keys():
            if key not in done:
                net, _, seed = key.split()
                folder = out / key.replace(" ", "-")
                folder.mkdir(parents=True, exist_ok=True)
                yield {"key": key, "net": net, "seed": int(seed), **self.measure(net, int(seed), folder)}

    def measure(self, net: str, seed: int, folder: Path) -> Row:
        """All arms of a network, and what keeps torch-pruning from cutting it as it is."""
        task = self._task(seed)
        raw = NETS[net](channels=task.example_inputs()[0].shape[1])
        dense = fast(projected(copy.deepcopy(raw)))
        task.tune(dense, sgd(self.epochs, 0.1, warmup=1))
        task = dataclasses.replace(task, teacher=dense)
        arms = {"dense": Arm(dense, 0.0)}
        for name, make in self._arms(dense, task).items():
            seed_everything(seed)
            start = time.perf_counter()
            arms[name] = Arm(make(), time.perf_counter() - start)
        return {"unprojected": obstacle(raw, task, 1 / min(self.speedups)), "arms": measured(arms, task, folder)}

    def _arms(self, dense: nn.Module, task: Task) -> dict[str, Callable[[], nn.Module]]:
        """What makes every network, by the name of its arm; the sparse learning is done once for all that start from it."""
        peer = GroupNorm(sgd(self.sparse, RATE, weight_decay=0.0), normalizer="max" if self.sparse else "mean")
        afterwards = sgd(self.tune - self.sparse, RATE)
        learnt = [dense]

        def learn() -> nn.Module:
            learnt[0] = peer.learn(dense, task)
            return learnt[0]

        def by_group_norm(speedup: float) -> nn.Module:
            return afterwards(peer.cut(learnt[0], task, 1 / speedup), task)

        arms: dict[str, Callable[[], nn.Module]] = {"dense, trained on": lambda: sgd(self.tune, RATE)(dense, task)}
        if self.sparse:
            arms[LEARNING] = learn
        for speedup in self.speedups:
            arms[f"pared {speedup}"] = lambda speedup=speedup: self.ours(1 / speedup)(dense, task)
            arms[f"group norm {speedup}"] = lambda speedup=speedup: by_group_norm(speedup)
        return arms

    def ours(self, keep: float) -> Neurons:
        """How pared cuts to a share of the multiply-adds: by Fisher information, in blocks of 8 channels."""
        return Neurons(
            keep=keep,
            of="macs",
            scope=self.scope,
            importance=Fisher(),
            rounds=self.rounds,
            repair=self.repair,
            tune=sgd(self.tune // self.rounds, RATE),
            teacher=self.teacher,
        )

    def _task(self, seed: int) -> Task:
        seed_everything(seed)
        task = data.load(self.data, seed)
        return task if self.samples is None else fewer(task, self.samples, seed)

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """On means over rows."""
        return judge(rows, self.speedups)


EXPERIMENT = AgainstGroupNorm()
