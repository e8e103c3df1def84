"""Which experiments there are: folders with a card and a run.py. Nothing here imports torch."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pared.core.errors import RunError, SettingsError
from pared.core.files import write_atomic
from pared.lab.results import Results

if TYPE_CHECKING:
    from pared.lab.experiment import Experiment

HERE = Path(__file__).parent
BEGIN, END = "<!-- rendered from result.json -->", "<!-- end -->"


@dataclass(frozen=True)
class Entry:
    """One experiment.

    Attributes:
        name: of its folder.
        folder: where card, code and result lie.
    """

    name: str
    folder: Path

    @property
    def card(self) -> str:
        """The text of the card."""
        return (self.folder / "card.md").read_text(encoding="utf-8")

    @property
    def claim(self) -> str:
        """The paragraph below the card's heading "Claim"."""
        found = re.search(r"^## Claim\n+(.+?)\n\n", self.card, flags=re.MULTILINE | re.DOTALL)
        return " ".join(found[1].split()) if found else ""

    @property
    def results(self) -> Results | None:
        """The committed result, if there is one."""
        path = self.folder / "result.json"
        return Results.read(path) if path.exists() else None

    def load(self) -> Experiment:
        """Import the code and return the experiment with its own settings."""
        return importlib.import_module(f"pared.lab.{self.name}.run").EXPERIMENT

    def commit(self, results: Results) -> None:
        """Make these results the committed ones, and write them into the card."""
        if results.name != self.name:
            raise RunError(f"these are results of {results.name!r}, not of {self.name!r}.")
        results.write(self.folder / "result.json")
        write_atomic(self.folder / "card.md", with_results(self.card, results))


def entries(folder: Path = HERE) -> tuple[Entry, ...]:
    """All experiments, by name."""
    return tuple(Entry(path.parent.name, path.parent) for path in sorted(folder.glob("*/card.md")) if (path.parent / "run.py").exists())


def entry(name: str, folder: Path = HERE) -> Entry:
    """The experiment of a name.

    Raises:
        SettingsError: if there is none.
    """
    known = {found.name: found for found in entries(folder)}
    if name not in known:
        raise SettingsError([f"lab: there is no experiment {name!r}. Experiments are {', '.join(known)}."])
    return known[name]


def with_results(card: str, results: Results) -> str:
    """A card whose marked part shows these results.

    Raises:
        RunError: if the card has no marked part.
    """
    before, found, rest = card.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise RunError(f"the card of {results.name} lacks the lines {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n\n{rendered(results)}\n{END}{after}"


def rendered(results: Results) -> str:
    """Verdict, figures, cost and origin of a result in Markdown."""
    verdict, where = results.verdict, results.environment
    lines = [f"**{verdict['outcome'].capitalize()}.** {verdict['text']}", ""]
    if verdict["figures"]:
        titles, *body = verdict["figures"]
        lines += [_line(titles), _line(["---"] * len(titles)), *map(_line, body), ""]
    versions = ", ".join(f"{name} {where[name]}" for name in ("pared", "torch", "onnxruntime", "python") if name in where)
    codes = sorted({row["code"] for row in results.rows})
    lines += [
        f"{len(results.rows)} rows in {results.seconds / 60:.0f} minutes on {where['processor']}; {versions}; {where['date']};"
        f" code {', '.join(codes)}.",
        f"Settings: {', '.join(f'{name} {value}' for name, value in results.settings.items())}.",
        "",
    ]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def page(found: tuple[Entry, ...]) -> str:
    """All experiments with a result, as one Markdown page."""
    parts = ["# Results of the lab", ""]
    for each in found:
        if (results := each.results) is not None:
            parts += [f"## {each.name}", "", results.claim, "", rendered(results)]
    return "\n".join(parts)
