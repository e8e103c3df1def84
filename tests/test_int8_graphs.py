"""Int8 on all sorts of graphs: what joins the integers, what stays float, and that nothing breaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.graph import Staged
from pared.quantize import Int8
from pared.runtime import Engine, export
from pared.training import Task
from test_int8 import operators, task_of


class Residual(nn.Module):
    """Grouped, depthwise, relu6, residual sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.grouped(x))
        y = functional.relu(self.norm(self.depthwise(x)), inplace=True)
        y += x
        return self.point(y)


class Gate(nn.Module):
    """Squeeze and excitation: a product with a broadcast sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.down, self.up, self.head = nn.Conv2d(4, 8, 3), nn.Linear(8, 4), nn.Linear(4, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.body(x))
        gate = torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3))))))
        return self.head(x * gate[:, :, None, None])


class Shuffle(nn.Module):
    """Chunk, concatenation, channel shuffle, leaky relu, average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Conv2d(4, 8, 3),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = functional.relu(self.a(x)).chunk(2, 1)
        x = torch.cat([left, functional.relu(self.b(right))], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(functional.avg_pool2d(functional.leaky_relu(self.c(x), 0.1), 2))


class Shared(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(functional.relu(self.layer(x)))


CONVOLUTIONAL = {
    "residual": (Residual(), {"QLinearConv": 3, "QLinearAdd": 1}),
    "gate": (Gate(), {"QLinearConv": 2, "QGemm": 2, "QLinearSigmoid": 1, "QLinearMul": 1, "QLinearGlobalAveragePool": 1}),
    "shuffle": (Shuffle(), {"QLinearConv": 4, "QLinearConcat": 1, "QLinearLeakyRelu": 1, "QLinearAveragePool": 1}),
    "shared": (Shared(), {"QLinearConv": 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_integers_from_end_to_end(name: str, tmp_path: Path) -> None:
    model, expected = CONVOLUTIONAL[name]
    x = torch.randn(16, 4, 12, 12)
    model.eval()
    small = Int8()(model, task_of(x))
    file = export(small, x[:2], tmp_path / "small.onnx")
    found = operators(file)
    assert {kind: found.count(kind) for kind in expected} == expected
    assert found.count("QuantizeLinear") == 1
    assert found.count("DequantizeLinear") == 1
    with torch.no_grad():
        before, after = model(x), small(x)
    assert float((before - after).norm() / before.norm()) < 0.04
    step = float(list(small.quantizers.children())[-1].scale)  # type: ignore[union-attr, operator]
    differences = np.abs(Engine(file).run(x.numpy())[0] - after.numpy()) / step
    assert differences.max() < 2.01
    assert np.mean(differences > 0.01) < 0.2


@pytest.mark.parametrize(
    ("activation", "kinds"),
    [
        (nn.ReLU6(), set()),  # part of the convolution
        (nn.Hardtanh(0.0, 2.0), set()),
        (nn.Hardtanh(-1.0, 1.0), {"Clip", "DequantizeLinear"}),  # no integer kernel, so float between two integer convolutions
        (nn.Hardswish(), {"HardSigmoid", "Mul", "DequantizeLinear"}),
    ],
)
def test_activations(activation: nn.Module, kinds: set[str], tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3)), torch.randn(16, 3, 8, 8) * 4
    small = Int8()(model, task_of(x))
    found = operators(export(small, x[:2], tmp_path / "small.onnx"))
    assert found.count("QLinearConv") == 2
    assert set(found) - {"QuantizeLinear", "QLinearConv", "Transpose"} == (kinds or {"DequantizeLinear"})
    with torch.no_grad():
        assert float((model(x) - small(x)).norm() / model(x).norm()) < 0.03


class Everything(nn.Module):
    """Two inputs of which one has three axes, layers on more than two axes, a transposed convolution, operators that stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2, groups=2)
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        words = words + self.second(functional.gelu(self.first(self.norm(words))))
        return self.up(torch.tanh(self.image(image))), words


def test_two_inputs_and_float_operators(tmp_path: Path) -> None:
    model, image, words = Everything(), torch.randn(8, 3, 6, 6), torch.randn(8, 5, 16)
    small = Int8()(model, task_of(image, words))
    assert all(small.get_buffer(f"{name}.weight").dtype == torch.int8 for name in ("image", "up", "first", "second"))
    assert small.get_parameter("norm.weight").dtype == torch.float32
    assert int(small.get_buffer("up.weight").abs().max()) == 127  # computed in float, so all 8 bits are of use
    assert small.get_buffer("up.weight_scale").shape == (2,)  # 4 outputs in 2 groups
    file = export(small, (image[:2], words[:2]), tmp_path / "small.onnx")
    found = operators(file)
    assert found.count("QGemm") == 2
    assert found.count("QLinearConv") == 1
    assert {"LayerNormalization", "Gelu", "Tanh", "ConvTranspose", "Add"} <= set(found)
    assert "QLinearAdd" not in found  # the sum goes to no int8 layer
    with torch.no_grad():
        for before, after, theirs in zip(
            model(image, words), small(image, words), Engine(file).run(image.numpy(), words.numpy()), strict=True
        ):
            assert float((before - after).norm() / before.norm()) < 0.03
            np.testing.assert_allclose(theirs, after.numpy(), atol=0.02 * float(after.abs().max()))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1)
        return self.out((scores / 4).softmax(-1) @ self.value(x))


def test_products_of_activations(tmp_path: Path) -> None:
    model, x = Attention(), torch.randn(8, 6, 16)
    small = Int8()(model, task_of(x))
    found = operators(export(small, x[:2], tmp_path / "small.onnx"))
    assert found.count("QGemm") == 4
    assert sum(found.count(kind) for kind in ("QLinearMatMul", "MatMulIntegerToFloat")) == 2
    assert "MatMul" not in found
    with torch.no_grad():
        assert float((model(x) - small(x)).norm() / model(x).norm()) < 0.03


class Transposes(nn.Module):
    """Reads one weight in two ways, and writes into a view that is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.other = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x)
        y[:, :3].add_(1.0)
        return self.tied(y) @ self.tied.weight


def test_what_is_unsafe_stays_float() -> None:
    model, x = Transposes(), torch.randn(8, 6)
    small = Int8()(model, task_of(x))
    assert small.get_parameter("tied.weight").dtype == torch.float32
    with torch.no_grad():
        assert float((model(x) - small(x)).norm() / model(x).norm()) < 0.02


def test_input_is_not_written_into() -> None:
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2)), torch.randn(8, 6)
    small = Int8()(model, task_of(x.clone()))
    with torch.no_grad():
        assert float((model(x.clone()) - small(x.clone())).norm()) < 0.1


def test_skipped_modules_stay_float() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 6), nn.Linear(6, 2)), torch.randn(8, 6)
    small = Int8(skip=("0", "2"))(model, task_of(x))
    kinds = {name: small.state_dict()[f"{name}.weight"].dtype for name in ("0.0", "1", "2")}
    assert kinds == {"0.0": torch.float32, "1": torch.int8, "2": torch.float32}
    assert torch.equal(small.get_parameter("0.0.weight"), model[0][0].weight)  # type: ignore[index]


