"""Batch norm's statistics after a cut, against numpy, and what recalibration leaves alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.core.errors import DataError, ModelError, SettingsError
from pared.graph.capture import capture
from pared.graph.cutting import cut_model
from pared.graph.rewritten import Rewritten
from pared.prune import Magnitude
from pared.prune.chooser import Chooser
from pared.prune.observe import fitting
from pared.prune.repair import Moments, recalibrate
from pared.training import Task


class Net(nn.Module):
    """Two norms one after the other, and one in a branch beside the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 8, 3, padding=1)
        self.n = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3)
        self.m = nn.BatchNorm2d(6, affine=False)
        self.side = nn.Conv2d(1, 6, 3)
        self.s = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.n(self.a(x)).relu_()
        return self.head(self.drop(self.m(self.b(inner)).relu() + self.s(self.side(x))).mean((2, 3)))


class Literal(Net):
    """Its code names a width, so a cut gives the rewritten graph."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.n(self.a(x)).relu_()
        if inner.shape[1] != 8:
            raise ValueError("eight channels, no other number")
        return self.head(self.m(self.b(inner)).relu().mean((2, 3)))


def task(count: int = 20, size: int = 8, **settings: object) -> Task:
    x = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(3)) * 2 + 1
    batches = list(zip(x.split(size), torch.zeros(count, dtype=torch.long).split(size), strict=True))
    return Task(batches, batches, batches, **settings)  # type: ignore[arg-type]


def inputs(given: Task, samples: int = 10**9) -> Tensor:
    return torch.cat([x for x, _ in given.train])[:samples]


def check(norm: nn.Module, read: Tensor) -> None:
    values = np.moveaxis(read.detach().numpy().astype(np.float64), 1, 0).reshape(read.shape[1], -1)
    np.testing.assert_allclose(norm.running_mean.numpy(), values.mean(1), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    np.testing.assert_allclose(norm.running_var.numpy(), values.var(1), rtol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("samples", [1000, 13])
def test_every_norm_states_what_it_reads(samples: int) -> None:
    model, data = Net(), task()
    recalibrate(model, data, samples)
    model.eval()
    x = inputs(data, samples)
    check(model.n, model.a(x))
    check(model.s, model.side(x))
    check(model.m, model.b(model.n(model.a(x)).relu()))  # with the first norm as it is now


def test_everything_else_stays() -> None:
    model = Net().train()
    model.m.eval()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    recalibrate(model, task())
    assert torch.equal(state, torch.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == {
        name: module.training for name, module in before.named_modules()
    }
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {f"{norm}.running_{kind}" for norm in "nms" for kind in ("mean", "var")}
    once = copy.deepcopy(model.state_dict())
    recalibrate(model, task())
    assert all(torch.allclose(value, once[name]) for name, value in model.state_dict().items())


def test_normalised_and_not_augmented() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    def refuse(x: Tensor, generator: torch.Generator) -> Tensor:
        raise AssertionError("augmented")

    data = task(normalize=Double(), augment=refuse)
    model = nn.Sequential(nn.BatchNorm2d(1))
    recalibrate(model, data)
    check(model[0], 2 * inputs(data))


def test_the_rewritten_graph_of_a_cut() -> None:
    data = task()
    small = Chooser(0.5, Magnitude()).cut(Literal().train(), data.example_inputs()).model
    assert isinstance(small, Rewritten)
    recalibrate(small, data)
    assert small.training
    x, parts = inputs(data), dict(small.named_modules())
    weights = small.state_dict()
    first = nn.functional.conv2d(x, weights["a.weight"], weights["a.bias"], padding=1)
    assert first.shape[1] == 4
    check(parts["n"], first)
    normed = nn.functional.batch_norm(first, parts["n"].running_mean, parts["n"].running_var, weights["n.weight"], weights["n.bias"])  # type: ignore[arg-type]
    check(parts["m"], nn.functional.conv2d(normed.relu(), weights["b.weight"], weights["b.bias"]))


def test_a_norm_over_vectors_and_one_without_statistics() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.BatchNorm1d(36, track_running_stats=False))
    data = task()
    recalibrate(model, data)
    check(model[1], inputs(data).flatten(1))


def test_a_norm_used_twice_gets_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x)

    model, data = Twice(), task()
    recalibrate(model, data)
    check(model.norm, torch.cat([inputs(data), 3 * inputs(data)]))


def test_a_buffer_that_the_forward_writes_to_stays() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(x) + 0 * self.calls

    model = Counting()
    before = float(model.calls)
    recalibrate(model, task())
    assert float(model.calls) - before <= 1  # checking that the model runs is one call; the passes aren't


def test_batches_for_a_graph_of_one_batch_size() -> None:
    captured = dataclasses.replace(capture(Net(), torch.zeros(8, 1, 6, 6)), dynamic=False)
    batches = fitting(captured, [(torch.zeros(5, 1, 6, 6),), (torch.ones(12, 1, 6, 6),)])
    assert [len(batch[0]) for batch in batches] == [8, 8]
    assert float(batches[0][0].sum()) == 3 * 36
    with pytest.raises(DataError, match="takes batches of 8 samples only, and there are 5"):
        fitting(captured, [(torch.zeros(5, 1, 6, 6),)])


def test_a_graph_of_one_batch_size_is_given_such_batches() -> None:
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(36)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.reshape(8, 36))

    given = task(count=20, size=8)  # the last batch has 4
    model = Reshaped()
    recalibrate(model, given)
    check(model.norm, inputs(given, 16).reshape(16, 36))


def test_moments_don_t_lose_digits_far_from_zero() -> None:
    values = torch.randn(3, 2, 50, dtype=torch.float64) + 1e3
    found = Moments.of(values[:1]).joined(Moments.of(values[1:]))
    flat = values.transpose(0, 1).reshape(2, -1).numpy()
    np.testing.assert_allclose(found.mean.numpy(), flat.mean(1), rtol=1e-7)
    np.testing.assert_allclose(found.variance.numpy(), flat.var(1), rtol=1e-3)
    assert found.count == 150


@pytest.mark.parametrize("samples", [1, 0, 2.5, True])
def test_bad_samples(samples: object) -> None:
    with pytest.raises(SettingsError, match=r"prune\.recalibrate: samples"):
        recalibrate(Net(), task(), samples)  # type: ignore[arg-type]


def test_values_that_are_not_finite() -> None:
    model = Net()
    model.b.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match="m: reads values that aren't finite"):
        recalibrate(model, task())


def test_no_samples() -> None:
    class Nothing:
        def __iter__(self) -> Iterator[object]:
            yield from [(torch.zeros(0, 1, 6, 6), torch.zeros(0))]

        def __len__(self) -> int:
            return 1

    given = task()
    with pytest.raises(DataError, match="the train split has no samples: batch norm"):
        recalibrate(Net(), Task(Nothing(), given.valid, given.test))


def test_without_norms_nothing_happens() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 2))
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, task())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_uncut_result_is_one_too() -> None:
    data = task()
    same = cut_model(Net(), data.example_inputs(), lambda analysis: [])
    recalibrate(same.model, data)
    check(same.model.n, same.model.a(inputs(data)))  # type: ignore[operator]
