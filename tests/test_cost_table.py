"""The cost table: choices from tables given by hand, and one real measurement."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.core.errors import RunError
from pared.graph.analysis import Analysis, analyse
from pared.graph.capture import capture
from pared.prune import Magnitude, Neurons, loop, targets
from pared.prune.chooser import Chooser
from pared.prune.cost_table import CostTable, Curve, NetworkTimes, Width, find_layers, grid, largest_at_the_price
from pared.prune.one_operator import Operator, operator_model, time_operators
from pared.prune.targets import Trials, reach
from pared.prune.time_cost import Latency
from pared.runtime import Engine
from pared.training import Journal, Task, Train


def in_blocks(operators: Sequence[Operator]) -> list[float]:
    """An engine that computes outputs in blocks of 8 and all else one by one."""
    return [8.0 * math.ceil(operator.outputs / 8) * operator.inputs for operator in operators]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def task(**settings: Any) -> Task:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    batches = [(part, (part[:, 0] > 0).long()) for part in x.split(16)]
    return Task(batches, batches, batches, **settings)


def analysed(model: nn.Module, *shape: int) -> Analysis:
    return analyse(capture(model.eval(), torch.zeros(2, *shape)))


# --- curves ---


def test_between_two_counts_the_upper_one_is_paid() -> None:
    curve = Curve((4, 8, 16), (1.0, 2.0, 5.0))
    assert [curve.at(width) for width in (1, 4, 5, 8, 9, 16, 99)] == [1, 1, 2, 2, 5, 5, 5]


@pytest.mark.parametrize(
    ("curve", "wanted", "chosen"),
    [
        ({4: 1.0, 8: 1.0, 12: 2.0}, 4, 8),  # up to the drop
        ({4: 1.0, 8: 1.0, 12: 1.0}, 4, 12),  # nothing drops: nothing is cut
        ({4: 1.0, 8: 1.02, 12: 1.04}, 4, 8),  # equal within the noise, but noise isn't added up
        ({4: 3.0, 8: 2.0, 12: 4.0}, 4, 8),  # a wider layer that is even faster
        ({12: 4.0}, 10, 12),
        ({}, 5, 5),
    ],
)
def test_a_class_keeps_what_costs_nothing(curve: dict[int, float], wanted: int, chosen: int) -> None:
    assert largest_at_the_price(curve, wanted) == chosen


def test_the_grid_has_about_16_points_and_the_ends() -> None:
    for size in (1, 2, 16, 17, 64, 65, 128, 500, 2048):
        points = grid(size)
        assert points[-1] == size
        assert len(points) <= 17
        assert points == sorted(set(points))


def test_operators_are_timed_once() -> None:
    timed: list[Operator] = []

    def timer(operators: Sequence[Operator]) -> list[float]:
        timed.extend(operators)
        return in_blocks(operators)

    table = CostTable(timer)
    for _ in range(2):
        NetworkTimes(analysed(mlp(), 4), table)
    assert len(timed) == len(set(timed))


# --- layers of a network ---


def test_widths_belong_to_classes_through_flatten_and_concatenation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
            self.c, self.out = nn.Conv2d(10, 5, 3, stride=2, padding=1), nn.Linear(5 * 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
            return self.out(self.c(x).relu().flatten(1))

    layers = find_layers(analysed(Net(), 1, 4, 4))
    assert [layer.operator.kind for layer in layers] == ["convolution"] * 3 + ["linear"]
    assert layers[2].inputs == Width(0, (("a", 4), ("b", 6)))
    assert layers[2].operator == Operator("convolution", 5, 10, (4, 4), (3, 3), (2, 2), (1, 1), (1, 1), 1)
    assert layers[3].inputs == Width(0, (("c", 20),))
    assert layers[3].outputs == Width(2, ())
    assert layers[2].inputs.length({"a": 0.5, "b": 0.5}) == 5


def test_a_depthwise_convolution_has_one_width() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    )
    layer = find_layers(analysed(model, 1, 6, 6))[1]
    assert layer.inputs == Width(8, ())
    assert [number for _, number in layer.outputs.shares] == [8]
    assert layer.operator.resized(3, 8) == Operator("convolution", 3, 3, (4, 4), (3, 3), (1, 1), (0, 0), (1, 1), 3)


def test_the_total_is_the_sum_over_layers() -> None:
    times = NetworkTimes(analysed(mlp(), 4), CostTable(in_blocks))
    assert times.total({}) == 32 * 4 + 16 * 32 + 8 * 16
    # 8 of 32 and 9 (so 16) of 16
    assert times.total({"0": 8, "2": 9}) == 8 * 4 + 16 * 8 + 8 * 9


def test_counts_settle_at_the_steps() -> None:
    def outputs_only(operators: Sequence[Operator]) -> list[float]:
        return [float(math.ceil(operator.outputs / 8)) for operator in operators]

    times = NetworkTimes(analysed(mlp(), 4), CostTable(outputs_only))
    assert times.settle({"0": 18, "2": 7}, {"0": 32, "2": 16}) == {"0": 24, "2": 8}
    assert times.settle({"0": 18, "2": 7}, {"0": 20, "2": 16}) == {"0": 20, "2": 8}  # a cap holds
    flat = NetworkTimes(analysed(mlp(), 4), CostTable(lambda operators: [1.0] * len(operators)))
    assert flat.settle({"0": 18, "2": 7}, {"0": 32, "2": 16}) == {"0": 32, "2": 16}


# --- the target ---


def latency(real: Any, table: CostTable, original: float) -> Latency:
    return Latency(lambda model: (original, real(model)), original, table)


def blocks_of(model: nn.Module) -> float:
    """The true time of a network in the engine of this file."""
    return sum(in_blocks([Operator("linear", layer.out_features, layer.in_features)])[0] for layer in model if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_the_target_is_reached_at_a_step(target: float) -> None:
    model = mlp().eval()
    trials = Trials(model, task().example_inputs(), Chooser(0.5, Magnitude()))
    reached = reach(trials, latency(blocks_of, CostTable(in_blocks), blocks_of(model)), target)
    assert reached.cost <= target
    assert blocks_of(reached.cut.model) / blocks_of(model) == reached.cost


def test_a_table_that_promises_too_much_is_corrected() -> None:
    model = mlp().eval()
    trials = Trials(model, task().example_inputs(), Chooser(0.5, Magnitude()))

    def real(model: nn.Module) -> float:
        return 400 + blocks_of(model)

    reached = reach(trials, latency(real, CostTable(in_blocks), real(model)), 0.6)
    assert reached.cost <= 0.6


class Fake:
    """Stands for `Interleaved`: times by the layers' sizes."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.original = blocks_of(model)

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        return self.original, blocks_of(model)

    def alone(self) -> float:
        return self.original


