"""How long it takes to find out what can be cut, and to cut it: beside torch-pruning, on the models of `coverage`."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from pared.core.files import write_atomic
from pared.core.problems import Problems
from pared.core.seeds import seed_everything
from pared.graph.cutting import cut_model
from pared.lab.claims import judged
from pared.lab.coverage.distinct import make_distinct
from pared.lab.coverage.models import Subject, build, names
from pared.lab.coverage.peer import cut_by_torch_pruning
from pared.lab.coverage.run import outcome
from pared.lab.coverage.worker import parameters, tiny
from pared.lab.experiment import Progress, Row, Verdict
from pared.prune.chooser import Chooser
from pared.prune.importance import Magnitude

TOOLS = ("pared", "torch-pruning")
COVERAGE = Path(__file__).parents[1] / "coverage" / "result.json"


@dataclass(frozen=True)
class CutTime:
    """Seconds of CPU for analysis and cut to half the neurons, each model and tool in a process of its own.

    Args:
        seeds: of weights and inputs.
        keep: the share of neurons that stays.
        repeats: cuts of the same model; the fastest counts.
        seconds: wall-clock time after which a process is ended.
        every: of the models of `coverage`, from small to large, every so manieth.
        only: names, to run a part.
    """

    name: ClassVar[str] = "cut_time"
    claim: ClassVar[str] = (
        "Over every third model of coverage, analysis and cut take pared less time on the median than torch-pruning, where a model that a "
        "tool can't cut, or cuts wrongly, counts as never done."
    )

    seeds: tuple[int, ...] = (0,)
    keep: float = 0.5
    repeats: int = 2
    seconds: int = 300
    every: int = 3
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("lab.cut_time")
        problems.number("keep", self.keep, low=0, high=1)
        problems.number("repeats", self.repeats, low=1, integer=True)
        problems.number("seconds", self.seconds, low=1, integer=True)
        problems.number("every", self.every, low=1, integer=True)
        problems.check(len(self.seeds) > 0, "seeds", "at least one number", self.seeds)
        problems.check(set(self.only) <= set(names()), "only", "names such as torchvision:resnet18", self.only)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """A model and a seed."""
        return tuple(f"{name} seed {seed}" for name in (self.only or names()[:: self.every]) for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """One row a model; torch-pruning isn't started where `coverage` saw it end without a right cut."""
        known = covered()
        for key in self.keys():
            if key in done:
                continue
            name, _, seed = key.partition(" seed ")
            row: Row = {"key": key, "model": name, "seed": int(seed)}
            before = known.get(name)
            for tool in TOOLS:
                word = outcome(before, tool)[0] if before is not None else "passed"
                if tool == "pared" or word in ("passed", "not judged"):
                    row[tool] = self._in_process(tool, name, int(seed), out / "now.json")
                else:
                    row[tool] = {"failure": f"{word} in coverage"}
            if before is not None:
                row["params_in_coverage"] = before["pared"].get("norms", before["pared"].get("exact", {})).get("params")
            yield row

    def _in_process(self, tool: str, name: str, seed: int, file: Path) -> dict[str, Any]:
        file.unlink(missing_ok=True)
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["pared.lab.coverage.preloaded"])
        process = server.Process(target=work, args=(tool, name, seed, self.keep, self.repeats, file))
        process.start()
        process.join(self.seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"failure": f"none in {self.seconds} s"}
        file.unlink(missing_ok=True)
        return found

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """The claim, medians over all models and over those that both cut, and whether the cuts are those of `coverage`."""
        times = {tool: [best(row[tool]) for row in rows] for tool in TOOLS}
        ours, theirs = (statistics.median(times[tool]) for tool in TOOLS)
        both = [(a, b) for a, b in zip(*times.values(), strict=True) if math.isfinite(a) and math.isfinite(b)]
        same = [row["pared"].get("params") == row["params_in_coverage"] for row in rows if row.get("params_in_coverage")]
        claims = {
            f"over {len(rows)} models pared's median ({_shown(ours)} s) is below torch-pruning's ({_shown(theirs)} s)": ours < theirs,
            f"pared's cuts have as many parameters as in coverage ({sum(same)} of {len(same)})": all(same),
        }
        table = [("", *TOOLS), (f"median seconds, {len(rows)} models", _shown(ours), _shown(theirs))]
        table.append(("models cut", *(str(sum(map(math.isfinite, times[tool]))) for tool in TOOLS)))
        if both:
            medians = (_shown(statistics.median(seconds)) for seconds in zip(*both, strict=True))
            table.append((f"median seconds, the {len(both)} models that both cut", *medians))
            table.append(("faster, of these", str(sum(a < b for a, b in both)), str(sum(b < a for a, b in both))))
        return judged(claims, tuple(table))


def covered() -> Mapping[str, Row]:
    """The committed rows of `coverage` by model."""
    if not COVERAGE.exists():
        return {}
    return {row["model"]: row for row in json.loads(COVERAGE.read_text(encoding="utf-8"))["rows"]}


def best(found: Mapping[str, Any]) -> float:
    """The fewest seconds; infinite where there is no cut."""
    return min(found["seconds"]) if "failure" not in found else math.inf


def work(tool: str, name: str, seed: int, keep: float, repeats: int, file: Path) -> None:
    """All of a process: seconds and parameters of the cut network, or why there is none."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        subject = build(name, seed)
        make_distinct(subject.model, seed)
        seed_everything(seed)
        cut = _pared if tool == "pared" else _torch_pruning
        cut(tiny(), keep)  # no tool pays for what it imports at its first use
        runs = [cut(subject, keep) for _ in range(repeats)]
        content: dict[str, Any] = {"seconds": [round(seconds, 3) for seconds, _ in runs], "params": runs[0][1]}
    except Exception as error:
        content = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
    write_atomic(file, json.dumps(content))


def _pared(subject: Subject, keep: float) -> tuple[float, int]:
    start = time.process_time()
    small = cut_model(subject.model, subject.inputs, Chooser(keep, Magnitude(), norms=True)).model
    return time.process_time() - start, parameters(small)


def _torch_pruning(subject: Subject, keep: float) -> tuple[float, int]:
    small, seconds = cut_by_torch_pruning(Subject(copy.deepcopy(subject.model), subject.inputs), keep)
    return seconds, parameters(small)


def _shown(seconds: float) -> str:
    return f"{seconds:.2f}" if math.isfinite(seconds) else "never"


EXPERIMENT = CutTime()
