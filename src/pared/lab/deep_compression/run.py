"""Prune in rounds, share values, code: the LeNets as whole files, beside a dense network trained as long."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from pared.codec import pack
from pared.codec.tensors import Prefer
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.core.seeds import seed_everything
from pared.lab.claims import error, judged, mean, undistorted
from pared.lab.deep_compression.schedules import SCHEDULES, Schedule
from pared.lab.experiment import Progress, Row, Verdict
from pared.measure.metric import file_metric, sample_inputs
from pared.prune import Weights
from pared.quantize import Clusters
from pared.runtime import export, load
from pared.training import Task, evaluate

TIMES, MARGIN = 40, 0.3
CODINGS: dict[str, Prefer] = {"contexts": "smallest", "static": "static", "huffman": "huffman"}
STARTS = ("linear", "density", "forgy", "optimal")
FEW_BITS = (2, 3)


@dataclass(frozen=True)
class DeepCompression:
    """One row for each network, data set and seed.

    Args:
        seeds: of weights and samples.
        networks: which of `SCHEDULES`.
    """

    name: ClassVar[str] = "deep_compression"
    claim: ClassVar[str] = (
        "Pruned in rounds, clustered and coded, LeNet-300-100 and LeNet-5 are whole files 40 times smaller than their weights, at no more "
        "than 0.3 points more error than a dense network trained as long."
    )

    seeds: tuple[int, ...] = (0, 1, 2)
    networks: tuple[str, ...] = tuple(SCHEDULES)

    def __post_init__(self) -> None:
        problems = Problems("lab.deep_compression")
        for name in self.networks:
            problems.check(name in SCHEDULES, "networks", f"of {', '.join(SCHEDULES)}", name)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """A network, a data set and a seed."""
        return tuple(f"{name} seed {seed}" for name in self.networks for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Errors in percent, and bytes of whole files."""
        for key in self.keys():
            if key not in done:
                network, _, seed = key.rpartition(" seed ")
                yield {"key": key, "network": network, "seed": int(seed), **_measure(network, int(seed))}

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Size and error of every network on means over seeds, and what is the same for all."""
        claims: dict[str, bool] = {}
        lines: list[tuple[str, ...]] = [
            (
                "mean of seeds", "test error, %: dense", "trained as long", "this file", "bytes", "times smaller", "without contexts",
                "Huffman", "dense, packed", "weights left, %", "bits",
            )
        ]  # fmt: skip
        for network in dict.fromkeys(row["network"] for row in rows):
            own = [row for row in rows if row["network"] == network]
            dense = min(mean(own, "dense"), mean(own, "long"))
            size, more = mean(own, "contexts"), round(mean(own, "error") - dense, 2)
            times = mean(own, "original") / size
            claims[f"{network}: {times:.1f} times smaller at {more:+.2f} points against the better dense network"] = (
                times >= TIMES and more <= MARGIN
            )
            figures = [f"{mean(own, name):.2f}" for name in ("dense", "long", "error")]
            sizes = [f"{mean(own, name):,.0f}" for name in ("static", "huffman", "dense_packed")]
            bits = ", ".join(dict.fromkeys(row["bits"] for row in own))
            lines.append((network, *figures, f"{size:,.0f}", f"{times:.1f}", *sizes, f"{mean(own, 'left'):.1f}", bits))
        coded = all(row["contexts"] <= row["static"] < row["huffman"] for row in rows)
        claims["contexts are at most as large as static codes, these smaller than Huffman's, in every row"] = coded
        claims["every file decodes to the very outputs of the network that was packed"] = all(row["same"] for row in rows)
        for bits in FEW_BITS:
            linear, forgy = (round(sum(row[f"{start}_{bits}"] for row in rows) / len(rows), 2) for start in ("linear", "forgy"))
            claims[f"{bits} bits from linear centroids ({linear} %) no worse than from Forgy's ({forgy} %), not tuned"] = linear <= forgy
        return judged(claims, tuple(lines))


def _measure(network: str, seed: int) -> Row:
    schedule, task = SCHEDULES[network], undistorted(network.split()[1], seed)
    seed_everything(seed)
    dense = schedule.build()
    task.tune(dense, dataclasses.replace(schedule.plan, epochs=schedule.epochs))
    long = copy.deepcopy(dense)
    for _ in range(schedule.rounds + len(schedule.keep) - 1):
        task.tune(long, schedule.plan)
    task.tune(long, schedule.tune)
    row: Row = {"dense": error(dense, task), "long": error(long, task), "long_valid": _valid(long, task)}
    taught = dataclasses.replace(task, teacher=min((dense, long), key=lambda model: _valid(model, task)))
    with tempfile.TemporaryDirectory() as folder:
        row["original"] = 4 * sum(parameter.numel() for parameter in dense.parameters())
        row["dense_packed"] = _sizes(long, task, Path(folder) / "dense", "static")["static"]
        pruned = _pruned(dense, schedule, taught)
        tried = [
            _Tried(number, each, " / ".join(dict.fromkeys(map(str, bits))), Clusters(bits=bits[0], convolution_bits=bits[1])(each, task))
            for number, each in enumerate(pruned)
            for bits in schedule.bits
        ]
        # chosen on validation, before the shared values are tuned: the least error among files that are small enough
        sizes = [_sizes(one.model, task, Path(folder) / "tried", "contexts")["contexts"] for one in tried]
        errors = [_valid(one.model, task) for one in tried]
        row["tried"] = [[one.number, one.bits, size, value] for one, size, value in zip(tried, sizes, errors, strict=True)]
        small = [at for at, size in enumerate(sizes) if size * TIMES <= row["original"]] or [int(np.argmin(sizes))]
        best = tried[min(small, key=errors.__getitem__)]
        row |= {"keep": dict(schedule.keep[best.number]), "bits": best.bits, "untuned": error(best.model, task)}
        row["pruned"] = error(best.pruned, task)
        row["left"] = round(100 * _weights(bake(copy.deepcopy(best.pruned)), left=True) / _weights(dense), 2)
        result = copy.deepcopy(best.model)
        taught.tune(result, schedule.taught(schedule.tune))
        row |= _sizes(result, task, Path(folder) / "result", *CODINGS)
        row["valid"] = _valid(result, task)
        row["error"] = round(100 * (1 - file_metric(Path(folder) / "result.contexts.pared", task, "test")), 2)
        row["same"] = _same(Path(folder) / "result", task)
    for bits in FEW_BITS:
        for start in STARTS:
            row[f"{start}_{bits}"] = error(Clusters(bits=bits, convolution_bits=bits, start=start)(best.pruned, task), task)
    return row


@dataclass(frozen=True)
class _Tried:
    number: int
    pruned: nn.Module
    bits: str
    model: nn.Module


def _pruned(dense: nn.Module, schedule: Schedule, task: Task) -> list[nn.Module]:
    """Networks that are pruned more and more, each from the one before."""
    found: list[nn.Module] = []
    for keep in schedule.keep:
        rounds = 1 if found else schedule.rounds
        found.append(Weights(keep=keep, rounds=rounds, tune=schedule.taught(schedule.plan))(found[-1] if found else dense, task))
    return found


def _sizes(model: nn.Module, task: Task, path: Path, *codings: str) -> dict[str, int]:
    """Bytes of whole files, program and all, by the way in which they are coded."""
    baked = bake(copy.deepcopy(model))
    file = export(baked, task.example_inputs(), path.with_suffix(".onnx"), task.normalize)
    sizes: dict[str, int] = {}
    for name in codings:
        target = path.with_suffix(f".{name}.pared")
        pack(file, target, CODINGS[name])
        sizes[name] = target.stat().st_size
    return sizes


def _same(path: Path, task: Task) -> bool:
    """Whether all packed files answer as the ONNX file that they were made from, to the bit."""
    files = [path.with_suffix(".onnx"), *(path.with_suffix(f".{name}.pared") for name in CODINGS)]
    engines = [load(file) for file in files]
    samples = [sample[0].numpy() for sample in sample_inputs(task, "test", 100)]
    wanted, *found = [np.concatenate([engine.run(sample)[0] for sample in samples]) for engine in engines]
    return all(np.array_equal(wanted, each) for each in found)


def _valid(model: nn.Module, task: Task) -> float:
    return round(100 * (1 - evaluate(model, task, "valid")), 2)


def _weights(model: nn.Module, *, left: bool = False) -> int:
    return sum(int(weight.count_nonzero()) if left else weight.numel() for weight in model.parameters() if weight.dim() > 1)


EXPERIMENT = DeepCompression()
