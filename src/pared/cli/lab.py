"""`pared lab`: the experiments, their claims and what came out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from pared.core.errors import SettingsError
from pared.core.files import write_atomic
from pared.lab.catalogue import Entry, entries, entry, page, rendered


def list_experiments(json: bool) -> int:
    """Print every experiment with its claim and the outcome of its committed result."""
    found = [{"name": each.name, "claim": each.claim, "outcome": _outcome(each)} for each in entries()]
    if json:
        _print_json(found)
        return 0
    for each in found:
        typer.echo(f"{each['name']}: {each['outcome']}\n  {each['claim']}")
    return 0


def run_experiment(name: str, out: Path, changes: Sequence[str], *, resume: bool, commit: bool, json: bool, quiet: bool) -> int:
    """Run an experiment, print its verdict, and with `commit` make the result the committed one; 1 if rows are missing."""
    from pared.lab.experiment import configured, run
    from pared.report import Progress

    found = entry(name)
    experiment = configured(found.load(), parse_settings(changes))
    with Progress(quiet or json) as progress:
        results = run(experiment, out, resume=resume, command=shlex.join(["pared", *sys.argv[1:]]), progress=progress)
    if commit:
        found.commit(results)
    if json:
        _print_json({"name": name, "verdict": results.verdict, "result": str(out / "result.json")})
    else:
        typer.echo(rendered(results))
    return 1 if results.verdict["outcome"] == "unfinished" else 0


def report(names: Sequence[str], out: Path | None, json: bool) -> int:
    """Print the committed results, or write them as one Markdown page."""
    chosen = tuple(entry(name) for name in names) if names else entries()
    if json:
        _print_json([{"name": each.name, "claim": each.claim, "verdict": results.verdict} for each in chosen if (results := each.results)])
        return 0
    text = page(chosen)
    if out is None:
        typer.echo(text)
        return 0
    write_atomic(out, text)
    typer.echo(f"Page: {out}")
    return 0


def parse_settings(changes: Sequence[str]) -> dict[str, Any]:
    """Read "name=value" pairs, each value as YAML.

    Raises:
        SettingsError: if one has no name or no value.

    >>> parse_settings(["keep=0.25", "seeds=[0, 1]"])
    {'keep': 0.25, 'seeds': [0, 1]}
    """
    import yaml

    parsed: dict[str, Any] = {}
    wrong: list[str] = []
    for change in changes:
        name, equals, value = change.partition("=")
        try:
            parsed[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name.strip():
            wrong.append(f"lab: --set must be NAME=VALUE. Got {change!r}.")
    if wrong:
        raise SettingsError(wrong)
    return parsed


def _outcome(found: Entry) -> str:
    results = found.results
    return results.verdict["outcome"] if results is not None else "not run yet"


def _print_json(content: Any) -> None:
    # cli.setting has the same, but imports torch
    import json

    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
