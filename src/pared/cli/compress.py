"""`pared compress`: a recipe, or limits to search one for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import typer

from pared.cli.setting import load_task, model_for, print_json, use_threads
from pared.core.errors import SettingsError
from pared.recipe import Budget, Result, read
from pared.recipe import compress as run
from pared.recipe.search import search
from pared.report import Progress, headline, print_table, read_run, result_table, write_page
from pared.training import Machine, Train


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    model: str
    data: str
    out: Path
    recipe: Path | None
    limits: tuple[str | None, str | None, str | None]
    weights: Path | None
    trained: bool
    resume: bool
    baselines: bool
    quick: bool
    seed: int
    json: bool
    quiet: bool
    threads: int | None
    machine: tuple[str, str, str]


def compress(request: Request) -> int:
    """Carry out a request; returns the exit status: 1 if a limit is not met."""
    use_threads(request.threads)
    budget = Budget.parse(*request.limits) if any(limit is not None for limit in request.limits) else None
    recipe = read(request.recipe) if request.recipe is not None else None
    if recipe is None and budget is None:
        raise SettingsError("give --recipe FILE, or at least one of --size, --latency and --drop.")
    trained = request.trained or request.weights is not None
    if recipe is not None and recipe.train is None and not trained:
        raise SettingsError(
            f"{request.recipe}: has no `train:`, and {request.model} comes with random weights. Add `train: {{epochs: 8}}` to the recipe, "
            "or give --weights FILE (or --trained, if the model brings its weights)."
        )
    device, devices, precision = request.machine
    machine = Machine(accelerator=device, devices=int(devices) if devices.isdecimal() else devices, precision=precision)  # pyright: ignore
    task = load_task(request.data, request.seed)
    model = model_for(request.model, task, request.weights, request.seed)
    with Progress(quiet=request.quiet) as progress:
        task = dataclasses.replace(task, machine=machine, report=progress)
        options = {
            "model_name": request.model, "data_name": request.data, "seed": request.seed, "resume": request.resume,
            "baselines": request.baselines, "quick": request.quick,
        }  # fmt: skip
        if recipe is None:
            assert budget is not None
            result = search(model, task, None if trained else Train(), budget, request.out, **options)
        else:
            result = run(model, task, recipe, request.out, budget=budget, trained=trained, **options)
        page = write_page(result.directory)
    show(result, page, json=request.json)
    return 1 if result.met is False else 0


def show(result: Result, page: Path, *, json: bool) -> None:
    """Print a result as a table and a sentence, or as JSON."""
    if json:
        print_json(result.to_dict())
        return
    print_table(result_table(result.directory))
    typer.echo(headline(read_run(result.directory)))
    missed = [name for name, met in result.limits.items() if not met]
    if missed:
        typer.echo(f"The budget is not met: {', '.join(missed)}. What was reached stands above.")
    elif result.met:
        typer.echo("The budget is met.")
    typer.echo(f"Report: {page}")
