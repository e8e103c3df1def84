"""What does a teacher cost? Steps of `Teach` against plain steps and against a loop written by hand, timed in turns.

    python benchmarks/distillation.py [--rounds 15] [--steps 20] [--threads 1] [--cpu] [--out benchmarks/results]

Four epochs take turns, so that whatever else the machine does meets all of them alike:

    plain     the student's step on labels, pared's loop without a teacher
    by hand   student's step and teacher's forward, the loss of soft targets, as anyone would write them
    anew      the same by `Teach`, with answers computed for each batch
    kept      the same by `Teach`, with the answers of earlier epochs

Reported are the medians over rounds of two ratios: kept ÷ plain, to be at most 1.1, and anew ÷ (plain + the teacher's forward alone), to
be at most 1.05. Run it on an idle machine; where there is none, --cpu takes processor time instead of the clock's.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pared.architecture.nets import lenet5, resnet20
from pared.core.files import write_atomic
from pared.distill import Teach
from pared.training import Machine, Task, Train
from pared.training.answers import Teacher
from pared.training.fit import default_objective
from pared.training.teaching import taught_by

TEMPERATURE, WEIGHT = 4.0, 0.9
Pair = tuple[nn.Module, nn.Module, tuple[int, ...]]
Step = Callable[[tuple[torch.Tensor, torch.Tensor]], None]


def stepping(model: nn.Module, loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    """An optimizer's step on a batch, the same around every loss."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        optimizer.zero_grad()
        loss(model, *batch).backward()
        optimizer.step()

    return step


def steps_of(student: nn.Module, teacher: nn.Module, task: Task) -> dict[str, Step]:
    """The steps that take turns."""
    plan = Train(epochs=10**6)
    asked = Teacher(teacher, task)
    labels = default_objective(task, Train())
    objectives = {
        "anew": taught_by(teacher, task, TEMPERATURE, WEIGHT),
        "kept": taught_by(teacher, task, TEMPERATURE, WEIGHT, train=plan),
    }

    def by_hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answer = asked.network(x)
        logits = model(x)
        soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), F.softmax(answer / TEMPERATURE, 1), reduction="batchmean")
        return (1 - WEIGHT) * F.cross_entropy(logits, y) + WEIGHT * TEMPERATURE**2 * soft

    def ask(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        with torch.no_grad():
            asked.network(batch[0])

    found = {
        "plain": stepping(student, lambda model, x, y: labels(model, (x,), y)),
        "teacher alone": ask,
        "by hand": stepping(student, by_hand),
    }
    return found | {name: stepping(student, lambda model, x, y, said=said: said(model, (x,), y)) for name, said in objectives.items()}


def compare(pair: Pair, rounds: int, count: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Time one pair of networks."""
    student, teacher, shape = pair
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(128, *shape, generator=generator), torch.randint(0, 10, (128,), generator=generator)) for _ in range(count)]
    task = Task(batches, batches, batches, machine=Machine(accelerator="cpu"))
    steps = steps_of(student, teacher, task)
    for step in steps.values():  # the first epoch warms up, and is the one in which answers are kept
        for batch in batches:
            step(batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]
        for name in names:
            begin = clock()
            for batch in batches:
                steps[name](batch)
            seconds[name].append((clock() - begin) / count)
    sums = [plain + alone for plain, alone in zip(seconds["plain"], seconds["teacher alone"], strict=True)]
    return {
        "milliseconds": {name: round(1e3 * statistics.median(times), 3) for name, times in seconds.items()},
        "kept_to_plain": ratio(seconds["kept"], seconds["plain"]),
        "anew_to_plain_and_teacher": ratio(seconds["anew"], sums),
        "anew_to_by_hand": ratio(seconds["anew"], seconds["by hand"]),
        "by_hand_to_plain_and_teacher": ratio(seconds["by hand"], sums),
    }


def ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """The ratios of single rounds, in which both met the same neighbours."""
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    return {"median": round(statistics.median(ratios), 4), "least": round(min(ratios), 4), "greatest": round(max(ratios), 4)}


def whole_training(rounds: int) -> dict[str, float]:
    """Whole trainings by `Teach` and by `Train`, with loading, hashing, checks and evaluation: the ratio of their times."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(128, 1, 28, 28, generator=generator), torch.randint(0, 10, (128,), generator=generator)) for _ in range(10)]
    task = Task(batches, batches[:1], batches[:1], machine=Machine(accelerator="cpu"), teacher=lenet5())
    taught, plain = [], []
    for _ in range(rounds):
        for method, times in ((Teach(train=Train(epochs=6)), taught), (Train(epochs=6), plain)):
            seen: list[float] = []
            work = dataclasses.replace(task, report=lambda event, seen=seen: seen.append(event.get("seconds", 0.0)))
            method(lenet5(), work)
            times.append(sum(sorted(second for second in seen if second)[:-1]))  # without the slowest epoch, the first
    return ratio(taught, plain)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.cpu else time.perf_counter
    pairs: dict[str, Pair] = {
        "lenet5 by lenet5": (lenet5(), lenet5(), (1, 28, 28)),
        "resnet20 by resnet20": (resnet20(), resnet20(), (3, 32, 32)),
    }
    result: dict[str, Any] = {name: compare(pair, options.rounds, options.steps, clock) for name, pair in pairs.items()}
    result["whole trainings of lenet5, kept to plain"] = whole_training(max(1, options.rounds // 3))
    result |= {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "clock": clock.__name__,
    }
    write_atomic(options.out / "distillation.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
