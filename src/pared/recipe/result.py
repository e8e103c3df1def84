"""What a run found: result.json, schema 1."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pared.core.errors import RunError
from pared.measure import Latency, Metric, Profile
from pared.recipe.budget import Budget

SCHEMA = 1


@dataclass(frozen=True)
class Step:
    """One method of the recipe: its settings, how long it took, and the network after it, measured on the validation split."""

    name: str
    settings: dict[str, Any]
    seconds: float
    profile: Profile

    def to_dict(self) -> dict[str, Any]:
        """As it stands in result.json."""
        return {"name": self.name, "settings": self.settings, "seconds": round(self.seconds, 3), "profile": self.profile.to_dict()}


@dataclass(frozen=True)
class Result:
    """Original and compressed network, measured on their files on the test split.

    Args:
        directory: the run directory, with `original.onnx`, `small.onnx` and all other files.
        model: name of the model.
        data: name of the data.
        seed: the run's seed.
        original: the network that the recipe was given.
        compressed: the network that came out.
        steps: the methods in between.
        drop: how much worse the metric of `compressed` is, in its own unit; negative if it is better.
        budget: the limits that were asked for.
    """

    directory: Path
    model: str
    data: str
    seed: int
    original: Profile
    compressed: Profile
    steps: tuple[Step, ...]
    drop: float
    budget: Budget | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """Original ÷ compressed; without those that are 0 in the compressed network."""
        before, after = _amounts(self.original), _amounts(self.compressed)
        return {name: before[name] / after[name] for name in before if after[name]}

    @property
    def limits(self) -> dict[str, bool]:
        """Which of the budget's limits are met."""
        if self.budget is None:
            return {}
        return self.budget.check(
            (self.original.file_bytes, self.compressed.file_bytes),
            (self.original.latency.median, self.compressed.latency.median),
            self.drop,
        )

    @property
    def met(self) -> bool | None:
        """Whether the budget is met; None without a budget."""
        return all(self.limits.values()) if self.budget is not None else None

    def to_dict(self) -> dict[str, Any]:
        """The content of result.json."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "data": self.data,
            "seed": self.seed,
            "original": self.original.to_dict(),
            "compressed": self.compressed.to_dict(),
            "steps": [step.to_dict() for step in self.steps],
            "ratios": {name: round(value, 4) for name, value in self.ratios.items()},
            "drop": round(self.drop, 10),
            "budget": self.budget.to_dict() if self.budget is not None else None,
            "met": self.met,
        }

    @classmethod
    def read(cls, directory: str | Path) -> Result:
        """Read the result.json of a run directory.

        Raises:
            RunError: if the run isn't finished or the file is damaged.
        """
        path = Path(directory) / "result.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                directory=Path(directory),
                model=content["model"],
                data=content["data"],
                seed=content["seed"],
                original=_profile(content["original"]),
                compressed=_profile(content["compressed"]),
                steps=tuple(Step(**{**step, "profile": _profile(step["profile"])}) for step in content["steps"]),
                drop=content["drop"],
                budget=Budget.from_dict(content["budget"]) if content["budget"] is not None else None,
            )
        except FileNotFoundError:
            raise RunError(f"{path}: is not there; the run isn't finished, or this is no run directory.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: can't be read ({type(error).__name__}: {error}).") from error


def _amounts(profile: Profile) -> dict[str, float]:
    return {
        "params": profile.params,
        "macs": profile.macs,
        "file_bytes": profile.file_bytes,
        "wire_bytes": profile.wire_bytes,
        "latency": profile.latency.median,
    }


def _profile(content: dict[str, Any]) -> Profile:
    fields = {name: value for name, value in content.items() if name not in ("latency_ms", "metric")}
    return Profile(**fields, latency=Latency(**content["latency_ms"]), metric=Metric(**content["metric"]))
