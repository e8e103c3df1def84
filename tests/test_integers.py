"""Weights and activations of few bits, and int8 with training: where quantizers stand, how they learn, what the file computes."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.core.errors import ModelError, SettingsError
from pared.graph import capture
from pared.quantize import Int8, Integers
from pared.quantize.activation_grid import LIMIT_DECAY, LimitGrid, StepGrid
from pared.quantize.affine import Affine
from pared.quantize.grid import Grid, fake_quantize
from pared.quantize.integers import filled
from pared.quantize.placement import place_quantizers
from pared.quantize.points import place_points
from pared.quantize.preparation import prepare
from pared.runtime import Engine, export, saturates
from pared.training import Task, Train

STILL = Train(epochs=1, learning_rate=1e-12)
"""Training that changes nothing."""


class Residual(nn.Module):
    """A block whose sum is read by a layer and by the next sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(count, 8, 3, padding=1) for count in (2, 8, 8))
        self.norm, self.out = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(x + self.norm(self.one(x)))
        return self.out(functional.relu(x + self.two(x)).mean((2, 3)))


def chain() -> nn.Sequential:
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 3))


def task_of(x: Tensor) -> Task:
    targets = torch.arange(len(x)) % 3
    batches = list(zip(x.split(8), targets.split(8), strict=True))
    return Task(batches, batches, batches)


def pictures(seed: int = 0) -> Tensor:
    return torch.rand(16, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


# --- saturation ---


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="asks Linux for the flags of an x86 processor"
)
def test_products_saturate_where_the_processor_lacks_vnni() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert saturates() == ("avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"})


def test_a_layer_that_saturates_eight_bits_is_deployed_as_simulated(tmp_path: Path) -> None:
    """On paper: 64 inputs of 1 (the integer 255) times weights of 1 are 64; pairs cut off at 32,767 would give 64 · 32,767 / 64,770."""
    layer, x = nn.Linear(64, 16, bias=False), torch.ones(4, 64)
    nn.init.ones_(layer.weight)
    network = nn.Sequential(layer)
    small = Int8()(network, task_of(x))
    with torch.no_grad():
        torch.testing.assert_close(small(x), torch.full((4, 16), 64.0))
    np.testing.assert_allclose(Engine(export(small, x, tmp_path / "auto.onnx")).run(x.numpy())[0], 64.0, rtol=1e-6)
    assert int(small.get_buffer("0.weight").max()) == (63 if saturates() else 127)
    if saturates():
        with pytest.raises(ModelError, match="differs from the model's"):
            export(Int8(reduce_range=False)(network, task_of(x)), x, tmp_path / "full.onnx")


# --- int8 with training ---


def test_training_that_changes_nothing_gives_what_rounding_gives() -> None:
    torch.manual_seed(0)
    network, x = Residual().eval(), pictures()
    plain, tuned = Int8()(network, task_of(x)), Int8(tune=STILL)(network, task_of(x))
    assert list(plain.state_dict()) == list(tuned.state_dict())
    for (name, one), other in zip(plain.state_dict().items(), tuned.state_dict().values(), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1.0 if one.dtype == torch.int32 else 1e-6, msg=name)


def test_training_lowers_the_loss_and_leaves_int8_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Residual().eval(), pictures()
    task = task_of(x)
    plain, tuned = Int8()(network, task), Int8(tune=Train(epochs=10, learning_rate=0.01))(network, task)
    targets = torch.arange(16) % 3
    with torch.no_grad():
        assert functional.cross_entropy(tuned(x), targets) < functional.cross_entropy(plain(x), targets)
        expected = tuned(x).numpy()
    assert not any("aware" in name for name, _ in tuned.named_modules())
    found = Engine(export(tuned, x[:2], tmp_path / "tuned.onnx")).run(x.numpy())[0]
    step = float(tuned.get_buffer("quantizers.mean.scale")) * float(tuned.get_buffer("out.weight").abs().sum(1).max())
    assert np.abs(found - expected).max() <= step * float(tuned.get_buffer("out.weight_scale").max())


