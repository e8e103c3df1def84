"""Networks with exits as files: the same answers for any batch, and a stage that nobody needs isn't run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from pared import data
from pared.core.rules import bake
from pared.dynamic import EarlyExit, Exits
from pared.dynamic.thresholds import NEVER
from pared.prune import Weights
from pared.quantize import Int8
from pared.runtime import Engine, export
from pared.training import Task, Train, evaluate


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


class Net(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(3)])
        self.out = nn.Linear(channels, 10)

    def forward(self, x):
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.middle, self.out = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, y):
        return self.out(torch.relu(self.middle(torch.relu(self.left(x) + self.right(y)))))


def random_network(thresholds: list[float]) -> EarlyExit:
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()),
    ]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)) for width in (4, 4, 8)]
    with torch.no_grad():
        for head in heads:
            head[-1].weight.mul_(8)
    return EarlyExit(stages, heads, torch.tensor(thresholds)).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(random_network([0.5, 0.6]), torch.zeros(2, 1, 8, 8), tmp_path_factory.mktemp("exits") / "net.onnx")


def with_thresholds(path: Path, folder: Path, thresholds: list[float]) -> Path:
    """The file with other thresholds: the numbers that its comparisons read, from the outermost If inwards."""
    model = onnx.load(path)
    left, graphs, constants = list(thresholds), [model.graph], {}
    while graphs:
        graph = graphs.pop(0)
        constants |= {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "GreaterOrEqual":
                constants[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(np.float32(left.pop(0)), node.input[1]))
            graphs += [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    assert not left
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def answers(path: Path, x: Tensor) -> np.ndarray:
    return Engine(path).run(x.numpy())[0]


def test_the_file_answers_as_the_network_for_any_batch(tmp_path, exported):
    network, x = random_network([0.5, 0.5]), torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        confidence = [logits.softmax(1).amax(1).sort().values for logits in network.all_logits(x)]
        network.thresholds.copy_(torch.stack([confidence[0][3:5].mean(), confidence[1][3:5].mean()]))
        assert len(set(network.leave(x)[1].tolist())) == 3
        path = with_thresholds(exported, tmp_path, network.thresholds.tolist())
        onnx.checker.check_model(onnx.load(path), full_check=True)
        for batch in (x, x[:1], *x.split(1), x.flip(0)):
            assert answers(path, batch) == pytest.approx(network(batch).numpy(), abs=1e-5)


@pytest.mark.parametrize("thresholds", [[0.0, 0.0], [NEVER, 0.0], [NEVER, NEVER], [0.0, NEVER]])
def test_when_all_or_none_leave(tmp_path, exported, thresholds):
    x = torch.randn(5, 1, 8, 8)
    path = with_thresholds(exported, tmp_path, thresholds)
    assert answers(path, x) == pytest.approx(random_network(thresholds)(x).detach().numpy(), abs=1e-5)  # type: ignore[union-attr]


def test_same_network_same_bytes(tmp_path, exported):
    again = export(random_network([0.5, 0.6]), torch.zeros(2, 1, 8, 8), tmp_path / "net.onnx")
    assert again.read_bytes() == exported.read_bytes()


def test_normalisation_is_in_the_file_and_two_inputs_work(tmp_path):
    class Normalize(nn.Module):
        def forward(self, x, y):
            return (x - 0.5) / 0.25, y * 2

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)
    batches = [(inputs, torch.randint(0, 3, (8,), generator=generator))]
    normalize = Normalize()
    task = Task(batches, batches, batches, normalize=normalize)
    network = Exits(count=1, confidence=0.45, train="1ep")(Mixed(), task)  # type: ignore[arg-type]
    prepared = task.prepare(inputs)
    assert 0 < int(network.leave(*prepared)[1].sum()) < 8
    path = export(network, task.example_inputs(), tmp_path / "net.onnx", normalize=normalize)
    assert Engine(path).run(*(x.numpy() for x in inputs))[0] == pytest.approx(network(*prepared).detach().numpy(), abs=1e-4)


def operators_run(path: Path, x: Tensor, folder: Path) -> list[str]:
    """The operators that ONNX Runtime's own profile says it executed."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {"input": x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"]["op_name"] for event in events if event.get("name", "").endswith("_kernel_time") and "op_name" in event["args"]]


