"""A killed training resumes and ends with the same weights, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pared.core.errors import RunError
from pared.core.seeds import rng_state, seed_everything
from pared.data import Batches, CropAndFlip
from pared.training import Journal, Machine, Task, Train, fit

CPU = Machine(accelerator="cpu")
PLANS = [
    Train(epochs=4, optimizer="sgd", learning_rate=0.1, warmup=0.5),
    Train(epochs=4, weight_decay=1e-3, early_stop=2),
    Train(epochs=3, optimizer="adamw", schedule="step"),
]


class Killed(Exception):
    """Raised in the middle of a training."""


def net() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 36, 3)
            )
            self.register_buffer("steps", torch.zeros(1), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                self.steps += 1
            return self.layers(images)

    return Net()


def data(kind: str) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(50, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (50,), generator=generator)
    valid = Batches(images[:10], labels[:10], 10)
    if kind == "batches":
        return Batches(images, labels, 8, shuffle=True), valid
    if kind == "loader":
        return DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True), valid
    own = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True, generator=own), valid


Outcome = tuple[nn.Module, Any, list[float]]


def run(kind: str, plan: Train, journal: Path | None, report: Any = lambda event: None, fits: int = 2) -> Outcome:
    """Two trainings one after the other, with random numbers drawn between them, as a step of a recipe does."""
    seed_everything(11)
    model = net()
    train, valid = data(kind)
    work = Task(
        train, valid, valid, augment=CropAndFlip(2), machine=CPU, journal=Journal(journal) if journal is not None else None, report=report
    )
    drawn = []
    for _ in range(fits):
        work.tune(model, plan)
        drawn += [torch.rand(()).item(), np.random.random(), random.random()]
        drawn += [next(iter(train))[0].sum().item()]
    return model, rng_state(), drawn


def same(first: Outcome, second: Outcome) -> bool:
    tensors = [[*model.state_dict().values(), model.steps] for model in (first[0], second[0])]
    equal = all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))
    random_state = torch.equal(first[1]["torch"], second[1]["torch"]) and first[1]["python"] == second[1]["python"]
    return equal and random_state and torch.equal(first[1]["numpy"][1], second[1]["numpy"][1]) and first[2] == second[2]


def killer(after: int, event: str) -> Any:
    seen = 0

    def report(message: dict[str, Any]) -> None:
        nonlocal seen
        seen += message["event"] == event
        if seen == after:
            raise Killed

    return report


@pytest.mark.parametrize("plan", PLANS, ids=["sgd", "early-stop", "adamw"])
@pytest.mark.parametrize("kind", ["batches", "loader", "own generator"])
def test_killed_anywhere_it_ends_with_the_same_bits(kind: str, plan: Train, tmp_path: Path) -> None:
    undisturbed = run(kind, plan, None)
    assert not same(undisturbed, run(kind, plan, None, fits=1))
    chance = random.Random(f"{kind} {plan}")
    for trial in range(3):
        journal = tmp_path / str(trial)
        for _ in range(3):  # killed again while resuming
            event = chance.choice(["batch", "epoch"])
            after = chance.randrange(1, 20) if event == "batch" else chance.randrange(1, 4)
            try:
                run(kind, plan, journal, killer(after, event))
            except Killed:
                continue
            break
        assert same(undisturbed, run(kind, plan, journal))


def test_a_finished_fit_is_not_done_again(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    first = run("batches", PLANS[0], tmp_path)
    second = run("batches", PLANS[0], tmp_path, events.append)
    assert same(first, second)
    assert [event["event"] for event in events] == ["resume", "resume"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == ["fit-1/checkpoint.pt", "fit-2/checkpoint.pt"]


def test_early_stopped_fit_is_finished(tmp_path: Path) -> None:
    plan = Train(epochs=30, early_stop=1)
    events: list[dict[str, Any]] = []
    first = run("batches", plan, tmp_path, events.append)
    assert sum(event["event"] == "epoch" for event in events) < 60
    again: list[dict[str, Any]] = []
    assert same(first, run("batches", plan, tmp_path, again.append))
    assert {event["event"] for event in again} == {"resume"}


def test_a_finished_checkpoint_is_smaller(tmp_path: Path) -> None:
    sizes: list[int] = []
    path = tmp_path / "fit-1" / "checkpoint.pt"
    run("batches", PLANS[2], tmp_path, lambda event: sizes.append(path.stat().st_size) if event["event"] == "epoch" else None, fits=1)
    assert len(sizes) == 3
    assert sizes[2] < sizes[0]


def test_a_fit_of_the_users_own_is_in_the_journal_when_it_is_through(tmp_path: Path) -> None:
    calls = 0

    def own(model: nn.Module, task: Task, train: Train, objective: Any = None) -> None:
        nonlocal calls
        calls += 1
        fit(model, task, train, objective)
        torch.rand(3)

    train, valid = data("batches")
    results = []
    for _ in range(2):
        seed_everything(1)
        model = net()
        work = Task(train, valid, valid, fit=own, machine=CPU, journal=Journal(tmp_path))
        work.tune(model, Train(epochs=1))
        results.append((model, rng_state(), []))
        assert not model.training
    assert calls == 1
    assert same(results[0], results[1])


def test_zero_epochs_are_numbered_too(tmp_path: Path) -> None:
    train, valid = data("batches")
    work = Task(train, valid, valid, machine=CPU, journal=Journal(tmp_path))
    model = net()
    work.tune(model, Train(epochs=0))
    work.tune(model, Train(epochs=1))
    assert [path.name for path in tmp_path.iterdir()] == ["fit-2"]


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    run("batches", PLANS[0], tmp_path, fits=1)
    with pytest.raises(RunError, match=r"fit-1/checkpoint\.pt: is the checkpoint of another run \(train\.epochs differ\)"):
        run("batches", Train(epochs=5, optimizer="sgd", learning_rate=0.1, warmup=0.5), tmp_path)
    train, valid = data("batches")
    task = Task(train, valid, valid, machine=CPU, journal=Journal(tmp_path))
    with pytest.raises(RunError, match=r"\(model differ\)"):
        task.tune(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), PLANS[0])
    fewer = Task([next(iter(train))], valid, valid, machine=CPU, journal=Journal(tmp_path))
    with pytest.raises(RunError, match="batches of an epoch differ"):
        fewer.tune(net(), PLANS[0])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "cut", "other"])
def test_damaged_checkpoints_are_refused(content: bytes | str, tmp_path: Path) -> None:
    run("batches", PLANS[0], tmp_path, fits=1)
    path = tmp_path / "fit-1" / "checkpoint.pt"
    if content == "other":
        torch.save([1, 2], path)
    else:
        path.write_bytes(path.read_bytes()[:1000] if content == "cut" else content)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"checkpoint\.pt: can't be read as a checkpoint\. Delete it"):
        run("batches", PLANS[0], tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be written"):
        run("batches", PLANS[0], tmp_path / "file")


def main(journal: str, result: str) -> None:
    """What the killed process runs: slow enough to be hit at any moment."""
    model, state, drawn = run("batches", PLANS[0], Path(journal), lambda event: time.sleep(0.01))
    torch.save({"weights": model.state_dict(), "random": state["torch"], "drawn": drawn}, result)


def test_a_process_killed_by_the_system_resumes_exactly(tmp_path: Path) -> None:
    undisturbed = run("batches", PLANS[0], None)
    command = [sys.executable, __file__, str(tmp_path / "journal"), str(tmp_path / "result.pt")]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    checkpoint = tmp_path / "journal" / "fit-1" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert checkpoint.exists()
    assert not (tmp_path / "result.pt").exists()
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    saved = torch.load(tmp_path / "result.pt", weights_only=True)
    assert all(torch.equal(value, saved["weights"][name]) for name, value in undisturbed[0].state_dict().items())
    assert torch.equal(undisturbed[1]["torch"], saved["random"])
    assert undisturbed[2] == saved["drawn"]


if __name__ == "__main__":
    main(*sys.argv[1:])
