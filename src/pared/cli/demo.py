"""`pared demo`: one small network through the five families, on the digits that come with pared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from pared.architecture import LowRank, nets
from pared.cli.setting import load_task, print_json, use_threads
from pared.core.errors import RunError
from pared.core.method import Recipe
from pared.core.seeds import seed_everything
from pared.distill import Teach
from pared.dynamic import Exits
from pared.prune import Neurons
from pared.quantize import Int8
from pared.recipe import compress
from pared.report import Progress, comparison_table, print_table, write_comparison, write_page
from pared.training import Journal, Train

TRAIN = Train(epochs=6)


def recipes() -> dict[str, Recipe]:
    """One recipe for each of the five families, and one that combines three of them."""
    return {
        "pruning": Recipe(Neurons(keep=0.5, tune=Train(epochs=5))),
        "distillation": Recipe(Neurons(keep=0.25), Teach(epochs=10)),
        "quantization": Recipe(Int8()),
        "low-rank": Recipe(LowRank(energy=0.5, tune=Train(epochs=3))),
        "early-exits": Recipe(Exits(count=1, max_drop=0.01, train=Train(epochs=6))),
        "combined": Recipe(Neurons(keep=0.35), Teach(epochs=10), Int8()),
    }


def demo(out: Path, *, seed: int, json: bool, quiet: bool, threads: int, resume: bool) -> int:
    """Train the network once, carry out every recipe on it, and show all of them beside the original."""
    use_threads(threads)
    if out.exists() and not resume and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: is not empty. Go on with --resume, or choose another directory with -o.")
    task = load_task("digits", seed, batch_size=32)  # 1,197 samples: small batches, or an epoch is over after ten steps
    plans = recipes()
    results = []
    with Progress(quiet=quiet) as progress:
        task = dataclasses.replace(task, report=progress)
        seed_everything(seed)
        network = nets.conv4(classes=10, channels=1, size=8)
        progress({"event": "stage", "name": "training the original"})
        model = TRAIN(network, dataclasses.replace(task, journal=Journal(out / "original" / f"seed-{seed}")))
        for index, (name, recipe) in enumerate(plans.items(), 1):
            progress({"event": "stage", "name": f"{name} (recipe {index} of {len(plans)})"})
            results.append(
                compress(
                    model, task, recipe, out / name, model_name="conv4", data_name="digits", seed=seed, trained=True, resume=resume,
                    baselines=False, quick=True,
                )
            )  # fmt: skip
            write_page(out / name)
        page = write_comparison(out, [out / name for name in plans])
    if json:
        print_json({"runs": {name: result.to_dict() for name, result in zip(plans, results, strict=True)}, "page": str(page)})
    else:
        print_table(comparison_table([out / name for name in plans]))
        typer.echo(f"Report: {page}")
    return 0
