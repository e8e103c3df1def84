"""The first samples of the training split."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pared.core.errors import DataError
from pared.data import Batches
from pared.training import Machine, Task, first_inputs, first_samples
from pared.training.samples import slice_batch

INPUTS, LABELS = torch.arange(10.0)[:, None], torch.arange(10)


def task_of(train: Any, **settings: Any) -> Task:
    return Task(train, train, train, machine=Machine("cpu"), **settings)


def batches(size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(INPUTS.split(size), LABELS.split(size), strict=True))


def labels_of(task: Task, samples: int, shared: bool = False) -> list[list[int]]:
    return [targets.tolist() for _, targets in first_samples(task, samples, shared=shared)]


def test_they_are_the_first_and_as_many_as_asked_for() -> None:
    assert labels_of(task_of(batches()), 6) == [[0, 1, 2, 3], [4, 5]]
    assert labels_of(task_of(batches()), 4) == [[0, 1, 2, 3]]
    assert labels_of(task_of(batches()), 100) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [inputs[0].flatten().tolist() for inputs in first_inputs(task_of(batches()), 6, "")] == [[0, 1, 2, 3], [4, 5]]


def test_no_batch_is_read_that_is_not_needed() -> None:
    class Counting:
        read = 0

        def __iter__(self) -> Iterator[Any]:
            for batch in batches():
                self.read += 1
                yield batch

    split = Counting()
    task = task_of(split)
    split.read = 0
    assert len(first_inputs(task, 8, "")) == 2
    assert split.read == 2


def test_empty_batches_are_passed_over_and_an_empty_split_is_refused() -> None:
    empty = (torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))
    assert labels_of(task_of([empty, *batches(), empty]), 5) == [[0, 1, 2, 3], [4]]
    with pytest.raises(DataError, match=r"the train split has no samples: they are wanted\."):
        first_inputs(task_of([empty]), 5, "they are wanted")


def test_they_are_prepared_and_not_augmented() -> None:
    def augment(inputs: Any, generator: torch.Generator) -> Any:
        raise AssertionError

    class Double(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return first * 2, second

    pairs = [((inputs, inputs + 1), labels) for inputs, labels in batches()]
    ((inputs, targets),) = first_samples(task_of(pairs, normalize=Double(), augment=augment), 2)
    assert [part.flatten().tolist() for part in inputs] == [[0, 2], [1, 2]]
    assert targets.tolist() == [0, 1]


def test_targets_may_be_anything() -> None:
    Pair = namedtuple("Pair", ["place", "scale"])
    kinds = [None, "all", Pair(LABELS, torch.tensor(3.0)), {"class": [LABELS], "name": "x"}]
    found = [next(targets for _, targets in first_samples(task_of([(INPUTS, kind)]), 2)) for kind in kinds]
    assert found[:2] == [None, "all"]
    assert found[2].place.tolist() == [0, 1]
    assert found[2].scale.item() == 3
    assert found[3]["class"][0].tolist() == [0, 1]
    assert found[3]["name"] == "x"


def test_what_has_no_batch_axis_is_not_cut() -> None:
    inputs, targets = slice_batch(((INPUTS, torch.zeros(3)), torch.tensor(1.0)), slice(0, 4))
    assert [len(part) for part in inputs] == [4, 3]
    assert targets.item() == 1


def test_a_shuffled_loader_gives_the_same_and_leaves_the_random_state() -> None:
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=3, shuffle=True)
    task = task_of(loader)
    torch.rand(1)
    state = torch.get_rng_state()
    once = labels_of(task, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert labels_of(task, 7) == once
    assert sorted(itertools.chain(*once)) != list(range(7))


def test_random_numbers_between_batches_are_those_of_the_caller() -> None:
    task = task_of(DataLoader(TensorDataset(INPUTS, LABELS), batch_size=2, shuffle=True))
    torch.manual_seed(5)
    wanted = [torch.rand(1).item() for _ in range(3)]
    torch.manual_seed(5)
    assert [torch.rand(1).item() for _ in first_samples(task, 6)] == wanted


def test_data_that_shuffles_by_epoch_gives_the_order_of_its_epoch() -> None:
    split = Batches(INPUTS, LABELS, 5, shuffle=True)
    task = task_of(split)
    first = labels_of(task, 5)
    split.set_epoch(3)
    assert labels_of(task, 5) != first
    split.set_epoch(0)
    assert labels_of(task, 5) == first


def test_processes_share_the_batches_or_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(batches(2))
    found = []
    for rank in range(2):
        monkeypatch.setattr("pared.training.samples.rank_and_world", lambda rank=rank: (rank, 2))
        assert labels_of(task, 3) == [[0, 1], [2]]
        found.append(labels_of(task, 6, shared=True))
    assert found == [[[0, 1], [4]], [[2, 3], [6]]]


def test_a_split_without_pairs_is_refused() -> None:
    with pytest.raises(DataError, match=r"the train split must give pairs \(inputs, targets\)"):
        list(first_samples(task_of([(INPUTS, INPUTS, INPUTS)]), 3))
