"""A run directory read back: result.json (schema 1) and the files beside it, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pared.core.errors import RunError
from pared.report.fields import Fields

SCHEMA = 1


@dataclass(frozen=True)
class Latency:
    """Time of one call of the engine, in milliseconds, and how it was taken."""

    median: float | None
    p90: float | None
    batch: int | None
    threads: int | None
    engine: str | None


@dataclass(frozen=True)
class Metric:
    """A quality, the split it was computed on and the file it was read from."""

    name: str
    value: float
    split: str | None
    file: str | None

    @property
    def where(self) -> str:
        """The split as a word for readers; empty if it isn't recorded."""
        return {"valid": "validation", "train": "training"}.get(self.split or "", self.split or "")

    @property
    def is_share(self) -> bool:
        """Whether the value is a share (an accuracy), which people read in percent."""
        return "accuracy" in self.name.lower() and 0 <= self.value <= 1


@dataclass(frozen=True)
class Profile:
    """What was measured about one network; None where it was not measured."""

    params: int | None = None
    nonzero: int | None = None
    macs: float | None = None
    file_bytes: int | None = None
    wire_bytes: int | None = None
    latency: Latency | None = None
    metric: Metric | None = None
    program_bytes: int | None = None


@dataclass(frozen=True)
class Step:
    """One method of the recipe, what it took and what the network measured after it."""

    name: str
    settings: Mapping[str, Any]
    seconds: float | None
    profile: Profile


@dataclass(frozen=True)
class Baseline:
    """Another way to the same size, measured in the same run."""

    name: str
    description: str
    profile: Profile


@dataclass(frozen=True)
class Layer:
    """Parameters and multiply-accumulates (batch 1) of one module path."""

    path: str
    params: float
    macs: float


@dataclass(frozen=True)
class Run:
    """Everything that a report shows of one run."""

    model: str
    data: str
    seed: int | None
    original: Profile
    compressed: Profile
    steps: tuple[Step, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    drop: float | None = None
    budget: Mapping[str, Any] | None = None
    met: bool | None = None
    baselines: tuple[Baseline, ...] = ()
    layers: tuple[tuple[Layer, ...], tuple[Layer, ...]] = ((), ())
    recipe: str | None = None
    environment: Mapping[str, Any] | None = None
    directory: Path | None = None

    @property
    def name(self) -> str:
        """How the run is called where several are compared: its directory, else its model."""
        return self.directory.name if self.directory is not None else self.model


def read_run(directory: str | Path) -> Run:
    """Read a run directory; only result.json must be there.

    Raises:
        RunError: naming the file and the field, if a file is missing, isn't JSON, or a field has the wrong type.
    """
    directory = Path(directory).resolve()
    result = directory / "result.json"
    if not result.is_file():
        raise RunError(f"{result}: not found. A report needs the result of a finished run; resume the run first.")
    baselines, layers = _load(directory / "baselines.json"), _load(directory / "layers.json")
    recipe = directory / "recipe.yaml"
    environment = _load(directory / "environment.json")
    if environment is not None and not isinstance(environment, Mapping):
        raise RunError(f"{directory / 'environment.json'}: must be an object. Got a {type(environment).__name__}.")
    return parse_result(
        _load(result),
        source=str(result),
        directory=directory,
        recipe=_text(recipe) if recipe.is_file() else None,
        environment=environment,
        baselines=_baselines(baselines, str(directory / "baselines.json")),
        layers=_layers(layers, str(directory / "layers.json")),
    )


def parse_result(content: Any, source: str = "result.json", **beside: Any) -> Run:
    """Check the content of a result.json and turn it into a `Run`; `beside` gives what the other files hold.

    >>> parse_result({"schema": 1, "model": "lenet5", "data": "digits", "original": {"macs": 6}, "compressed": {"macs": 2}}).ratios
    {'macs': 3.0}

    Raises:
        RunError: naming `source` and the field.
    """
    fields = Fields(content, source)
    if fields.number("schema") != SCHEMA:
        raise RunError(f"{source}: schema must be {SCHEMA}. Got {content.get('schema')!r}; it was written by another version of pared.")
    original, compressed = _profile(fields.inside("original")), _profile(fields.inside("compressed"))
    recorded = fields.inside("ratios", optional=True)
    ratios = {name: recorded.number(name) for name in recorded} if recorded is not None else {}
    return Run(
        model=fields.text("model", optional=False),
        data=fields.text("data", optional=False),
        seed=fields.whole("seed"),
        original=original,
        compressed=compressed,
        steps=tuple(_step(step) for step in fields.each("steps")),
        ratios={**_divide(original, compressed), **{name: value for name, value in ratios.items() if value is not None}},
        drop=fields.number("drop"),
        budget=fields.mapping("budget"),
        met=fields.truth("met"),
        **beside,
    )


def _divide(original: Profile, compressed: Profile) -> dict[str, float]:
    """The ratios, original over compressed, of everything that both profiles hold."""
    pairs = {name: (getattr(original, name), getattr(compressed, name)) for name in ("params", "macs", "file_bytes", "wire_bytes")}
    if original.latency is not None and compressed.latency is not None:
        pairs["latency"] = (original.latency.median, compressed.latency.median)
    return {name: before / after for name, (before, after) in pairs.items() if before is not None and after}


def _profile(fields: Fields) -> Profile:
    latency, metric = fields.inside("latency_ms", optional=True), fields.inside("metric", optional=True)
    value = metric.number("value") if metric is not None else None
    return Profile(
        params=fields.whole("params"),
        nonzero=fields.whole("nonzero"),
        macs=fields.number("macs"),
        file_bytes=fields.whole("file_bytes"),
        wire_bytes=fields.whole("wire_bytes"),
        program_bytes=fields.whole("program_bytes"),
        latency=None
        if latency is None
        else Latency(
            median=latency.number("median"),
            p90=latency.number("p90"),
            batch=latency.whole("batch"),
            threads=latency.whole("threads"),
            engine=latency.text("engine"),
        ),
        metric=None
        if metric is None or value is None
        else Metric(metric.text("name") or "metric", value, metric.text("split"), metric.text("file")),
    )


def _step(fields: Fields) -> Step:
    profile = fields.inside("profile", optional=True)
    return Step(
        name=fields.text("name", optional=False),
        settings=fields.mapping("settings") or {},
        seconds=fields.number("seconds"),
        profile=_profile(profile) if profile is not None else Profile(),
    )


def _baselines(content: Any, source: str) -> tuple[Baseline, ...]:
    if content is None:
        return ()
    entries = Fields({"baselines": content}, source).each("baselines")
    return tuple(
        Baseline(entry.text("name", optional=False), entry.text("description") or "", _profile(entry.inside("profile")))
        for entry in entries
    )


def _layers(content: Any, source: str) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    if content is None:
        return (), ()
    fields = Fields(content, source)
    return _layer_list(fields.each("original")), _layer_list(fields.each("compressed"))


def _layer_list(entries: Sequence[Fields]) -> tuple[Layer, ...]:
    return tuple(Layer(entry.text("path", optional=False), entry.number("params") or 0, entry.number("macs") or 0) for entry in entries)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: can't be read ({error}).") from error


def _load(path: Path) -> Any:
    """The JSON content of a file, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: isn't JSON (line {error.lineno}: {error.msg}). It was damaged or edited; run again.") from error
