"""Carry out a recipe into a run directory: checkpoints, deployed files, measurements, baselines, result.json."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pared.core.digests import digest
from pared.core.errors import SettingsError
from pared.core.files import write_atomic
from pared.core.method import Recipe
from pared.core.seeds import rng_state, set_rng_state
from pared.graph import count
from pared.recipe import baselines as compare
from pared.recipe.budget import Budget
from pared.recipe.files import environment, layers, save_weights
from pared.recipe.methods import method_name, settings
from pared.recipe.result import Result, Step
from pared.recipe.run_directory import RunDirectory
from pared.recipe.stages import Deployed, Stage, Workshop, copy_file, on_cpu, stages_of, write_network
from pared.recipe.timing import time_files
from pared.recipe.yaml import dumps
from pared.training import Task, check_weights
from pared.training.check import run as call


def compress(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    out: str | Path,
    *,
    model_name: str = "model",
    data_name: str | None = None,
    seed: int = 0,
    trained: bool = False,
    resume: bool = False,
    baselines: bool = True,
    budget: Budget | None = None,
    quick: bool = False,
) -> Result:
    """Carry out a recipe, deploy the network after every step, and measure the files.

    Everything is checked before anything is written. The run directory then holds `original.onnx` and `small.onnx`, both packed as
    `.pared` (what one would send), `small.safetensors`, `recipe.yaml`, `events.jsonl`, `steps/`, `checkpoints/`, `baselines.json`, and
    at last `result.json`. A run that was stopped at any moment goes on with `resume=True` and ends with the same bytes.

    Args:
        model: the network; it isn't changed.
        task: data, loss, metric; `task.report` is told of every stage, epoch, batch and profile.
        recipe: the steps. With `recipe.train` the original is trained first.
        out: the run directory; it must be new or empty, or hold this run.
        model_name: for result.json.
        data_name: for result.json; None takes the task's name.
        seed: of every random choice.
        trained: the model is trained already; `recipe.train` then serves the scratch baseline alone.
        resume: go on with the run in `out`; a finished one is read and returned.
        baselines: also run the same architecture from scratch (if `recipe.train` says how) and random pruning (if the recipe prunes).
        budget: limits to check the result against.
        quick: measure latency for a short time only, for demonstrations.

    Returns:
        What was measured; the same as in result.json.

    Raises:
        SettingsError: for a recipe without steps.
        WeightsError, ModelError, DataError: if the model or the data can't be used; nothing is written then.
        RunError: if `out` holds something else, another process works there, or the disk is full.

    >>> import pared, tempfile
    >>> from pared.architecture import nets
    >>> task, net = pared.data.load("digits"), nets.lenet300(size=8)
    >>> recipe = pared.Recipe(pared.prune.Neurons(keep=0.5))
    >>> with tempfile.TemporaryDirectory() as out:
    ...     result = compress(net, task, recipe, out, baselines=False, quick=True)
    >>> result.ratios["params"] > 2
    True
    """
    if not recipe.steps:
        raise SettingsError("recipe: steps must be at least one method. Got none.")
    names = (model_name, data_name if data_name is not None else task.name)
    plan = Plan(recipe, names, seed, trained or recipe.train is None, baselines, budget, quick)
    directory = RunDirectory(out)
    identity = plan.identity(model, task)
    if directory.inspect(identity, resume=resume):
        task.report({"event": "finished", "directory": str(directory.path)})
        return Result.read(directory.path)
    # a run that goes on was checked when it began
    trial = check(model, task) if directory.load("run.json") is None else None
    random_state = rng_state()
    try:
        with directory.open(identity, resume=resume):
            if trial is not None and plan.trained:
                write_atomic(directory / "original.onnx", trial)
            return _Run(directory, plan, task).carry_out(model)
    finally:
        set_rng_state(random_state)


@dataclass(frozen=True)
class Plan:
    """What is to be done, apart from the model and its task."""

    recipe: Recipe
    names: tuple[str, str]
    seed: int
    trained: bool
    baselines: bool
    budget: Budget | None
    quick: bool

    def identity(self, model: nn.Module, task: Task) -> dict[str, Any]:
        """What must be the same for a run to be resumed: an input that differs would make another result."""
        return {
            "model": f"{self.names[0]} ({type(model).__qualname__})",
            "weights": digest(model),
            "data": {"name": self.names[1], "example": _digest_of(task.example_inputs(8))},
            "recipe": [{method_name(step): settings(step)} for step in self.recipe.steps],
            "train": settings(self.recipe.train) if self.recipe.train is not None else None,
            "seed": self.seed,
            "trained": self.trained,
            "baselines": self.baselines,
            "budget": self.budget.to_dict() if self.budget is not None else None,
        }


def check(model: nn.Module, task: Task) -> bytes:
    """Try out, without leaving a trace, that a model has finite weights, runs on the task's data, and can be exported.

    Returns:
        The exported file.

    Raises:
        WeightsError, ModelError, CaptureError, DataError: naming what is wrong.
    """
    check_weights(model)
    trial = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        call(trial, on_cpu(task).example_inputs())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.onnx"
        write_network(trial, task, path)
        return path.read_bytes()


class _Run:
    """One process's work on a run."""

    def __init__(self, directory: RunDirectory, plan: Plan, task: Task) -> None:
        self.directory = directory
        self.plan = plan
        self.listener = task.report
        past: dict[str, float] = {}
        for event in directory.events():
            if event.get("event") == "epoch":
                past[event["stage"]] = past.get(event["stage"], 0.0) + event["seconds"]
        self.workshop = Workshop(directory, dataclasses.replace(task, report=self.report), plan.seed, past)

    def report(self, event: dict[str, Any]) -> None:
        """Write an event down and pass it on; batches are too many to be written down."""
        if event.get("event") != "batch":
            self.directory.log(event)
        self.listener(event)

    def carry_out(self, model: nn.Module) -> Result:
        """Do everything; what an earlier process did is only repeated where that is quick."""
        recipe, directory = self.plan.recipe, self.directory
        write_atomic(directory / "recipe.yaml", dumps(recipe))
        if directory.load("environment.json") is None:
            directory.save("environment.json", environment(self.workshop.task.machine))
        original = self._original(model)
        self.workshop = self.workshop.taught_by(original)
        first = self.workshop.deploy(original, directory / "original.onnx", "test")
        steps, unquantized = self._steps(original)
        copy_file(steps[-1].deployed.path, directory / "small.onnx")
        small = Deployed(steps[-1].deployed.model, directory / "small.onnx", "test")
        save_weights(small.model, directory / "small.safetensors", {"recipe": dumps(recipe), "model": self.plan.names[0]})
        inputs = on_cpu(self.workshop.task).example_inputs()
        counted = {name: layers(count(each.model, inputs)) for name, each in (("original", first), ("compressed", small))}
        directory.save("layers.json", counted)
        others = self._baselines(original, unquantized) if self.plan.baselines else {}
        return self._finish(first, small, steps, others)

    def _original(self, model: nn.Module) -> nn.Module:
        """The network to compress: a copy of the user's, trained if it isn't."""
        model = copy.deepcopy(model).to(self.workshop.task.machine.device)
        if self.plan.trained:
            return model.eval()
        assert self.plan.recipe.train is not None
        return self.workshop.carry_out(Stage("00-train", self.plan.recipe.train, 0, len(self.plan.recipe.steps)), model)[0]

    def _steps(self, model: nn.Module) -> tuple[list[_Done], nn.Module]:
        """Carry out the recipe; returns what every step left, and the network before its number format changed."""
        steps = self.plan.recipe.steps
        first_format = compare.number_formats(self.plan.recipe)
        done, unquantized = [], model
        for at, stage in enumerate(stages_of(steps, [method_name(step) for step in steps])):
            model, seconds = self.workshop.carry_out(stage, model)
            unquantized = model if at < first_format else unquantized
            deployed = self.workshop.deploy(model, self.directory / "steps" / f"{stage.name}.onnx", "valid")
            done.append(_Done(stage, self._seconds(stage.name, seconds), deployed))
        return done, unquantized

    def _seconds(self, name: str, seconds: float) -> float:
        """The time that the stage took when it was first through: carrying it out again to resume costs next to nothing."""
        key = f"checkpoints/{name}/seconds.json"
        saved = self.directory.load(key)
        if saved is None:
            self.directory.save(key, seconds)
        return seconds if saved is None else saved

    def _baselines(self, original: nn.Module, unquantized: nn.Module) -> dict[str, tuple[str, Deployed]]:
        """Every baseline's description and network, by name."""
        recipe = self.plan.recipe
        plans = {
            "scratch": (compare.SCRATCH, compare.scratch_stages(recipe, original, unquantized), unquantized),
            "random": (compare.RANDOM, compare.random_stages(recipe), original),
        }
        found = {}
        for name, (description, stages, start) in plans.items():
            if not stages:
                self.report({"event": "left out", "name": name})
                continue
            small = compare.run_stages(self.workshop, stages, start)
            found[name] = description, self.workshop.deploy(small, self.directory / "baselines" / f"{name}.onnx", "test")
        return found

    def _finish(self, first: Deployed, small: Deployed, steps: list[_Done], others: dict[str, tuple[str, Deployed]]) -> Result:
        """Time all files together, measure everything, and write it down."""
        # the last step's file is small.onnx itself
        files = {"original": first.path, "small": small.path} | {step.stage.name: step.deployed.path for step in steps[:-1]}
        files |= {name: deployed.path for name, (_, deployed) in others.items()}
        self.report({"event": "stage", "name": "latency"})
        times = time_files(files, self.workshop.task, quick=self.plan.quick)
        self.report(
            {
                "event": "timed",
                "quiet": all(time.quiet for time in times.values()),
                "medians": {name: time.median for name, time in times.items()},
            }
        )
        times[steps[-1].stage.name] = times["small"]
        measure = self.workshop.measure
        before, after = measure(first, times["original"]), measure(small, times["small"])
        found = [
            Step(method_name(step.stage.method), settings(step.stage.method), step.seconds, measure(step.deployed, times[step.stage.name]))
            for step in steps
        ]
        if self.plan.baselines:
            entries = [
                {"name": name, "description": description, "profile": measure(deployed, times[name]).to_dict()}
                for name, (description, deployed) in others.items()
            ]
            self.directory.save("baselines.json", entries)
        gain = after.metric.value - before.metric.value
        drop = -gain if self.workshop.task.metric.higher_is_better else gain
        result = Result(self.directory.path, *self.plan.names, self.plan.seed, before, after, tuple(found), drop, self.plan.budget)
        self.report({"event": "finished", "directory": str(self.directory.path)})
        self.directory.save("result.json", result.to_dict())
        return result


@dataclass(frozen=True)
class _Done:
    """A step that is through."""

    stage: Stage
    seconds: float
    deployed: Deployed


def _digest_of(tensors: tuple[torch.Tensor, ...]) -> str:
    holder = nn.Module()
    for at, tensor in enumerate(tensors):
        holder.register_buffer(f"input_{at}", tensor)
    return digest(holder)
