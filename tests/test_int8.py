"""Int8: what runs in integers, that the deployed file computes it, and how little accuracy it costs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from pared.core.errors import DataError, ModelError, SettingsError, WeightsError
from pared.core.rules import Mask, add_rule
from pared.graph import capture
from pared.quantize import Int8
from pared.runtime import Engine, export
from pared.runtime.engine import session_options
from pared.training import Task


def operators(file: Path) -> list[str]:
    """The operators that ONNX Runtime really runs, after its own fusions."""
    optimised = file.with_suffix(".optimised.onnx")
    options = session_options(1)
    options.optimized_model_filepath = str(optimised)
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(optimised).graph.node]


def task_of(*inputs: Tensor, train: list | None = None) -> Task:
    batches = [(inputs if len(inputs) > 1 else inputs[0], torch.zeros(len(inputs[0]), dtype=torch.long))]
    return Task(batches if train is None else train, batches, batches)


class LeNet(nn.Module):
    """LeNet-5 for 8 x 8 digits; one relu stands behind its pool."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 12, 5, padding=2), nn.Conv2d(12, 32, 3)
        self.f1, self.f2, self.f3 = nn.Linear(32, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.c1(x)), 2)
        x = functional.relu(functional.max_pool2d(self.c2(x), 2))
        return self.f3(functional.relu(self.f2(functional.relu(self.f1(x.flatten(1))))))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.c2, self.b2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if stride > 1 else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b2(self.c2(self.act(self.b1(self.c1(x)))))
        y += self.shortcut(x)
        return self.act(y)


class ResNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2))
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def trained(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A few seconds of training on the digits of scikit-learn; returns model, training and test data."""
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(8):
        if epoch == 6:
            optimizer.param_groups[0]["lr"] = 5e-4
        for start in range(0, 1280, 64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[start : start + 64]), y[start : start + 64]).backward()
            optimizer.step()
    return model.eval(), x[:1280], y[:1280], x[1280:], y[1280:]


@pytest.fixture(scope="module", params=["lenet", "resnet"])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    torch.manual_seed(0)
    model, x, y, test_x, test_y = trained(LeNet() if request.param == "lenet" else ResNet())
    folder = tmp_path_factory.mktemp(request.param)
    small = Int8()(model, task_of(x, train=list(zip(x.split(100), y.split(100), strict=True))))
    files = [export(net, test_x[:2], folder / f"{name}.onnx") for name, net in (("original", model), ("small", small))]
    return {
        "name": request.param,
        "model": model,
        "small": small,
        "x": test_x,
        "y": test_y,
        "original.onnx": files[0],
        "small.onnx": files[1],
    }


def test_trained_network_keeps_its_answers(deployed: dict) -> None:
    before, after = (Engine(deployed[name]).run(deployed["x"].numpy())[0] for name in ("original.onnx", "small.onnx"))
    accuracy = float((before.argmax(1) == deployed["y"].numpy()).mean())
    assert accuracy > 0.93
    assert float((before.argmax(1) == after.argmax(1)).mean()) >= 0.99
    assert abs(float((after.argmax(1) == deployed["y"].numpy()).mean()) - accuracy) <= 0.006
    assert np.linalg.norm(after - before) < 0.03 * np.linalg.norm(before)


def test_file_is_a_quarter(deployed: dict) -> None:
    parameters = sum(parameter.numel() for parameter in deployed["model"].parameters())
    assert deployed["small.onnx"].stat().st_size < 1.09 * parameters + 6000  # a byte a weight, four a bias or scale, and the program
    assert deployed["small.onnx"].stat().st_size < deployed["original.onnx"].stat().st_size / 3


def test_engine_runs_integers_from_input_to_logits(deployed: dict) -> None:
    found = operators(deployed["small.onnx"])
    assert found[0] == "QuantizeLinear"
    assert found.count("QuantizeLinear") == 1
    assert "DequantizeLinear" not in found
    floats = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Relu", "MaxPool", "GlobalAveragePool", "ReduceMean"}
    assert floats.isdisjoint(found)
    expected = {
        "lenet": {"QLinearConv": 2, "QGemm": 3, "NhwcMaxPool": 2},
        "resnet": {"QLinearConv": 6, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    }
    assert {kind: found.count(kind) for kind in expected[deployed["name"]]} == expected[deployed["name"]]


def test_file_computes_what_the_int8_module_computes(deployed: dict) -> None:
    x = deployed["x"]
    with torch.no_grad():
        ours = deployed["small"](x).numpy()
    theirs = Engine(deployed["small.onnx"]).run(x.numpy())[0]
    # a sum that lies on a tie is rounded either way, and layers add such single steps up
    assert np.abs(ours - theirs).max() <= 0.02 * np.abs(ours).max()
    assert np.median(np.abs(ours - theirs)) <= 1e-3 * np.abs(ours).max()
    assert float((ours.argmax(1) == theirs.argmax(1)).mean()) >= 0.995


def test_module_is_an_ordinary_one(deployed: dict) -> None:
    small, x = deployed["small"], deployed["x"][:3]
    assert {name for name, buffer in small.named_buffers() if buffer.dtype == torch.int8} == {
        name for name, parameter in deployed["model"].named_parameters() if parameter.dim() > 1
    }
    expected = small(x)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), capture(small, x).module):
        torch.testing.assert_close(twin(x), expected)
    fresh = copy.deepcopy(small)
    for buffer in fresh.buffers():
        buffer.zero_()
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(fresh(x), expected)


def test_gradients_reach_what_is_left_in_float(deployed: dict) -> None:
    small = copy.deepcopy(deployed["small"]).train()
    functional.cross_entropy(small(deployed["x"][:32]), deployed["y"][:32]).backward()
    parameters = dict(small.named_parameters())
    assert parameters
    assert all(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in parameters.values())


def integers_of(module: nn.Module, quantizer: str) -> tuple[np.float32, int]:
    holder = module.get_submodule(f"quantizers.{quantizer}")
    return np.float32(holder.scale), int(holder.zero_point)  # type: ignore[arg-type]


def quantize(x: np.ndarray, scale: np.float32, zero_point: int) -> np.ndarray:
    return np.clip(np.rint(x / scale) + zero_point, 0, 255).astype(np.int64)


def test_convolution_is_this_integer_arithmetic(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, stride=2))
    x = torch.randn(4, 3, 7, 7)
    small = Int8()(layer, task_of(x))
    found = Engine(export(small, x, tmp_path / "layer.onnx")).run(x.numpy())[0]
    (input_scale, input_zero), (output_scale, output_zero) = integers_of(small, "input_1"), integers_of(small, "conv2d")
    q = quantize(x.numpy(), input_scale, input_zero)
    padded = np.pad(q, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=input_zero)  # the real 0 is the zero point, not the integer 0
    state = small.state_dict()
    weight, weight_scale, bias = state["0.weight"].numpy().astype(np.int64), state["0.weight_scale"].numpy(), state["0.bias"].numpy()
    product = input_scale * weight_scale
    sums = np.zeros((4, 5, 4, 4), np.int64)
    for row in range(4):
        for column in range(4):
            window = padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3] - input_zero
            sums[:, :, row, column] = np.einsum("nchw,ochw->no", window, weight)
    sums += np.rint(bias / product).astype(np.int64)[None, :, None, None]
    factor = (product / output_scale).astype(np.float32)[None, :, None, None]
    integers = np.clip(np.rint(sums.astype(np.float32) * factor) + output_zero, 0, 255)
    np.testing.assert_array_equal(np.rint(found / output_scale) + output_zero, integers)


def test_linear_layer_is_this_integer_arithmetic(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(33, 7))
    x = torch.randn(5, 33)
    small = Int8()(layer, task_of(x))
    found = Engine(export(small, x, tmp_path / "layer.onnx")).run(x.numpy())[0]
    input_scale, input_zero = integers_of(small, "input_1")
    state = {name: value.numpy() for name, value in small.state_dict().items()}
    assert state["0.bias"].dtype == np.int32
    np.testing.assert_array_equal(state["0.bias_scale"], state["0.weight_scale"] * input_scale)
    sums = (quantize(x.numpy(), input_scale, input_zero) - input_zero) @ state["0.weight"].astype(np.int64).T + state["0.bias"]
    np.testing.assert_allclose(found, sums.astype(np.float32) * state["0.bias_scale"], rtol=1e-6)
    np.testing.assert_allclose(found, layer(x).detach().numpy(), atol=0.05)


def test_errors_are_clear() -> None:
    layer = nn.Sequential(nn.Linear(4, 2))
    task = task_of(torch.randn(8, 4))
    with pytest.raises(SettingsError) as caught:
        Int8(calibration=0, method="max", reduce_range=1, skip=(3,))  # type: ignore[arg-type]
    assert [problem.split(" must")[0] for problem in caught.value.problems] == [
        f"quantize.int8: {field}" for field in ("calibration", "method", "reduce_range", "skip")
    ]
    with pytest.raises(SettingsError, match=r"skip must name modules of Sequential. Got 'head'"):
        Int8(skip=("head",))(layer, task)
    empty = task_of(torch.randn(8, 4), train=[(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))])
    with pytest.raises(DataError, match="the train split has no samples: int8 ranges"):
        Int8()(layer, empty)
    with pytest.raises(ModelError, match="aren't finite on the calibration data"):
        Int8()(layer, task_of(torch.full((8, 4), float("inf"))))
    bad = copy.deepcopy(layer)
    nn.init.constant_(bad[0].weight, float("nan"))
    with pytest.raises(WeightsError, match=r"NaN or infinity in 0.weight"):
        Int8()(bad, task)


def test_input_model_is_untouched_and_masks_are_baked() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    keep = torch.rand(4, 6) > 0.5
    add_rule(model[0], "weight", Mask(keep))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = Int8()(model, task_of(torch.randn(16, 6)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert bool((small.get_buffer("0.weight")[~keep] == 0).all())
    assert small.get_buffer("0.weight").dtype == torch.int8


def test_calibration_takes_the_first_samples_and_repeats() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(100, 3)
    x[60:] *= 50  # never seen with 60 samples
    train = [(part, torch.zeros(len(part))) for part in x.split(25)]
    few, all_of_them = (Int8(calibration=count)(model, task_of(x, train=train)) for count in (60, 512))
    assert few.get_buffer("quantizers.input_1.scale") < all_of_them.get_buffer("quantizers.input_1.scale") / 5
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(100)), batch_size=10, shuffle=True)
    torch.manual_seed(1)
    first = Int8(calibration=30)(model, task_of(x, train=loader))  # type: ignore[arg-type]
    torch.manual_seed(2)
    second = Int8(calibration=30)(model, task_of(x, train=loader))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_reduced_range_is_seven_bits() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(16, 8)
    for reduce, limit in ((True, 63), (False, 127)):
        assert int(Int8(reduce_range=reduce)(model, task_of(x)).get_buffer("0.weight").abs().max()) == limit