class NeverFaster(Fake):
    def __call__(self, model: nn.Module) -> tuple[float, float]:
        return self.original, self.original


def test_what_is_not_faster_is_not_returned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(loop, "Interleaved", NeverFaster)
    monkeypatch.setattr(loop, "CostTable", lambda: CostTable(in_blocks))
    model = mlp()
    with caplog.at_level(logging.WARNING):
        same = Neurons(keep=0.5, of="latency", tune="1ep")(model, task())
    assert same is not model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert "stays as it was" in caplog.text


def test_a_resumed_run_makes_the_same_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop, "CostTable", lambda: CostTable(in_blocks))
    monkeypatch.setattr(loop, "Interleaved", Fake)
    method = Neurons(keep=0.5, of="latency", rounds=2, tune=Train(epochs=1))
    first = method(mlp_of(0), task(journal=Journal(tmp_path)))
    monkeypatch.setattr(loop, "Interleaved", NeverFaster)  # measured again, it would be otherwise
    again = method(mlp_of(0), task(journal=Journal(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(RunError, match="another run"):
        Neurons(keep=0.4, of="latency", tune=Train(epochs=1))(mlp_of(0), task(journal=Journal(tmp_path)))


def mlp_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp()


# --- the operators ---


@pytest.mark.parametrize(
    ("operator", "layer"),
    [
        (Operator("linear", 3, 5), nn.Linear(5, 3, bias=False)),
        (Operator("linear", 3, 5, (7,)), nn.Linear(5, 3, bias=False)),
        (
            Operator("convolution", 6, 4, (5, 6), (3, 2), (2, 1), (1, 0), (1, 2), 2),
            nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, False),
        ),
        (Operator("convolution", 4, 2, (9,), (3,), (1,), (1,), (1,), 1), nn.Conv1d(2, 4, 3, padding=1, bias=False)),
        (Operator("transposed", 6, 4, (5, 5), (3, 3), (2, 2), (1, 1), (1, 1), 2), nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, bias=False)),
    ],
)
def test_the_one_operator_graph_is_that_layer(operator: Operator, layer: nn.Module, tmp_path: Path) -> None:
    model = operator_model(operator)
    onnx.checker.check_model(model, full_check=True)
    (tmp_path / "one.onnx").write_bytes(model.SerializeToString())
    weight = torch.from_numpy(onnx.numpy_helper.to_array(model.graph.initializer[0]).copy())
    layer.weight.data = weight.T if operator.kind == "linear" and operator.sizes else weight
    shape = (1, *operator.sizes, operator.inputs) if operator.kind == "linear" else (1, operator.inputs, *operator.sizes)
    x = torch.randn(shape)
    result = Engine(tmp_path / "one.onnx").run(x.numpy())[0]
    np.testing.assert_allclose(result, layer(x).detach().numpy(), atol=1e-4)
    found = find_layers(analyse(capture(layer, torch.randn(2, *shape[1:]))))
    assert [found[0].operator] == [operator]


def test_same_padding_and_functional_forms_are_understood() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding="same")

    assert find_layers(analysed(Net(), 2, 5, 5))[0].operator.padding == (1, 1)


def test_a_real_measurement_is_positive_and_grows() -> None:
    small, large = time_operators([Operator("linear", 8, 64), Operator("linear", 1024, 1024)])
    assert 0 <= small < large


def test_a_real_network_gets_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "CORRECTIONS", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))
    small = Neurons(keep=0.7, of="latency")(model, task())
    assert small[0].out_features < 512 or small[2].out_features < 512