# --- where quantizers stand ---


def test_what_a_sum_reads_keeps_eight_bits_and_the_layer_beside_it_rounds_once_more() -> None:
    graph = prepare(capture(Residual().eval(), pictures()[:2]).module)
    placement = place_quantizers(graph)
    layers = list(placement.layers)
    wanted = dict(zip(layers, (8, 3, 3, 8), strict=True))
    points = place_points(placement, wanted)
    assert set(points.bits.values()) == {8}
    assert points.narrowed == {layers[1]: 3, layers[2]: 3}


def test_what_only_layers_read_has_their_bits_also_through_a_pool() -> None:
    graph = prepare(capture(chain().eval(), pictures()[:2]).module)
    placement = place_quantizers(graph)
    layers = list(placement.layers)
    points = place_points(placement, dict(zip(layers, (8, 2, 3, 4), strict=True)))
    assert points.narrowed == {}
    assert list(points.bits.values()) == [8, 2, 3, 4]


# --- how quantizers learn ---


@pytest.mark.parametrize(("zero_point", "levels"), [(0, 4), (3, 16)])
def test_the_gradient_of_a_step_is_the_papers(zero_point: int, levels: int) -> None:
    """LSQ, equations 3 and 5: Σ g · (k - v/s inside, the bound outside) / sqrt(N · Q), seen by plain SGD on the step."""
    generator = np.random.default_rng(0)
    x, g, start = generator.normal(size=(5, 7)), generator.normal(size=(5, 7)), 0.3
    grid = StepGrid(Affine(start, zero_point, levels))
    (grid(torch.tensor(x, dtype=torch.float32)) * torch.tensor(g)).sum().backward()
    low, high = -zero_point, levels - 1 - zero_point
    inside = (x / start > low) & (x / start < high)
    slope = np.where(inside, np.rint(x / start) - x / start, np.clip(x / start, low, high))
    expected = (g * slope).sum() / np.sqrt(7 * max(high, -low))
    assert grid.ratio.grad is not None
    np.testing.assert_allclose(float(grid.ratio.grad) * start, expected, rtol=1e-4)  # the parameter is the step as a part of its start


@pytest.mark.parametrize("step", [0.1, 0.2, 0.8, 1.2])
def test_the_gradient_of_a_step_has_the_sign_of_the_smoothed_loss(step: float) -> None:
    """The loss jumps with the step, value by value; over many values, and over a wide difference, it is smooth."""
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))

    def loss(at: Tensor) -> Tensor:
        return (fake_quantize(values, Grid(at, torch.tensor(-3.0), torch.tensor(3.0))) - values).square().mean()

    learned = torch.tensor(step, requires_grad=True)
    loss(learned).backward()
    difference = loss(torch.tensor(1.1 * step)) - loss(torch.tensor(0.9 * step))
    assert learned.grad is not None
    assert bool(torch.sign(learned.grad) == torch.sign(difference))


def test_the_gradient_of_a_limit_counts_what_reaches_it_and_decays() -> None:
    grid = LimitGrid(Affine(1.0, 0, 4), 2, learned=True)  # a limit of 3
    grid(torch.tensor([-1.0, 1.2, 3.0, 5.0])).sum().backward()
    assert grid.ratio.grad is not None
    assert float(grid.ratio.grad) == pytest.approx(3 * (2 + 2 * LIMIT_DECAY * 3))


def test_a_fixed_limit_stays_and_a_grid_reads_back_what_it_is() -> None:
    assert not LimitGrid(Affine(0.5, 0, 16), 4, learned=False).ratio.requires_grad
    assert LimitGrid(Affine(0.5, 0, 16), 4, learned=True).affine() == Affine(0.5, 0, 16)
    assert StepGrid(Affine(0.25, 7, 16)).affine() == Affine(0.25, 7, 16)


