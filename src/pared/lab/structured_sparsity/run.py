"""Let filters of a LeNet-5 die by group lasso, cut them out, and time the file that is left."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from pared import data, graph
from pared.architecture.nets import lenet5
from pared.core.problems import Problems
from pared.core.seeds import seed_everything
from pared.lab.claims import BySeed, judged, mean
from pared.lab.experiment import Row, Verdict
from pared.measure import file_metric, latency, sample_inputs
from pared.measure.deployed import deploy
from pared.prune import GroupLasso
from pared.prune.one_operator import Operator, time_operators
from pared.training import Task, Train, evaluate

MARGIN = 0.5  # points; 0.2 on MNIST, test noise on Fashion-MNIST is 2.5 times as large
BATCH = 64  # the paper's
DECAY = 5e-4  # where no penalty stands in its place
COLUMNS = {
    "dense": "dense, test error in %",
    "control": "dense, trained as long",
    "masked": "group lasso, before the cut",
    "cut": "after the cut",
    "tuned": "after the cut, tuned",
    "strength": "strength chosen",
    "conv1": "filters of conv1 left of 20",
    "conv2": "filters of conv2 left of 50",
    "zeros": "exact zeros, % of all weights",
    "params": "parameters left, %",
    "macs": "MACs left, %",
    "conv2_speedup": "conv2 alone, times faster",
    "speedup": "whole file, times faster",
}


@dataclass(frozen=True)
class Attempt:
    """What one strength led to.

    Attributes:
        strength: of the penalty.
        masked: the network as it was trained, with dead filters in it.
        cut: the same without them.
        tuned: the same, trained on without penalty.
        macs: of the last, for one sample.
        valid: its validation accuracy in percent.
    """

    strength: float
    masked: nn.Module
    cut: nn.Module
    tuned: nn.Module
    macs: int
    valid: float


@dataclass(frozen=True)
class StructuredSparsity(BySeed):
    """Group lasso over the filters and channels of a trained network, against the same training without it.

    Args:
        epochs: of the dense network.
        strengths: of the penalty, tried from the strongest, each from the dense network, until validation accuracy is at most half a
            point below that of the dense network, as the paper compares.
        train: epochs with the penalty; the paper's 10,000 steps.
        tune: epochs after the cut.
    """

    name: ClassVar[str] = "structured_sparsity"
    claim: ClassVar[str] = (
        "Group lasso brings whole filters of LeNet-5 to exact zero; cutting them out changes no answer and leaves a smaller, faster "
        "network at nearly no loss."
    )

    epochs: int = 5
    strengths: tuple[float, ...] = (1.5e-4, 2e-4)
    train: int = 12
    tune: int = 6

    def __post_init__(self) -> None:
        problems = Problems("lab.structured_sparsity")
        for name in ("epochs", "train", "tune"):
            problems.number(name, getattr(self, name), low=0, integer=True)
        problems.check(len(self.strengths) > 0, "strengths", "at least one number", self.strengths)
        for strength in self.strengths:
            problems.number("strengths", strength, low=0, high=1e6)
        problems.raise_if_any()

    def measure(self, seed: int) -> Row:
        """One seed: five test errors of deployed files, what is left of which layer, and times."""
        seed_everything(seed)
        task = data.load("fashion-mnist", seed, batch_size=BATCH)
        dense = lenet5().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # trains in 60 % of the time
        task.tune(dense, _plan(self.epochs, DECAY))
        control = copy.deepcopy(dense)
        for epochs in (self.train, self.tune):
            task.tune(control, _plan(epochs, DECAY))
        least = 100 * evaluate(dense, task, "valid") - MARGIN
        attempts: list[Attempt] = []
        for strength in sorted(self.strengths, reverse=True):
            attempts.append(self.attempt(dense, task, strength))
            if attempts[-1].valid >= least:
                break
        best = choose(attempts, least)
        ladder = [{"strength": each.strength, "valid": each.valid, "macs": each.macs} for each in attempts]
        return {"strength": best.strength, "least_valid": round(least, 2), "ladder": ladder, **compare(dense, control, best, task)}

    def attempt(self, dense: nn.Module, task: Task, strength: float) -> Attempt:
        """Train a copy of `dense` with the penalty, cut it, and train what is left without."""
        plan = _plan(self.train, 0.0)
        lasso = GroupLasso(strength=strength, groups=("filters", "channels"), by_size=True, train=plan, leave=("fc1",))
        masked = copy.deepcopy(dense)
        lasso.shrink(masked, task)
        cut = lasso.cut(masked, task)
        tuned = _plan(self.tune, DECAY)(cut, task)
        macs = graph.count(tuned, task.example_inputs()).macs
        return Attempt(strength, masked, cut, tuned, macs, round(100 * evaluate(tuned, task, "valid"), 2))

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Six claims, on means over seeds; that of the cut on every seed."""
        names = ("dense", "control", "tuned", "conv2", "conv2_speedup", "speedup")
        dense, control, tuned, filters, second, whole = (mean(rows, name) for name in names)
        most = max(row["change"] for row in rows)
        claims = {
            f"after the cut and tuning ({tuned:.2f} %) at most {MARGIN} points worse than the dense network at the start "
            f"({dense:.2f} %)": tuned <= dense + MARGIN,
            f"and than one trained as long ({control:.2f} %)": tuned <= control + MARGIN,
            f"conv2 keeps at most 40 % of its 50 filters ({filters:.1f})": filters <= 20,
            f"the cut changes answers by less than 1e-5 of the largest ({most:.1e})": most <= 1e-5,
            f"conv2 alone is at least twice as fast ({second:.2f} times)": second >= 2,
            f"the deployed file is at least twice as fast ({whole:.2f} times)": whole >= 2,
        }
        head = ("", "mean", *(f"seed {row['seed']}" for row in rows))
        lines = [(title, f"{_average(rows, name):g}", *(f"{row[name]:g}" for row in rows)) for name, title in COLUMNS.items()]
        return judged(claims, (head, *lines))


