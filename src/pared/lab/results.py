"""result.json of an experiment: settings, environment, rows, verdict; always written whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pared
from pared.core.errors import RunError
from pared.core.files import write_atomic

SCHEMA = 1


@dataclass(frozen=True)
class Results:
    """What an experiment found, so far or in the end.

    Attributes:
        name: of the experiment.
        claim: what was to be shown.
        settings: of the experiment, as JSON.
        environment: versions and machine, as `recipe.files.environment` gives them.
        command: how it was started.
        seconds: spent on all rows.
        verdict: outcome, text and figures; computed from the rows.
        rows: the measurements, each with a key and the digest of the code that made it.
    """

    name: str
    claim: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    command: str
    seconds: float = 0.0
    verdict: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: tuple[dict[str, Any], ...] = ()

    @classmethod
    def start(cls, name: str, claim: str, settings: dict[str, Any], command: str) -> Results:
        """No rows yet, on this machine."""
        from pared.recipe.files import environment
        from pared.training import Machine

        return cls(name, claim, settings, environment(Machine(accelerator="cpu")), command)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a result.json.

        Raises:
            RunError: if it is missing, damaged or of another schema.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA:
                raise RunError(f"{path}: is of another schema than {SCHEMA}. Run the experiment again.")
            return cls(**{**content, "rows": tuple(content["rows"])})
        except FileNotFoundError:
            raise RunError(f"{path}: is not there. Run the experiment first.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: can't be read ({type(error).__name__}: {error}).") from error

    def continued(self, now: Results) -> Results:
        """These rows, to go on in the run `now`.

        Raises:
            RunError: naming every setting and version that differs.
        """
        different = [f"name ({self.name} then, {now.name} now)"] if self.name != now.name else []
        for before, after in ((self.settings, now.settings), (_versions(self.environment), _versions(now.environment))):
            different += [
                f"{field} ({before.get(field)} then, {after.get(field)} now)"
                for field in sorted(before.keys() | after.keys())
                if before.get(field) != after.get(field)
            ]
        if different:
            raise RunError(f"the rows so far were measured with another {', another '.join(different)}. Choose another --out.")
        return dataclasses.replace(self, command=now.command)

    def with_row(self, row: dict[str, Any], seconds: float) -> Results:
        """One row more."""
        return dataclasses.replace(self, rows=(*self.rows, row), seconds=round(self.seconds + seconds, 1))

    def judged(self, verdict: dict[str, Any]) -> Results:
        """With a verdict."""
        return dataclasses.replace(self, verdict=verdict)

    def write(self, path: Path) -> None:
        """Write all of it, or leave the old file as it is."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        rows = content.pop("rows")
        # a row a line: versions of the file then differ by rows
        head = json.dumps(content, indent=1, ensure_ascii=False)[:-2]
        lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in rows)
        write_atomic(path, f'{head},\n "rows": [\n{lines}\n ]\n}}\n')


def code_digest() -> str:
    """Twelve hexadecimal digits that change with any line of pared's source."""
    digest = hashlib.sha256()
    root = Path(pared.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _versions(environment: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for rows to stand side by side; a run may take days, and go on with more cores."""
    return {name: value for name, value in environment.items() if name not in ("date", "cores", "training threads")}