# --- what comes out ---


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa"])
@pytest.mark.parametrize("make", [chain, Residual])
def test_file_computes_few_bits_as_the_network_does(make: type[nn.Module], method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = pictures()
    small = Integers(weights=2, activations=2, method=method, tune="1ep")(make().eval(), task_of(x))  # type: ignore[arg-type]
    for name in ("3.weight", "6.weight") if make is chain else ("one.weight", "two.weight"):
        integers = small.get_buffer(name).unique().tolist()
        unit = math.gcd(*integers)
        allowed = (-2, -1, 0, 1) if method == "lsq" else (-3, -1, 1, 3)
        assert {integer // unit for integer in integers} <= set(allowed)
    file = export(small, x[:2], tmp_path / "few.onnx")
    graph = onnx.load(file).graph
    bounds = {onnx.numpy_helper.to_array(tensor).item() for tensor in graph.initializer if tensor.name in _bounds(graph)}
    assert bounds == {3}
    with torch.no_grad():
        expected = small(x).numpy()
    found = Engine(file).run(x.numpy())[0]
    close = np.abs(found - expected).max(1) <= 1e-5 * np.abs(expected).max()
    assert close.mean() >= 0.9  # a value in the middle between two steps may go either way


def _bounds(graph: onnx.GraphProto) -> set[str]:
    return {node.input[1] for node in graph.node if node.op_type == "Min"}


def test_layers_run_on_integers_with_two_bits(tmp_path: Path) -> None:
    """The bound lies between integers, so the engine still makes one integer operator of what stands around a layer."""
    import onnxruntime

    from pared.runtime.engine import session_options

    x = pictures()
    file = export(Integers(weights=2, activations=2)(chain().eval(), task_of(x)), x[:2], tmp_path / "few.onnx")
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert (found.count("QLinearConv"), found.count("QGemm")) == (2, 2)
    assert not {"Conv", "FusedConv", "Gemm", "DequantizeLinear"} & set(found)


def test_first_and_last_layer_keep_more_bits() -> None:
    torch.manual_seed(0)
    x = pictures()
    small = Integers(weights=2, activations=2, first_and_last=6, reduce_range=True)(chain().eval(), task_of(x))
    counts = [len(small.get_buffer(f"{path}.weight").unique()) for path in (0, 3, 6, 8)]
    assert [count > 4 for count in counts] == [True, False, False, True]


def test_small_integers_fill_the_byte() -> None:
    """Biases are rounded to multiples of the scales of weights and inputs: with 1 and a scale of 16 they would be sixteen times coarser."""
    integers, scales = filled(torch.tensor([[1, -3, 0]], dtype=torch.int8), torch.tensor([16.0]), 63)
    assert integers.tolist() == [[16, -48, 0]]
    assert scales.tolist() == [1.0]
    unchanged, _ = filled(torch.tensor([[63]], dtype=torch.int8), torch.tensor([1.0]), 63)
    assert unchanged.tolist() == [[63]]


class Twice(nn.Module):
    """A layer that is called twice, on values of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x)))))))


def test_a_shared_bias_is_rounded_for_each_layer_that_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 6)
    small = Integers(weights=2, activations=3)(Twice().eval(), task_of(x))
    with torch.no_grad():
        expected = small(x).numpy()
    found = Engine(export(small, x[:2], tmp_path / "twice.onnx")).run(x.numpy())[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert len([name for name, _ in small.named_parameters() if name.startswith("again.bias")]) == 2


def test_errors_are_clear() -> None:
    with pytest.raises(SettingsError) as caught:
        Integers(weights=1, activations=9, method="lsq2", first_and_last=1, calibration=0, reduce_range=2, skip=(3,))  # type: ignore[arg-type]
    fields = ("weights", "activations", "method", "tune", "first_and_last", "calibration", "reduce_range", "skip")
    assert [problem.split(" must")[0] for problem in caught.value.problems] == [f"quantize.integers: {field}" for field in fields]
    with pytest.raises(SettingsError, match="tune must be a training, such as 5ep, with the method pact"):
        Integers(method="pact")
    with pytest.raises(SettingsError, match=r"skip must be modules of Linear. Got 'head'"):
        Integers(skip=("head",))(nn.Linear(2, 2), task_of(torch.randn(8, 2)))