def test_int8_of_int8_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(8, 6)
    once = Int8()(model, task_of(x))
    twice = Int8()(once, task_of(x))
    torch.testing.assert_close(twice(x), once(x))


def relative_error(model: nn.Module, method: str, calibration: Tensor, x: Tensor) -> float:
    small = Int8(method=method, calibration=len(calibration))(model, task_of(calibration))  # type: ignore[arg-type]
    with torch.no_grad():
        return float((model(x) - small(x)).norm() / model(x).norm())


def test_planted_outlier_wrecks_minmax_and_not_percentile() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(4096, 16)
    wild = x.clone()
    wild[0, 0] = 300.0
    assert relative_error(model, "minmax", wild, x[1:]) > 0.15 > 4 * relative_error(model, "percentile", wild, x[1:])


def test_least_squares_gives_up_an_outlier() -> None:
    model, x = nn.Sequential(nn.Linear(32, 4)), torch.randn(8192, 32)
    x[0, 0] = 20.0
    narrow, wide = (Int8(method=method, calibration=8192)(model, task_of(x)) for method in ("mse", "minmax"))  # type: ignore[arg-type]
    assert narrow.get_buffer("quantizers.input_1.scale") < 0.9 * wide.get_buffer("quantizers.input_1.scale")


def test_scaled_channels_need_a_scale_each() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False)), torch.randn(16, 8, 6, 6)
    with torch.no_grad():
        model[0].weight *= torch.logspace(-4, 1, 8).reshape(8, 1, 1, 1)
    small = Int8()(model, task_of(x))
    integers, scale = small.get_buffer("0.weight"), small.get_buffer("0.weight_scale")
    restored = integers * scale.reshape(8, 1, 1, 1)
    errors = ((restored - model[0].weight).flatten(1).norm(dim=1) / model[0].weight.flatten(1).norm(dim=1)).detach()
    assert float(errors.max()) < 0.02


