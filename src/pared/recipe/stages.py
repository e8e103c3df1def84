"""One stage of a run: a method carried out from its own seed, its result deployed and measured.

**Resuming.** A run that goes on carries out every stage again, from the first. What takes time, training, is read from the stage's
journal: a finished training gives its last weights *and random states*, an unfinished one goes on after its last epoch. What is
left (scores, cuts, calibration) is computed again from the same weights and seeds in seconds, which gives the same bits on the
same machine; a digest of the weights after every stage proves it. So no network is ever stored as a pickle, methods need no code
for resuming, and any class of network can be resumed.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pared.core.digests import digest
from pared.core.errors import RunError
from pared.core.files import atomic_path
from pared.core.method import Method
from pared.core.rules import bake
from pared.core.seeds import seed_everything
from pared.measure import Latency, Profile, profile
from pared.recipe.run_directory import RunDirectory
from pared.runtime import export
from pared.training import Machine, Split, Task


@dataclass(frozen=True)
class Stage:
    """A method and its place in a run; the name is also that of its files."""

    name: str
    method: Method
    index: int = 0
    of: int = 0


@dataclass(frozen=True)
class Deployed:
    """A network without weight rules, the file that it was exported to, and the split to measure it on."""

    model: nn.Module
    path: Path
    split: Split


@dataclass(frozen=True)
class Workshop:
    """What every stage of a run needs.

    Args:
        directory: the run's, open.
        task: the user's, with `teacher` set once there is one.
        seed: of the run; each stage derives its own from it.
        past: seconds of the trainings that earlier processes of this run finished, by stage.
    """

    directory: RunDirectory
    task: Task
    seed: int
    past: dict[str, float] = dataclasses.field(default_factory=dict)

    def taught_by(self, teacher: nn.Module) -> Workshop:
        """The same with a teacher."""
        return dataclasses.replace(self, task=dataclasses.replace(self.task, teacher=teacher))

    def carry_out(self, stage: Stage, model: nn.Module) -> tuple[nn.Module, float]:
        """Call the stage's method on `model`.

        Returns:
            The new model (still with its weight rules), and the seconds that the stage took in all processes of this run.

        Raises:
            RunError: if an earlier process of this run got other weights here.
        """
        self.task.report({"event": "stage", "name": stage.name, "index": stage.index, "of": stage.of})
        seed_everything(stage_seed(self.seed, stage.name))
        if hasattr(self.task.train, "set_epoch"):  # no stage depends on how long others trained before it
            self.task.train.set_epoch(0)  # pyright: ignore[reportAttributeAccessIssue]
        answers = self.task.answers if self.task.answers is not None else self.directory / "checkpoints" / "answers"  # of all stages
        journal, report = self.directory.journal(stage.name), _naming(self.task.report, stage.name)
        task = dataclasses.replace(self.task, journal=journal, answers=answers, report=report)
        began = time.perf_counter()
        result = stage.method(copy.deepcopy(model), task)
        seconds = time.perf_counter() - began + self.past.get(stage.name, 0.0)
        self._same_as_before(stage.name, result)
        return result, seconds

    def deploy(self, model: nn.Module, path: Path, split: Split) -> Deployed:
        """Export a baked copy of `model` with the normalisation inside; a file that an earlier process left is kept."""
        baked = bake(copy.deepcopy(model)).cpu().eval()
        if not path.exists():
            write_network(baked, self.task, path)
        return Deployed(baked, path, split)

    def measure(self, deployed: Deployed, latency: Latency) -> Profile:
        """All about a deployed network; its latency was taken together with that of all other files."""
        found = profile(deployed.model, deployed.path, on_cpu(self.task), deployed.split, latency=latency)
        self.task.report({"event": "profile", **found.to_dict()})
        return found

    def _same_as_before(self, name: str, model: nn.Module) -> None:
        key = f"checkpoints/{name}/weights.json"
        now, before = {"sha256": digest(model), "threads": torch.get_num_threads()}, self.directory.load(key)
        if before is None:
            self.directory.save(key, now)
        elif before["sha256"] != now["sha256"]:
            raise RunError(
                f"{self.directory.path}: stage {name} gave other weights than before the run was stopped. Resume on the same machine with "
                f"the same versions and {before['threads']} threads (now {now['threads']}), or start again in another directory."
            )


def on_cpu(task: Task) -> Task:
    """The task for exporting, counting and measuring, which all happen on the CPU."""
    return dataclasses.replace(task, machine=Machine(accelerator="cpu"))


def write_network(model: nn.Module, task: Task, path: Path) -> None:
    """Export a network on the CPU with the task's normalisation inside."""
    task = on_cpu(task)
    # the file takes what the data gives, so the example isn't normalised
    export(model, dataclasses.replace(task, normalize=None).example_inputs(), path, normalize=task.normalize)


def stage_seed(seed: int, name: str) -> int:
    """The seed of a stage: one run's stages differ, and the same stage of the same seed is always alike.

    >>> stage_seed(0, "01-prune.neurons") == stage_seed(1, "01-prune.neurons")
    False
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file so that the target is whole or not there."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def stages_of(steps: tuple[Method, ...], names: list[str], prefix: str = "") -> list[Stage]:
    """The steps of a recipe as numbered stages."""
    return [
        Stage(f"{prefix}{index:02d}-{name}", step, index, len(steps))
        for index, (step, name) in enumerate(zip(steps, names, strict=True), 1)
    ]


def _naming(report: Callable[[dict[str, Any]], None], stage: str) -> Callable[[dict[str, Any]], None]:
    return lambda event: report({**event, "stage": stage})
