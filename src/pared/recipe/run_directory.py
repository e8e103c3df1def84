"""The directory of a run: who may use it, what was done in it before, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pared.core.errors import RunError
from pared.core.files import locked, write_atomic
from pared.training import Journal


class RunDirectory:
    """A run's files. Take one with `RunDirectory.open`, which checks that it is this run's and locks it.

    run.json          what makes this run the one it is (model, recipe, data, seed …)
    recipe.yaml       the recipe
    events.jsonl      what happened, one JSON object a line
    checkpoints/      of every training, by stage
    steps/            the network after every step, and what was measured on it
    result.json       comes last: where it is, the run is finished
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def inspect(self, identity: dict[str, Any], *, resume: bool) -> bool:
        """Check without changing anything whether a run with this identity may go on or begin here.

        Returns:
            Whether the run is finished.

        Raises:
            RunError: if something else is here, or this run is and `resume` was not asked for.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file. Choose another directory.")
        found = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        saved = self.load("run.json")
        if saved is None:
            # a run that was killed before its first file was whole leaves only temporary files
            if any(not _is_temporary(name) and name != "trials" for name in found):
                raise RunError(f"{self.path}: is not empty and holds no run. Choose another directory.")
            return False
        different = [key for key, value in identity.items() if saved.get(key) != value]
        if different:
            hint = " A model with random weights must be built from the same seed (torch.manual_seed)." if different == ["weights"] else ""
            raise RunError(f"{self.path}: holds another run ({', '.join(different)} differ). Choose another directory.{hint}")
        if not resume:
            state = "finished" if (self / "result.json").exists() else "unfinished"
            raise RunError(f"{self.path}: holds a run already ({state}). Go on with --resume (resume=True), or choose another directory.")
        return (self / "result.json").exists()

    @contextlib.contextmanager
    def open(self, identity: dict[str, Any], *, resume: bool) -> Iterator[RunDirectory]:
        """Create or take up the directory for one process; leftovers of a killed process are removed.

        Raises:
            RunError: as `inspect`, if another process works here, or if the place can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                self.inspect(identity, resume=resume)
                self._clean()
                if self.load("run.json") is None:
                    self.save("run.json", identity)
                yield self
        except OSError as error:
            raise RunError(
                f"{error.filename or self.path}: can't be written ({error.strerror or error}). Then run again with --resume."
            ) from error

    def load(self, name: str) -> Any:
        """The content of a JSON file, or None if there is none.

        Raises:
            RunError: if it is damaged.
        """
        path = self / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: can't be read ({error}). Delete {self.path} and start again.") from error

    def save(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        write_atomic(self / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def journal(self, stage: str) -> Journal:
        """Where the trainings of a stage keep their checkpoints."""
        return Journal(self / "checkpoints" / stage)

    def log(self, event: dict[str, Any]) -> None:
        """Append an event to events.jsonl, and see it on the disk before going on.

        Raises:
            RunError: if the disk is full.
        """
        line = json.dumps({"time": round(time.time(), 3), **event}, default=str) + "\n"
        path = self / "events.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{path}: can't be written ({error.strerror}). Mend this and run again with --resume.") from error

    def events(self) -> list[dict[str, Any]]:
        """All events so far."""
        path = self / "events.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _clean(self) -> None:
        """Remove temporary files of a killed process, and the half line that it may have left at the end of the events."""
        for path in self.path.rglob(".*.tmp"):
            path.unlink(missing_ok=True)
        events = self / "events.jsonl"
        if events.exists():
            content = events.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                with events.open("r+b") as file:
                    file.truncate(whole)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
