"""`pared plan --sensitivity`: cut one class of neurons at a time, and show what the network loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import typer

from pared.cli.setting import load_task, model_for, print_json
from pared.core.errors import SettingsError
from pared.prune.sensitivity import sensitivity
from pared.report import Progress
from pared.report.pictures import check_picture
from pared.report.sensitivity import write_sensitivity


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    model: str
    data: str | None
    weights: Path | None
    shares: str | None
    picture: Path | None
    seed: int
    json: bool


def show_sensitivity(request: Request) -> int:
    """Measure and print; everything that can be wrong with the request is said before anything is measured."""
    if request.data is None:
        raise SettingsError("--sensitivity needs --data DATA: the metric is measured on its validation split.")
    shares = parse_shares(request.shares)
    picture = None if request.picture is None else check_picture(request.picture)
    task = load_task(request.data, request.seed)
    model = model_for(request.model, task, request.weights, request.seed)
    if request.weights is None:
        typer.echo("pared: without --weights FILE, the weights are those that MODEL comes with.", err=True)
    with Progress() as progress:
        task = dataclasses.replace(task, report=progress)
        found = sensitivity(model, task) if shares is None else sensitivity(model, task, shares)
    if picture is not None:
        write_sensitivity(found, picture)
    if request.json:
        print_json({"model": request.model, "data": request.data, **found.to_dict()})
        return 0
    typer.echo(str(found))
    if picture is not None:
        typer.echo(f"Picture: {picture}")
    return 0


def refuse_alone(given: Mapping[str, object]) -> None:
    """Refuse options that mean nothing without --sensitivity.

    Raises:
        SettingsError: naming them.
    """
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise SettingsError([f"{name} goes with --sensitivity." for name in wrong])


def parse_shares(text: str | None) -> tuple[float, ...] | None:
    """The numbers of "0.75,0.5,0.25"; None for None.

    Raises:
        SettingsError: if it isn't a list of numbers between 0 and 1.

    >>> parse_shares("0.75, 0.5")
    (0.75, 0.5)
    """
    if text is None:
        return None
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise SettingsError(f"--shares must be numbers between 0 and 1 with commas between, such as 0.75,0.5,0.25. Got {text!r}.")
    return shares
