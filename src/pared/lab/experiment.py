"""What an experiment is, and the loop that runs one so that it can be killed at any moment and go on."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pared.core.errors import RunError, SettingsError
from pared.core.files import locked
from pared.lab.results import Results, code_digest

Row = dict[str, Any]
"""One measurement in plain JSON values; "key" tells it from all others of the experiment."""

Progress = Callable[[Mapping[str, Any]], None]
Outcome = Literal["reproduced", "partly reproduced", "did not reproduce", "unfinished"]


@dataclass(frozen=True)
class Verdict:
    """What the rows say about the claim.

    Attributes:
        outcome: in one word or three.
        text: why, in one or two sentences with the numbers.
        figures: a table, its first line the titles; what the card shows.
    """

    outcome: Outcome
    text: str
    figures: tuple[tuple[str, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As it stands in result.json."""
        return {"outcome": self.outcome, "text": self.text, "figures": [list(line) for line in self.figures]}


class Experiment(Protocol):
    """A frozen dataclass whose fields are its settings.

    `run` yields one row after the other and skips those whose key is in `done`; `verdict` is a pure function of the rows, so a claim
    that doesn't hold is a result like any other.
    """

    name: ClassVar[str]
    claim: ClassVar[str]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of every random choice; each row belongs to one."""
        ...

    def keys(self) -> Sequence[str]:
        """The keys of all rows, in the order in which they are measured."""
        ...

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Measure and yield the rows that are not done; `out` is a folder for files."""
        ...

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """What the rows say."""
        ...


def settings(experiment: Experiment) -> dict[str, Any]:
    """The fields of an experiment as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))  # type: ignore[call-overload]


def configured(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with other settings; lists become tuples.

    Raises:
        SettingsError: if it has no such setting, or refuses the value.
    """
    known = [field.name for field in dataclasses.fields(experiment)]  # type: ignore[arg-type]
    wrong = [f"lab.{experiment.name}: {name} is no setting. Settings are {', '.join(known)}." for name in changes if name not in known]
    if wrong:
        raise SettingsError(wrong)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return dataclasses.replace(experiment, **values)  # type: ignore[type-var]


def run(experiment: Experiment, out: Path, *, resume: bool = False, command: str = "", progress: Progress | None = None) -> Results:
    """Run an experiment; after every row `out`/result.json is written whole, so that a killed run goes on with `resume`.

    Args:
        experiment: with its settings.
        out: a folder; made if it isn't there.
        resume: go on with the rows that are in `out` already.
        command: how the run was started, for the record.
        progress: gets one event for every row.

    Raises:
        RunError: if `out` holds rows and `resume` is off, or if they were measured with other settings or versions, or if another process
            is measuring there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: can't be made ({error.strerror or error}). Choose another --out.") from None
    with locked(out):
        return _run(experiment, out, resume, command, progress or (lambda event: None))


def _run(experiment: Experiment, out: Path, resume: bool, command: str, report: Progress) -> Results:
    path = out / "result.json"
    results = Results.start(experiment.name, experiment.claim, settings(experiment), command)
    if path.exists():
        if not resume:
            raise RunError(f"{path}: holds a result already. Go on with --resume, or choose another --out.")
        results = Results.read(path).continued(results)
    keys = list(experiment.keys())
    done = frozenset(row["key"] for row in results.rows)
    digest, start = code_digest(), time.perf_counter()
    for row in experiment.run(report, out, done):
        if row["key"] in {old["key"] for old in results.rows} or row["key"] not in keys:
            raise RunError(f"lab.{experiment.name}: the row {row['key']!r} is not one of those still to be measured.")
        seconds = time.perf_counter() - start
        results = results.with_row({**row, "code": digest}, seconds)
        start = time.perf_counter()
        report({"event": "stage", "name": str(row["key"]), "index": len(results.rows), "of": len(keys)})
        results.judged(judge(experiment, results.rows)).write(path)
    results = results.judged(judge(experiment, results.rows))
    results.write(path)
    return results


def judge(experiment: Experiment, rows: Sequence[Row]) -> dict[str, Any]:
    """The verdict as result.json holds it; "unfinished" while rows are missing."""
    missing = len(set(experiment.keys()) - {row["key"] for row in rows})
    found = experiment.verdict(rows) if rows else Verdict("unfinished", "Nothing is measured yet.")
    if missing and rows:
        found = Verdict("unfinished", f"{missing} rows are missing. So far: {found.text}", found.figures)
    return found.to_dict()
