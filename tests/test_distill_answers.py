"""Answers that are kept: by the samples' hashes, in memory and in files, and when they aren't."""

from __future__ import annotations

import copy
import os
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

from pared.data import Batches
from pared.distill import Ensemble, Teach
from pared.training import Journal, Machine, Task, Train
from pared.training.answers import KeptAnswers, Teacher, sample_keys, signature

CPU = torch.device("cpu")


class Counted(nn.Module):
    calls = 0

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        return self.inner(x)


def student() -> nn.Module:
    torch.manual_seed(7)
    return nn.Linear(4, 3)


def data(count: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def task(train: Any = None, **settings: Any) -> Task:
    x, y = data()
    train = Batches(x, y, 8, shuffle=True) if train is None else train
    return Task(train, [(x, y)], [(x, y)], machine=Machine(accelerator="cpu"), teacher=settings.pop("teacher", Counted()), **settings)


def calls(work: Task, method: Any = None) -> int:
    Counted.calls = 0
    torch.manual_seed(0)
    (method or Teach(epochs=4))(student(), work)
    return Counted.calls


# --- hashes ---


def test_keys_are_those_of_numpy() -> None:
    x = torch.randn(3, 2, 2)
    words = x.reshape(3, -1).numpy().view(np.int32).astype(np.int64)

    def stirred(begin: int, count: int) -> np.ndarray:
        v = np.arange(begin + 1, begin + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (v ^ (v >> np.uint64(31))).astype(np.int64)

    found = np.array(sample_keys((x,)), dtype=np.int64)
    sums = np.stack([(words * stirred(0, 4)).sum(1), (words * stirred(4, 4)).sum(1)], 1)
    assert (np.diff(found - sums, axis=0) == 0).all()  # up to a constant of the shape


def test_keys_tell_samples_apart_and_nothing_else() -> None:
    x = torch.randn(6, 3, 5, 5)
    keys = sample_keys((x,))
    assert len(set(keys)) == 6
    assert sample_keys((x[[4, 1]],)) == [keys[4], keys[1]]
    assert sample_keys((x.to(memory_format=torch.channels_last),)) == keys
    one = x.clone()
    one[2, 1, 3, 3] = -one[2, 1, 3, 3]  # a single bit
    assert [a == b for a, b in zip(sample_keys((one,)), keys, strict=True)] == [True, True, False, True, True, True]
    swapped = x.clone()
    swapped[0, 0, 0, :2] = x[0, 0, 0, [1, 0]]
    assert sample_keys((swapped,))[0] != keys[0]
    assert sample_keys((x.reshape(6, 3, 25),))[0] != keys[0]
    assert sample_keys((x, x))[0] != sample_keys((x,))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_keys_of_all_types(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (64, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = {tuple(row) for row in x.tolist()}
    assert len(set(sample_keys((x,)))) == len(rows)


def test_keys_of_few_bits_don_t_meet() -> None:
    """Black and white pictures: all differences lie in the uppermost bits of words."""
    x = torch.randint(0, 2, (2000, 1, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    assert len(set(sample_keys((x,)))) == len({tuple(row) for row in x.flatten(1).tolist()})


# --- when answers are kept ---


def test_shuffled_batches_are_answered_once() -> None:
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True)
    assert calls(task()) == 7
    assert calls(task(loader)) == 7


def test_kept_answers_change_nothing() -> None:
    kept = Teach(epochs=4)(student(), task())
    anew = Teach(epochs=4)(student(), task(augment=lambda inputs, generator: inputs))
    assert torch.allclose(kept.weight, anew.weight, atol=1e-6)  # type: ignore[arg-type,call-overload]


def test_what_changes_is_answered_anew() -> None:
    class Noisy:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            for _ in range(2):
                yield torch.randn(8, 4), torch.zeros(8, dtype=torch.long)

    class Endless(Noisy):
        def __len__(self) -> int:
            raise TypeError

    assert calls(task(augment=lambda inputs, generator: inputs)) == 28
    assert calls(task(augment=lambda inputs, generator: inputs), Teach(train=Train(epochs=4, augment=False))) == 7
    assert calls(task(), Teach(epochs=1)) == 7
    assert calls(task(Noisy())) == 8
    assert calls(task(Endless())) == 8
    noisy = Teacher(Counted(), task(Noisy()), train=Train(epochs=9))
    for number in range(5):
        noisy((torch.randn(8, 4),))
        assert (noisy.kept is None) is (number >= 3)  # a data set that augments by itself is noticed


@pytest.mark.parametrize("method", [Train(epochs=4, teach=0.5), Teach(epochs=4)])
def test_every_plan_with_a_teacher_keeps_answers(method: Any) -> None:
    assert calls(task(), method) == 7


def test_large_answers_aren_t_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.training.answers._LARGEST", 100)
    assert calls(task()) == 28


def test_answers_of_several_tensors_come_back_in_order() -> None:
    kept = KeptAnswers(3, CPU)
    keys = sample_keys((torch.arange(6.0)[:, None],))
    answer = {"a": torch.arange(6.0), "b": (torch.arange(12.0).reshape(6, 2),)}
    assert kept.get(keys) is None
    kept.add(keys[:4], {"a": answer["a"][:4], "b": (answer["b"][0][:4],)})  # type: ignore[index]
    kept.add(keys[2:], {"a": answer["a"][2:], "b": (answer["b"][0][2:],)})  # type: ignore[index]
    found = kept.get([keys[5], keys[0], keys[3]])
    assert found["a"].tolist() == [5, 0, 3]
    assert found["b"][0].tolist() == [[10, 11], [0, 1], [6, 7]]
    kept.add(keys, torch.tensor(3.0))  # one number for all samples can't be told apart
    assert not kept.close_batch()


# --- files ---


def test_the_next_training_reads_the_file(tmp_path: Path) -> None:
    assert calls(task(answers=tmp_path)) == 7
    assert calls(task(answers=str(tmp_path))) == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert calls(task(answers=tmp_path, teacher=Counted(1))) == 7  # another teacher
    assert len(list(tmp_path.iterdir())) == 2
    normalized = nn.BatchNorm1d(4, affine=False).eval()
    assert calls(task(answers=tmp_path, normalize=copy.deepcopy(normalized))) == 7  # 1e-5 is enough
    x, y = data(seed=5)
    assert calls(task(Batches(x, y, 8), answers=tmp_path)) == 7  # other data
    assert calls(task(answers=tmp_path)) == 0
    half = task(answers=tmp_path, train=Batches(torch.cat([x[:8], x[:8] + 1]), torch.cat([y[:8], y[:8]]), 8))
    assert calls(half) == 1


def test_the_journals_folder_is_used(tmp_path: Path) -> None:
    assert calls(task(journal=Journal(tmp_path / "step"))) == 7
    assert [path.suffix for path in (tmp_path / "step" / "answers").iterdir()] == [".pt"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_files_are_passed_over_and_replaced(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = Teach(epochs=4)(student(), task(answers=tmp_path))
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": bytes(content[:-100]), "flip": bytes(content), "empty": b"", "text": b"no answers"}[damage])
    assert calls(task(answers=tmp_path)) == 7
    assert "can't be read as a teacher's answers" in caplog.text
    assert calls(task(answers=tmp_path)) == 0
    assert torch.equal(Teach(epochs=4)(student(), task(answers=tmp_path)).weight, expected.weight)  # type: ignore[arg-type]


def test_signatures_tell_networks_apart() -> None:
    def ensemble(mean: Any = "arithmetic", temperature: float = 1.0) -> str:
        torch.manual_seed(0)
        return signature(Ensemble([nn.Linear(2, 2)], mean, temperature))

    assert ensemble() == ensemble()
    assert len({ensemble(), ensemble("logits"), ensemble(temperature=2.0), signature(nn.ReLU()), signature(nn.ReLU6())}) == 5
    assert signature(nn.ReLU(), "16") != signature(nn.ReLU(), "32")


def test_a_resumed_training_is_the_undisturbed_one_to_the_bit(tmp_path: Path) -> None:
    def train(name: str, stop_at: int = 99) -> nn.Module:
        def report(event: dict[str, Any]) -> None:
            if event["event"] == "epoch" and event["epoch"] == stop_at:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        return Teach(epochs=4)(student(), task(journal=Journal(tmp_path / name), report=report))

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop_at=3)
    assert torch.equal(train("stopped").weight, whole.weight)  # type: ignore[arg-type]


SCRIPT = """
import sys, torch
from torch import nn
from pared.training.answers import KeptAnswers, sample_keys
from pathlib import Path
x = torch.arange(40_000.0)[:, None]
keys = sample_keys((x,))
kept = KeptAnswers(10**9, torch.device("cpu"), Path(sys.argv[1]))
for end in range(400, 40_001, 400):
    kept.add(keys[end - 400:end], x[end - 400:end] * 2)
    kept._save(kept.path)
    print(end, flush=True)
"""


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.pt"
    keys = sample_keys((torch.arange(40_000.0)[:, None],))
    for wait in (3, 11):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(wait):
            process.stdout.readline()
        time.sleep(0.003 * wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        kept = KeptAnswers(1, CPU, path)
        assert len(kept.rows) >= 400 * wait
        assert kept.get([keys[7], keys[399]]).flatten().tolist() == [14, 798]
