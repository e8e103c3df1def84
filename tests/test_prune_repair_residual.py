"""Least squares where a layer's outputs are added to a shortcut, and where a batch norm stands behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pared.graph.analysis import Analysis
from pared.graph.capture import capture
from pared.graph.cutting import Cut, cut_model
from pared.prune import Magnitude
from pared.prune.chooser import Chooser
from pared.prune.consumers import consumers
from pared.prune.least_squares import reconstruct
from pared.training import Task

EXACT = 1e-9


def task_of(x: Tensor) -> Task:
    batches = [(part, torch.zeros(len(part))) for part in x.split(16)]
    return Task(batches, batches, batches)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def cut_last(model: nn.Module, x: Tensor, *layers: str) -> Cut:
    """Remove the last output of each layer."""

    def choose(analysis: Analysis) -> list[int]:
        found = {producer.parameter.rpartition(".")[0]: producer for producer in analysis.producers}
        return [int(analysis.root[found[layer].atoms][-1]) for layer in layers]

    return cut_model(model, x, choose)


class Residual(nn.Module):
    """A block without a nonlinearity; `tail` stands between its last layer and the sum."""

    def __init__(self, width: int, hidden: int, *tail: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.tail, self.shortcut = nn.Sequential(*tail), shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.tail(self.last(self.first(x)))


def norm(width: int) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(width)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -0.5, 1.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    layer.running_mean.copy_(torch.tensor([1.0, 0.0, -1.0]))  # type: ignore[union-attr]
    layer.running_var.copy_(torch.tensor([0.5, 4.0, 1.0]))  # type: ignore[union-attr]
    return layer


@pytest.mark.parametrize("tail", [(), (norm,), (norm, lambda width: nn.Dropout(0.5))], ids=["plain", "norm", "norm and dropout"])
def test_a_branch_makes_up_for_what_its_shortcut_lost(tail: tuple[Callable[[int], nn.Module], ...]) -> None:
    """The first block loses a direction for good; the second has inputs to spare and gives it back, so the end is exact."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Residual(3, 3), Residual(3, 4, *(make(3) for make in tail)), nn.Linear(3, 2)), torch.randn(64, 3)
    small = cut_last(model, x, "0.first", "1.first")
    assert (outputs(small.model, x) - outputs(model, x)).abs().max() > 1e-2
    report = reconstruct(small, model, task_of(x), damping=EXACT)
    assert [layer.layer for layer in report] == ["0.last", "1.last"]
    assert report[0].after > 1e-3  # type: ignore[operator]
    assert report[1].after < 1e-8  # type: ignore[operator]
    fresh = torch.randn(64, 3)
    torch.testing.assert_close(outputs(small.model, fresh), outputs(model, fresh), atol=1e-3, rtol=1e-3)


def test_errors_are_those_of_the_sum() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Residual(3, 3), Residual(3, 3, norm(3))), torch.randn(64, 3)
    small = cut_last(model, x, "0.first", "1.first")
    report = reconstruct(small, model, task_of(x))
    last = float((outputs(small.model, x) - outputs(model, x)).double().square().mean())
    assert last == pytest.approx(report[-1].after, rel=1e-3)
    assert report[-1].after < report[-1].before  # type: ignore[operator]


def test_an_output_that_a_norm_silences_keeps_its_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Residual(3, 4, norm(3))), torch.randn(64, 3)
    with torch.no_grad():
        model[0].tail[0].weight[1] = 0  # type: ignore[index,union-attr,operator]
    small = cut_last(model, x, "0.first")
    before = copy.deepcopy(small.model.state_dict())
    reconstruct(small, model, task_of(x))
    after = small.model.state_dict()
    changed = [not torch.equal(after["0.last.weight"][row], before["0.last.weight"][row]) for row in range(3)]
    assert changed == [True, False, True]


def test_where_the_sum_is_taken_and_where_it_isn_t() -> None:
    x = torch.randn(8, 3)
    plain, projected = nn.Sequential(Residual(3, 4)), nn.Sequential(Residual(3, 4, shortcut=nn.Linear(3, 3)))
    scaled = nn.Sequential(Residual(3, 4, nn.Tanh()))
    for model, taken in ((plain, True), (projected, False), (scaled, False)):
        small = cut_last(model, x, "0.first")
        (found,) = consumers(capture(model, x), capture(small.model, x), small.kept)
        assert (found.total is not found.node) == taken
        assert (found.twin_total is not found.twin) == taken


def conv_and_norm() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight[-1] = 0  # the last channel is the constant 2
        model[0].bias[-1] = 2
    return model.eval()


def test_a_running_mean_takes_the_part_of_a_missing_bias() -> None:
    model, x = conv_and_norm(), torch.randn(32, 3, 4, 4)
    small = cut_last(model, x, "0")
    weight = small.model[1].weight.detach().clone()  # type: ignore[index,union-attr,operator]
    (layer,) = reconstruct(small, model, task_of(x), damping=EXACT)
    assert layer.after < 1e-8  # type: ignore[operator]
    torch.testing.assert_close(small.model[1].weight, weight, atol=1e-4, rtol=1e-4)  # type: ignore[index]
    missing = 2 * model[1].weight[:, -1].flatten()  # type: ignore[index]
    torch.testing.assert_close(small.model[2].running_mean, (model[2].running_mean - missing).detach(), atol=1e-4, rtol=1e-4)  # type: ignore
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x), atol=1e-4, rtol=1e-4)
    assert torch.equal(model[2].running_mean, torch.zeros(3))  # type: ignore[arg-type]


class TwoReaders(nn.Module):
    """One norm behind two layers: its mean belongs to neither."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.norm(self.left(x)) - self.norm(self.right(x))


def test_a_shared_norm_keeps_its_mean() -> None:
    model, x = TwoReaders().eval(), torch.randn(32, 3)
    small = Chooser(0.5, Magnitude()).cut(model, x)
    report = reconstruct(small, model, task_of(x))
    assert [layer.layer for layer in report] == ["left", "right"]
    assert torch.equal(small.model.norm.running_mean, torch.zeros(3))  # type: ignore[union-attr,arg-type]
