"""What a neuron costs, by hand; and a ranking that buys importance by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared.graph import count
from pared.graph.analysis import Analysis, analyse
from pared.graph.capture import capture
from pared.graph.classes import CutClass
from pared.prune import Magnitude
from pared.prune.allocation import Scores, class_keys
from pared.prune.chooser import Chooser
from pared.prune.neuron_costs import class_costs, neuron_costs
from pared.training import Task


def classes_of(model: nn.Module, x: Tensor) -> tuple[Analysis, dict[str, CutClass]]:
    analysis = analyse(capture(model.eval(), x))
    return analysis, dict(zip(class_keys(analysis.classes), analysis.classes, strict=True))


class Residual(nn.Module):
    """Two convolutions whose outputs are added, and a depthwise one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.depthwise = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.last = nn.Linear(4 * 25, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.last(self.depthwise(y + self.b(y)).flatten(1))


def test_a_tied_channel_costs_its_part_of_every_layer() -> None:
    analysis, classes = classes_of(Residual(), torch.zeros(2, 2, 5, 5))
    (tied,) = classes.values()
    macs = neuron_costs(analysis, "macs")[list(tied.neurons)]
    # per sample: a 25*4*18, b 25*4*4 (both axes are the class), depthwise 25*4*9, last 100*3 (25 entries of the axis each)
    expected = 2 * (25 * 4 * 18 / 4 + 2 * 25 * 4 * 4 / 4 + 25 * 4 * 9 / 4 + 100 * 3 / 4)
    np.testing.assert_allclose(macs, np.full(4, expected))
    parameters = neuron_costs(analysis, "parameters")[list(tied.neurons)]
    np.testing.assert_allclose(parameters, np.full(4, (18 + 1) + (2 * 16 / 4 + 1) + (9 + 1) + 25 * 3))


@pytest.mark.parametrize("unit", ["macs", "parameters"])
def test_costs_are_the_slope_of_the_true_count(unit: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 60, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60 * 16, 5))
    x = torch.zeros(1, 3, 8, 8)
    analysis, classes = classes_of(model, x)
    costs = neuron_costs(analysis, unit)  # type: ignore[arg-type]
    for key, found in classes.items():
        small = Chooser({key: 1 - 1 / len(found.neurons)}, Magnitude()).cut(model, x).model
        before, after = count(model, x), count(small, x)
        lost = before.macs - after.macs if unit == "macs" else before.params - after.params
        batch = 2 if unit == "macs" else 1  # captured with a batch of two
        assert costs[found.neurons[0]] / batch == pytest.approx(lost)
        assert class_costs(found, costs) == pytest.approx(lost * len(found.neurons) * batch)


def test_a_shared_weight_is_paid_for_once_in_parameters_and_twice_in_macs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.same(self.same(self.first(x)).relu()).relu())

    analysis, classes = classes_of(Twice(), torch.zeros(2, 3))
    (found,) = classes.values()
    root = found.neurons[0]
    assert neuron_costs(analysis, "parameters")[root] == 3 + 2 * 16 / 4 + 2
    assert neuron_costs(analysis, "macs")[root] == 2 * (3 + 2 * 2 * 16 / 4 + 2)


class Equal:
    """All neurons are worth the same, on one scale."""

    normalize = "none"

    def __call__(self, analysis: Analysis, task: Task | None) -> Scores:
        return np.ones(len(analysis.root))


def test_of_equal_neurons_the_dear_ones_go_first() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    x = torch.zeros(1, 1, 26, 26)
    analysis, _ = classes_of(model, x)
    free = Chooser(0.75, Equal(), scope="global").counts(analysis)
    paid = Chooser(0.75, Equal(), scope="global", per="macs").counts(analysis)
    assert free == {"0": 8, "3": 4}  # ties: the earlier class stays
    assert paid == {"0": 4, "3": 8}


def test_scores_of_one_layer_only_become_shares_of_its_importance() -> None:
    """Two classes of equal total cost and the same distribution keep the same share, whatever their widths and sizes of weights."""
    first, second = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(6, 8, bias=False))
    with torch.no_grad():
        first.weight.copy_(torch.arange(1, 9)[:, None].expand(8, 6) / 8)
        second.weight.copy_(100 * torch.arange(1, 7)[:, None].expand(6, 8) / 6)
    analysis, classes = classes_of(model, torch.zeros(1, 6))
    costs = neuron_costs(analysis, "macs")
    assert class_costs(classes["0"], costs) == class_costs(classes["2"], costs)
    assert Chooser(0.5, Magnitude(), scope="global", per="macs").counts(analysis) == {"0": 4, "2": 3}
