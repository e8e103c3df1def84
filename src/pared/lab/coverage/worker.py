"""One network, one tool, in a process of its own.

What is known so far is written to FILE after every stage, so that a crash or a limit leaves what came before it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pared.core.errors import ParedError
from pared.core.files import write_atomic
from pared.core.seeds import seed_everything
from pared.graph.analysis import Analysis
from pared.graph.cutting import Cut, cut_model
from pared.lab.coverage import oracle
from pared.lab.coverage.distinct import make_distinct, settle_batch_norms
from pared.lab.coverage.models import Subject, build
from pared.lab.coverage.peer import cut_by_torch_pruning
from pared.prune.chooser import Chooser
from pared.prune.importance import Magnitude
from pared.runtime import export

MEMORY = 14 * 2**30


@dataclass
class Watched:
    """A choice that remembers the first analysis it was shown."""

    choose: Chooser
    analysis: Analysis | None = field(default=None)

    def __call__(self, analysis: Analysis) -> list[int]:
        """The roots to remove."""
        self.analysis = self.analysis or analysis
        return self.choose(analysis)

    def not_exact(self) -> list[str]:
        """What makes classes inexact, by operator."""
        assert self.analysis is not None
        reasons = [why for found in self.analysis.classes for why in self.analysis.inexact(np.array(found.neurons))]
        return sorted({_plain(why.split(" in ")[0].rstrip(")")) for why in reasons})

    def share(self, exact: bool) -> float:
        """The share of all neurons, but those of the output, that can be cut."""
        assert self.analysis is not None
        cuttable = {
            neuron
            for found in self.analysis.classes
            if not exact or not self.analysis.inexact(np.array(found.neurons))
            for neuron in found.neurons
        }
        inside = total = 0
        for producer in self.analysis.producers:
            roots = self.analysis.root[producer.atoms].tolist()
            if any("output of the model" in why for why in self.analysis.reasons(producer.atoms)):
                continue
            total += len(roots)
            inside += sum(root in cuttable for root in roots)
        return inside / total if total else 0.0


class Record:
    """What is known, and where the work stands; saved at every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"stage": "build"}

    def stage(self, name: str) -> None:
        """Say what comes next."""
        self.content["stage"] = name
        write_atomic(self.path, json.dumps(self.content))

    def failed(self, error: BaseException) -> None:
        """Note why this is the end."""
        self.content["failure"] = f"{type(error).__name__}: {_plain(str(error))}"
        self.stage(self.content["stage"])


def macs(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiply-adds per sample, counted while the model runs."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:  # the counter follows gradients, which there are none of
        parameter.requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    for parameter in learned:
        parameter.requires_grad_(True)
    return counter.get_total_flops() // (2 * len(inputs[0]))


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in model.parameters())


def tiny() -> Subject:
    """A network to cut before the clock runs, so that no tool pays for what it imports at its first use."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10))
    return Subject(layers.eval(), (torch.randn(2, 3, 8, 8),))


def train_one_step(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward, backward and a step of SGD in training mode, on a copy.

    Raises:
        ValueError: if the loss or a parameter isn't finite, or no parameter gets a gradient.
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    loss = torch.stack([x.square().mean() for x in oracle.outputs(model, inputs)]).sum()
    if not math.isfinite(float(loss.detach())):
        raise ValueError("the loss isn't finite")
    loss.backward()
    if not any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters()):
        raise ValueError("no parameter gets a gradient")
    optimizer.step()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise ValueError("a parameter isn't finite after one step")


def check(subject: Subject, small: nn.Module) -> dict[str, Any]:
    """Hold a cut network against the reference: one batch of two samples and one of three."""
    try:
        twin = oracle.reference(subject.model, oracle.survivors(subject.model, small))
    except oracle.NotComparable as reason:
        return {"equal": False, "not_comparable": _plain(str(reason))}
    found = asdict(oracle.compare(twin, small, [subject.batch(2), subject.batch(3)]))
    return {name: _short(value) if isinstance(value, float) else value for name, value in found.items()}


def _short(value: float) -> float | None:
    """Three digits; None for what JSON has no number for."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def pared(subject: Subject, keep: float, record: Record) -> None:
    """Cut exactly; then, where a norm, a mean or a softmax kept something from being cut, once more with those."""
    warm = tiny()
    cut_model(warm.model, warm.inputs, Chooser(keep, Magnitude()))
    result = _cut("exact", subject, keep, False, record)
    reasons = record.content["exact"]["not_exact"]
    if reasons:
        result = _cut("norms", subject, keep, True, record)
    record.stage("train")
    train_one_step(result.model, subject.batch(2))
    record.content["trains"] = True
    record.stage("onnx")
    record.content["onnx"] = _exports(subject, result.model)
    record.stage("done")


