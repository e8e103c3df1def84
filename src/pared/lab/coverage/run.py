"""Which networks can be cut to half their neurons, and is what is left right? Beside torch-pruning."""

from __future__ import annotations

import json
import multiprocessing
import signal
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pared.core.problems import Problems
from pared.lab.coverage.models import names
from pared.lab.experiment import Progress, Row, Verdict

TOOLS = ("pared", "torch-pruning")
ENOUGH = 0.9  # of the neurons can be cut: then the MACs must fall
FALL = 0.4  # by this share at least
JUDGED = ("layer_norm", "group_norm", "rms_norm")  # operators for which the oracle has a reference
PASS = 0.95  # of the models, for the claim to hold
BLIND = 1e-3  # an error larger than this share of what the outputs vary over inputs could hide another


@dataclass(frozen=True)
class Coverage:
    """Every model of torchvision and the smallest of every timm family, each in a process of its own.

    Args:
        keep: the share of neurons that stays.
        seeds: of weights and inputs.
        seconds: CPU time that pared may spend on one model, with all checks.
        peer_seconds: and torch-pruning; most models take it about a second or less, and some, where it follows paths one by one, minutes.
        only: names, to run a part; all models by default.
        tools: which of "pared" and "torch-pruning".
    """

    name: ClassVar[str] = "coverage"
    claim: ClassVar[str] = (
        "At least 95 % of the classification, segmentation, optical-flow and video models of torchvision 0.28 and of the smallest model of "
        "every timm family can be cut to half their neurons without a line of code about them, and no cut gives wrong outputs."
    )

    keep: float = 0.5
    seeds: tuple[int, ...] = (0,)
    seconds: int = 600
    peer_seconds: int = 60
    only: tuple[str, ...] = ()
    tools: tuple[str, ...] = TOOLS

    def __post_init__(self) -> None:
        problems = Problems("lab.coverage")
        problems.number("keep", self.keep, low=0, high=1)
        problems.number("seconds", self.seconds, low=1, integer=True)
        problems.number("peer_seconds", self.peer_seconds, low=1, integer=True)
        problems.check(len(self.seeds) > 0, "seeds", "at least one number", self.seeds)
        problems.check(set(self.only) <= set(names()), "only", "names such as torchvision:resnet18", self.only)
        problems.check(bool(self.tools) and set(self.tools) <= set(TOOLS), "tools", f"among {', '.join(TOOLS)}", self.tools)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """A model and a seed."""
        return tuple(f"{name} seed {seed}" for name in (self.only or names()) for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """One row a model and seed: what each tool did."""
        out.mkdir(parents=True, exist_ok=True)
        for key in self.keys():
            if key not in done:
                name, _, seed = key.partition(" seed ")
                found = {tool: self._in_process(tool, name, int(seed), out / "now.json") for tool in self.tools}
                yield {"key": key, "model": name, "seed": int(seed), **found}

    def _in_process(self, tool: str, name: str, seed: int, file: Path) -> dict[str, Any]:
        from pared.lab.coverage.worker import work  # limits of a process: not on Windows, where the other experiments run

        file.unlink(missing_ok=True)
        seconds = self.seconds if tool == "pared" else self.peer_seconds
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["pared.lab.coverage.preloaded"])
        process = server.Process(target=work, args=(tool, name, seed, self.keep, seconds, file))
        process.start()
        process.join(10 * seconds)  # the worker limits its CPU time; this ends what hangs, also on a machine that others use
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode or 0
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"stage": "start"}
        file.unlink(missing_ok=True)
        if code < 0:
            limit = f"more than {seconds} s" if -code in (signal.SIGXCPU, signal.SIGKILL) else "killed"
            found["failure"] = f"{limit} ({signal.Signals(-code).name})"
        elif code > 0:
            found.setdefault("failure", f"status {code}")
        return found

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Counts of both tools, and whether the claim holds."""
        outcomes = {tool: [outcome(row, tool) for row in rows if tool in row] for tool in self.tools}
        titles = ("", *self.tools)
        table = [("models", *(str(len(outcomes[tool])) for tool in self.tools))]
        for word in ("passed", "wrong outputs", "not judged", "failed", "limit"):
            table.append((word, *(str(sum(found[0] == word for found in outcomes[tool])) for tool in self.tools)))
        both = [row for row in rows if all(_seconds(row.get(tool, {}), tool) is not None for tool in self.tools)]
        times = {tool: [_seconds(row[tool], tool) or 0.0 for row in both] for tool in self.tools}
        medians = (f"{statistics.median(times[tool]):.2f}" if both else "–" for tool in self.tools)
        table.append((f"median seconds, {len(both)} models", *medians))
        ours = [found[0] for found in outcomes.get("pared", [])]
        passed, wrong = ours.count("passed"), ours.count("wrong outputs")
        share = passed / len(ours) if ours else 0.0
        reasons = Counter(f"{word}: {why}" for word, why in outcomes.get("pared", []) if word != "passed")
        text = f"{passed} of {len(ours)} models passed ({share:.1%}), {wrong} gave wrong outputs."
        text += "".join(f" {count} × {why}." for why, count in reasons.most_common(5))
        if wrong == 0 and share >= PASS:
            return Verdict("reproduced", text, (titles, *table))
        return Verdict("partly reproduced" if wrong == 0 and share >= 0.8 else "did not reproduce", text, (titles, *table))


def outcome(row: Row, tool: str) -> tuple[str, str]:
    """ "passed", "wrong outputs", "not judged", "failed" or "limit" (of time or memory), and why.

    "not judged" is a cut that runs with finite outputs of the right shape, but for which there is no reference: an operator other than a
    norm layer takes a statistic over an axis that was cut.
    """
    found = row[tool]
    parts = [found[mode] for mode in ("exact", "norms") if mode in found] if tool == "pared" else [found]
    for part in parts:
        if "equal" in part and not part["equal"] and not _excused(part, row, tool):
            return "wrong outputs", part.get("not_comparable") or f"relative error {part.get('error')}"
    if "failure" in found:
        limit = found["failure"].startswith(("more than", "MemoryError")) or "can't allocate memory" in found["failure"]
        return ("limit" if limit else "failed"), f"{found['stage']}: {found['failure']}"
    last = parts[-1]
    if tool == "pared" and last["share"] >= ENOUGH and last["macs"] > (1 - FALL) * found["macs_before"]:
        return "failed", f"MACs fell by {1 - last['macs'] / found['macs_before']:.0%} only"
    if any(part["equal"] and part["error"] >= BLIND * part["variation"] for part in parts):
        return "not judged", "the outputs hardly depend on the input"
    if not last["equal"]:
        return "not judged", "a statistic over a cut axis that isn't a norm layer's"
    return "passed", ""


def _excused(part: dict[str, Any], row: Row, tool: str) -> bool:
    """Whether nothing can be said although outputs differ; one rule for both tools, by the operators of the model."""
    ours = row.get("pared", {})
    if not part.get("shapes") or not part.get("finite") or part is ours.get("exact"):
        return False
    reasons = ours.get("exact", {}).get("not_exact")
    return reasons is None or any(not any(norm in why for norm in JUDGED) for why in reasons)


def _seconds(found: dict[str, Any], tool: str) -> float | None:
    part = found.get("norms", found.get("exact", {})) if tool == "pared" else found
    return part.get("seconds") if "failure" not in found else None


EXPERIMENT = Coverage()