def _average(rows: Sequence[Row], name: str) -> float:
    """The mean over seeds to two digits behind the point, strengths to two that aren't zero."""
    return float(f"{statistics.fmean(row[name] for row in rows):.2g}") if name == "strength" else mean(rows, name)


def choose(attempts: Sequence[Attempt], least: float) -> Attempt:
    """The fewest MACs at a validation accuracy of at least `least` percent; the most accurate where none has that."""
    good = [attempt for attempt in attempts if attempt.valid >= least]
    return min(good, key=lambda attempt: attempt.macs) if good else max(attempts, key=lambda attempt: attempt.valid)


def compare(dense: nn.Module, control: nn.Module, best: Attempt, task: Task) -> Row:
    """Errors, sizes and times of deployed files, and how far the cut network's answers are from the masked one's."""
    networks = {"dense": dense, "control": control, "masked": best.masked, "cut": best.cut, "tuned": best.tuned}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: deploy(network, task, Path(folder) / f"{name}.onnx") for name, network in networks.items()}
        row: Row = {name: round(100 * (1 - file_metric(file, task, "test")), 2) for name, file in files.items()}
        pair = {name: files[name] for name in ("dense", "tuned")}
        times = {name: round(found.median, 5) for name, found in latency(pair, sample_inputs(task, "test", 1)).items()}
        row["bytes"] = {name: file.stat().st_size for name, file in pair.items()}
    row["milliseconds"], row["speedup"] = times, round(times["dense"] / times["tuned"], 2)
    row |= {name: len(best.tuned.get_parameter(f"{name}.weight")) for name in ("conv1", "conv2")}
    before, masked, after = (graph.count(network, task.example_inputs()) for network in (dense, best.masked, best.tuned))
    row["zeros"] = round(100 * (1 - masked.nonzero / masked.params), 2)
    row["params"], row["macs"] = (round(100 * getattr(after, name) / getattr(before, name), 2) for name in ("params", "macs"))
    whole, small = time_operators([second_convolution(network) for network in (dense, best.tuned)])
    row["conv2_milliseconds"] = {"dense": round(whole, 5), "tuned": round(small, 5)}
    row["conv2_speedup"] = round(whole / max(small, 1e-4), 2)  # no clock tells less than a tenth of a microsecond
    row["change"] = change(best.masked, best.cut, task)
    return row


def change(first: nn.Module, second: nn.Module, task: Task) -> float:
    """The largest difference of two networks' outputs on the test split, as a share of the largest output."""
    difference, largest = 0.0, 0.0
    with torch.no_grad():
        for inputs, _ in task.test:
            outputs, others = (network.eval()(*task.prepare(inputs)) for network in (first, second))
            difference = max(difference, float((outputs - others).abs().max()))
            largest = max(largest, float(outputs.abs().max()))
    return difference / largest


def second_convolution(network: nn.Module) -> Operator:
    """conv2 of a LeNet-5 by its sizes; it sees 12 x 12 pixels."""
    outputs, inputs = network.get_parameter("conv2.weight").shape[:2]
    return Operator("convolution", outputs, inputs, (12, 12), (5, 5), (1, 1), (0, 0), (1, 1))


def _plan(epochs: int, weight_decay: float) -> Train:
    """The paper's, without augmentation: SGD at 0.01, a tenth of it after half the steps, a hundredth after three quarters."""
    return Train(epochs, optimizer="sgd", learning_rate=0.01, schedule="step", weight_decay=weight_decay, augment=False)


EXPERIMENT = StructuredSparsity()