def _exports(subject: Subject, small: nn.Module) -> str:
    """ "same" if the cut network's file computes the same, "not the original either" if not even that has a file.

    Raises:
        CaptureError, ModelError: if the original has a file, but the cut network has none or another one.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(small, subject.batch(2), Path(folder) / "small.onnx")
        except ParedError as error:
            with contextlib.suppress(ParedError):
                export(subject.model, subject.batch(2), Path(folder) / "original.onnx")
                raise error
            return "not the original either"
    return "same"


def _cut(mode: str, subject: Subject, keep: float, norms: bool, record: Record) -> Cut:
    record.stage(f"{mode}: cut")
    watched = Watched(Chooser(keep, Magnitude(), norms=norms))
    start = time.process_time()
    result = cut_model(subject.model, subject.inputs, watched)
    seconds = time.process_time() - start
    found = record.content[mode] = {
        "seconds": round(seconds, 2), "params": parameters(result.model), "own_class": result.own_class, "not_exact": watched.not_exact(),
        "share": round(watched.share(exact=not norms), 3), "left_alone": sorted({_plain(note) for note in result.left_alone})[:5],
    }  # fmt: skip
    record.stage(f"{mode}: compare")
    found["macs"] = macs(result.model, subject.batch(2))
    found |= check(subject, result.model)
    return result


def torch_pruning(subject: Subject, keep: float, record: Record) -> None:
    """Cut with torch-pruning and ask the same questions, but for the file."""
    cut_by_torch_pruning(tiny(), keep)
    record.stage("cut")
    model, seconds = cut_by_torch_pruning(Subject(copy.deepcopy(subject.model), subject.inputs), keep)
    record.content |= {"seconds": round(seconds, 2), "params": parameters(model)}
    record.stage("run")
    record.content["macs"] = macs(model, subject.batch(2))
    record.stage("compare")
    record.content |= check(subject, model)
    record.stage("train")
    train_one_step(model, subject.batch(2))
    record.content["trains"] = True
    record.stage("done")


def _plain(text: str) -> str:
    """The first line of a message, without folders and addresses, at most 240 characters."""
    line = text.strip().split("\n")[0]
    return re.sub(r"0x[0-9a-f]+", "0x", re.sub(r"(?<![\w.])/(?:[^\s/:\"']+/)+", "", line))[:240]


def work(tool: str, name: str, seed: int, keep: float, seconds: int, file: Path) -> None:
    """All of a process: ends it with status 0, or 1 if something failed; the limits of time and memory are the process's own."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    torch.set_num_threads(1)
    record = Record(file)
    try:
        subject = build(name, seed)
        make_distinct(subject.model, seed)
        settle_batch_norms(subject.model, subject.inputs)
        seed_everything(seed)
        shapes = [list(x.shape) for x in subject.inputs if isinstance(x, Tensor)]
        record.content |= {"inputs": shapes, "params_before": parameters(subject.model), "macs_before": macs(subject.model, subject.inputs)}
        (pared if tool == "pared" else torch_pruning)(subject, keep, record)
    except Exception as error:
        record.failed(error)
        sys.exit(1)