def test_dead_channel_with_a_bias(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), torch.randn(8, 2, 6, 6)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] = 1e-30  # bias / (input scale * weight scale) wouldn't fit in 32 bits
        model[3].weight[0] = 1e-30
        model[0].bias.fill_(0.7)
        model[3].bias.fill_(-0.5)
    small = Int8()(model, task_of(x))
    file = export(small, x, tmp_path / "small.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(Engine(file).run(x.numpy())[0], model(x).numpy(), atol=0.03)


class Exits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())]
        )
        self.heads = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)) for _ in range(2)])
        self.register_buffer("thresholds", torch.tensor([0.9]))

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            logits.append(head(x))
        return logits


def test_staged_networks_are_done_part_by_part() -> None:
    model, x = Exits().eval(), torch.randn(32, 1, 9, 9)
    assert isinstance(model, Staged)
    small = Int8(skip=("heads.1",))(model, task_of(x))
    assert isinstance(small, Exits)
    assert isinstance(small, Staged)
    assert small is not model
    assert small.stages[0].get_buffer("0.weight").dtype == torch.int8
    assert small.heads[0].get_buffer("2.weight").dtype == torch.int8
    assert small.heads[1][2].weight.dtype == torch.float32  # type: ignore[index]
    with torch.no_grad():
        for before, after in zip(model(x), small(x), strict=True):
            assert 0 < float((before - after).norm() / before.norm()) < 0.04


def test_zero_padding_is_part_of_the_convolution_behind_it(tmp_path: Path) -> None:
    """Networks that come from TensorFlow pad one side more than the other, which PyTorch's convolutions can't."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.ZeroPad2d((0, 1, 1, 2)), nn.Conv2d(8, 8, 3, 2, padding=1, groups=8), nn.ReLU()]
    network, x = nn.Sequential(*layers, nn.ConstantPad2d(1, 0.5), nn.Conv2d(8, 4, 1)).eval(), torch.randn(4, 3, 9, 9)
    batches = [(x, torch.zeros(4, dtype=torch.long))]
    small = Int8()(network, Task(batches, batches, batches))
    file = export(small, x, tmp_path / "pad.onnx")
    nodes = onnx.load(file).graph.node
    assert [node.op_type for node in nodes].count("Pad") == 1  # that with another value than 0 stays
    pads = [list(attribute.ints) for node in nodes if node.op_type == "Conv" for attribute in node.attribute if attribute.name == "pads"]
    assert pads == [[2, 1, 3, 2]]  # above, left, below, right
    with torch.no_grad():
        np.testing.assert_allclose(Engine(file).run(x.numpy())[0], small(x).numpy(), atol=1e-6)
