"""Find a recipe for a budget: how much to prune before the numbers are made small."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pared.core.errors import RunError
from pared.core.files import write_atomic
from pared.core.method import Recipe
from pared.core.seeds import seed_everything
from pared.distill import Teach
from pared.measure import file_metric
from pared.prune import Neurons
from pared.quantize import Int8
from pared.recipe.budget import Budget
from pared.recipe.result import Result
from pared.recipe.runner import compress
from pared.recipe.stages import stage_seed
from pared.training import Journal, Task, Train

TRIALS = 5
"""Recipes that are tried. The first prunes nothing, each other one halves what isn't known of the share (on a scale of powers)."""

SMALLEST = 1 / 16
"""The smallest share of neurons that is considered; thinner networks rarely learn anything."""


def search(model: nn.Module, task: Task, train: Train | None, budget: Budget, out: str | Path, **options: Any) -> Result:
    """Look for the share of neurons to keep, with distillation and 8 bits after it, and carry the best one out into `out`.

    Every trial is a run of its own in `out/trials/`, judged by its deployed file and on the *validation* split. Where size or latency are
    limited, the largest share that is small and fast enough is the best, since accuracy grows with it; where only the drop is limited,
    the smallest share that stays within it. If no trial fits, the nearest is carried out, and its result says that the budget is not met.
    The chosen recipe is then measured on the test split like any other.

    Args:
        model: the network; trained first if `train` says how.
        task: data, loss, metric.
        train: how the original is trained; None: it is trained already.
        budget: the limits.
        out: the run directory.
        **options: `model_name`, `data_name`, `seed`, `resume`, `baselines` and `quick`, as for `compress`.

    Raises:
        RunError: if `out` holds a search already and `resume` is not asked for.
        ParedError: as `compress`.
    """
    trials = Path(out) / "trials"
    if trials.exists() and not options.get("resume", False):
        raise RunError(f"{out}: holds a search already. Go on with --resume (resume=True), or choose another directory.")
    if train is not None:
        task.report({"event": "stage", "name": "training the original"})
        seed_everything(stage_seed(options.get("seed", 0), "00-train"))
        model = train(model, dataclasses.replace(task, journal=Journal(trials / "original")))
    found: dict[float, dict[str, Any]] = {}

    def judge(keep: float) -> dict[str, bool]:
        task.report({"event": "stage", "name": f"trial {len(found) + 1} of at most {TRIALS}: keep {keep:g} of the neurons"})
        arguments = {**options, "baselines": False, "resume": True, "trained": True}
        result = compress(model, task, candidate(keep, train), trials / f"keep-{keep:g}", **arguments)
        original = file_metric(result.directory / "original.onnx", task, "valid")
        value = result.steps[-1].profile.metric.value
        drop = original - value if task.metric.higher_is_better else value - original
        before, after = result.original, result.compressed
        met = budget.check((before.file_bytes, after.file_bytes), (before.latency.median, after.latency.median), drop)
        found[keep] = {"keep": keep, "ratios": result.ratios, "valid drop": drop, "met": met}
        return met

    keep = best_share(judge, shrink=budget.size is not None or budget.latency is not None)
    write_atomic(trials / "trials.json", json.dumps(list(found.values()), indent=2) + "\n")
    return compress(model, task, candidate(keep, train), out, budget=budget, **{**options, "trained": True})


def candidate(keep: float, train: Train | None = None) -> Recipe:
    """Prune to a share of the neurons, let the original teach what is left, and go to 8 bits; a share of 1 is not pruned.

    >>> [type(step).__name__ for step in candidate(0.5).steps]
    ['Neurons', 'Teach', 'Int8']
    """
    return Recipe(*((Neurons(keep=keep), Teach()) if keep < 1 else ()), Int8(), train=train)


def best_share(judge: Callable[[float], dict[str, bool]], *, shrink: bool, trials: int = TRIALS) -> float:
    """The share to keep, found by bisection.

    Args:
        judge: which limits a share meets; called for at most `trials` shares.
        shrink: look for the largest share that meets size and latency; else for the smallest that meets the drop.
        trials: how many shares may be tried.

    Returns:
        The best share that was tried and fits, else the nearest to fitting.

    >>> best_share(lambda keep: {"size": keep <= 0.3}, shrink=True)
    0.297
    """

    def fits(share: float) -> bool:
        return all(met for name, met in judge(share).items() if not shrink or name != "drop")

    if fits(1.0) == shrink:
        return 1.0  # nothing needs to be pruned, or nothing may be
    low, high, best = SMALLEST, 1.0, 1.0
    for _ in range(trials - 1):
        share = round((low * high) ** 0.5, 3)
        fit = fits(share)
        if fit == shrink:
            low = share
        else:
            high = share
        # while nothing has fitted yet, the smallest share is the nearest to it
        best = share if fit or (shrink and low == SMALLEST) else best
    return best