@pytest.mark.parametrize(("thresholds", "stages"), [([0.0, 0.0], 1), ([NEVER, 0.0], 2), ([NEVER, NEVER], 3)])
def test_a_stage_that_nobody_needs_is_not_run(tmp_path, exported, thresholds, stages):
    ran = operators_run(with_thresholds(exported, tmp_path, thresholds), torch.randn(3, 1, 8, 8), tmp_path)
    assert sum("Conv" in name for name in ran) == stages
    assert sum("Gemm" in name or "MatMul" in name for name in ran) == stages


# --- digits ---


@pytest.fixture(scope="module")
def digits() -> Task:
    torch.manual_seed(0)
    return data.load("digits", batch_size=32)


@pytest.fixture(scope="module")
def with_exits(digits: Task) -> EarlyExit:
    torch.manual_seed(0)
    return Exits(count=2, width=16, train=Train(epochs=8, learning_rate=3e-3))(Net(), digits)  # type: ignore[return-value]


def file_accuracy(path: Path, task: Task) -> float:
    engine = Engine(path)
    right = [engine.run(x.numpy())[0].argmax(1) == y.numpy() for x, y in task.test]
    return float(np.concatenate(right).mean())


def test_later_exits_are_at_least_as_good(with_exits, digits):
    x, y = torch.cat([x for x, _ in digits.test]), torch.cat([y for _, y in digits.test])
    with torch.no_grad():
        accuracy = [(z.argmax(1) == y).float().mean().item() for z in with_exits.eval().all_logits(*digits.prepare(x))]
    assert accuracy[0] <= accuracy[1] + 0.005
    assert accuracy[1] <= accuracy[2] + 0.005
    assert accuracy[2] > 0.95


def test_samples_leave_early_and_validation_loses_nothing(with_exits, digits):
    with torch.no_grad():
        exits = torch.cat([with_exits.eval().leave(*digits.prepare(x))[1] for x, _ in digits.test])
    assert (exits == 0).any()
    assert (exits < 2).float().mean() > 0.3
    cost = torch.tensor(with_exits.exit_macs(*digits.example_inputs()), dtype=torch.float64)
    assert with_exits.mean_macs(digits, "test") == pytest.approx(cost[exits].mean().item())
    assert with_exits.mean_macs(digits, "test") < 0.8 * cost[-1]
    chosen = with_exits.thresholds.clone()
    value = evaluate(with_exits, digits, "valid")
    with_exits.thresholds.fill_(NEVER)
    assert value >= evaluate(with_exits, digits, "valid")
    with_exits.thresholds.copy_(chosen)


@pytest.fixture(scope="module")
def digits_file(with_exits: EarlyExit, digits: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(with_exits, digits.example_inputs(), tmp_path_factory.mktemp("digits") / "net.onnx", normalize=digits.normalize)


def test_accuracy_of_the_file_is_that_of_the_network(digits_file, with_exits, digits):
    assert file_accuracy(digits_file, digits) == pytest.approx(evaluate(with_exits, digits, "test"), abs=1e-9)


@pytest.mark.slow
def test_int8_after_exits(tmp_path, digits_file, with_exits, digits):
    small = Int8()(with_exits, digits)
    path = export(small, digits.example_inputs(), tmp_path / "int8.onnx", normalize=digits.normalize)
    assert isinstance(small, EarlyExit)
    assert path.stat().st_size < 0.6 * digits_file.stat().st_size
    assert abs(file_accuracy(path, digits) - file_accuracy(digits_file, digits)) < 0.02
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)


def test_weights_can_be_pruned_after_exits(with_exits, digits):
    small = bake(Weights(keep=0.5)(with_exits, digits))
    prunable = [value for name, value in small.named_parameters() if value.dim() >= 2]
    assert sum(int(value.count_nonzero()) for value in prunable) == (sum(value.numel() for value in prunable) + 1) // 2
    assert small.eval()(*digits.example_inputs()).shape == (2, 10)
