"""Linear layers of 4 and 2 bits in the engine: which weights have a packed form, that it is exact, and what the engine makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pared import codec
from pared.core.rules import bake
from pared.quantize import Bits, Rounding
from pared.runtime import Engine, export
from pared.runtime.few_bits import Packed, pack_weight
from pared.training import Task


def unpacked(packed: Packed, inputs: int) -> np.ndarray:
    """A weight from its packed form, written anew from the operator's definition: byte by byte, the lowest bits first."""
    each, mask = 8 // packed.bits, 2**packed.bits - 1
    outputs, blocks, _ = packed.integers.shape
    weight = np.zeros((outputs, blocks * packed.block), np.float32)
    for row in range(outputs):
        for column in range(blocks * packed.block):
            at, inside = divmod(column, packed.block)
            integer = (int(packed.integers[row, at, inside // each]) >> (packed.bits * (inside % each))) & mask
            zero = 2 ** (packed.bits - 1)
            if packed.zero_points is not None:
                zero = (int(packed.zero_points[row, at // each]) >> (packed.bits * (at % each))) & mask
            weight[row, column] = np.float32(integer - zero) * packed.scales[row, at]
    return weight[:, :inputs]


@pytest.mark.parametrize(
    ("low", "high", "group", "expected"),
    [
        (-7, 7, 0, (4, 128)),  # a scale for each output
        (-8, 7, 32, (4, 32)),
        (0, 15, 16, (4, 16)),  # needs zero points
        (-1, 1, 64, (2, 64)),
        (0, 3, 32, (2, 32)),
        (-2, 1, 16, (4, 16)),  # the engine has no fast kernel of 2 bits for so small blocks
    ],
)
def test_packed_form_gives_the_weight_to_the_last_bit(low: int, high: int, group: int, expected: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    outputs, inputs = 5, 200
    groups = -(-inputs // group) if group else 1
    integers = generator.integers(low, high + 1, (outputs, inputs))
    for start in range(0, inputs, group or inputs):  # every block has the whole range, so that no smaller grid fits
        integers[:, start], integers[:, start + 1] = low, high
    scales = generator.uniform(0.003, 0.1, (outputs, groups)).astype(np.float32)
    weight = integers.astype(np.float32) * np.repeat(scales, group or inputs, 1)[:, :inputs]
    packed = pack_weight(weight)
    assert packed is not None
    assert (packed.bits, packed.block) == expected
    np.testing.assert_array_equal(unpacked(packed, inputs), weight)


def test_what_lies_on_no_grid_of_four_bits_has_no_packed_form() -> None:
    generator = np.random.default_rng(0)
    assert pack_weight(generator.normal(size=(3, 64)).astype(np.float32)) is None
    assert pack_weight(np.array([[-8, 8, 1]], np.float32)) is None  # 17 integers
    assert pack_weight(np.array([[1.0, np.inf]], np.float32)) is None
    almost = np.array([[3.0, 1.0, np.nextafter(np.float32(2), np.float32(3))]], np.float32)
    assert pack_weight(almost) is None


class Layers(nn.Module):
    """On more than two axes a linear layer is another operator than on two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.small = nn.Linear(200, 160), nn.Linear(160, 128, bias=False), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(torch.relu(self.second(torch.relu(self.first(x)))))


def deployed(method: Bits | Rounding, folder: Path, *shape: int) -> tuple[nn.Module, Tensor, Path]:
    torch.manual_seed(0)
    x = torch.randn(*shape)
    batches = [(x, torch.zeros(len(x), dtype=torch.long))]
    network = bake(method(Layers(), Task(batches, batches, batches))).eval()
    return network, x, export(network, x, folder / "layers.onnx")


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (Bits(weights=4, granularity="group", group=32, symmetric=False, first_and_last=None), 4),
        (Bits(weights=2, granularity="group", group=64, first_and_last=None), 2),
        (Rounding(bits=4, samples=6, granularity="group", group=16), 4),
    ],
)
@pytest.mark.parametrize("shape", [(6, 200), (2, 3, 200)])
def test_file_holds_the_weights_packed_and_answers_as_the_network(
    method: Bits | Rounding, bits: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    network, x, file = deployed(method, tmp_path, *shape)
    nodes = [node for node in onnx.load(file).graph.node if node.op_type == "MatMulNBits"]
    settings = [{attribute.name: attribute.i for attribute in node.attribute} for node in nodes]
    assert [(each["K"], each["N"], each["bits"], each["accuracy_level"]) for each in settings] == [(200, 160, bits, 4), (160, 128, bits, 4)]
    with torch.no_grad():
        expected = network(x).numpy()
    found = Engine(file).run(x.numpy())[0]
    # inputs are rounded to 8 bits by blocks: half a step of each is 1/254 of the block's largest, and errors add up as squares
    assert np.linalg.norm(found - expected) < 0.012 * np.linalg.norm(expected)


def test_only_the_rounding_of_inputs_tells_the_file_from_the_network(tmp_path: Path) -> None:
    layer = nn.Linear(256, 64)
    scale = torch.rand(64, 1) / 10
    layer.weight.data = torch.randint(-7, 8, (64, 256)) * scale
    layer.weight.data[:, ::32] = 7 * scale
    x = torch.randint(-127, 128, (5, 256)).float()
    x[:, ::16] = 127  # every block holds its largest, so that integers are what the engine rounds to
    file = export(layer, x, tmp_path / "layer.onnx")
    with torch.no_grad():
        expected = layer.double()(x.double()).numpy()
    assert np.abs(Engine(file).run(x.numpy())[0] - expected).max() < 1e-6 * np.abs(expected).max()


def test_packed_file_is_small_and_unpacks_to_the_same_bytes(tmp_path: Path) -> None:
    _, _, file = deployed(Bits(weights=4, granularity="group", group=32, first_and_last=None), tmp_path, 6, 200)
    codec.pack(file, tmp_path / "layers.pared")
    codec.unpack(tmp_path / "layers.pared", tmp_path / "again.onnx")
    weights = 200 * 160 + 160 * 128
    assert (tmp_path / "layers.pared").stat().st_size < file.stat().st_size < weights * 5 / 8 + 8000  # a scale costs a bit a weight
    one, other = onnx.load(file), onnx.load(tmp_path / "again.onnx")
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
    assert sum(numpy_helper.to_array(tensor).size for tensor in one.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8) > 0


def test_layers_of_other_grids_stay_float(tmp_path: Path) -> None:
    _, _, file = deployed(Bits(weights=5, first_and_last=None), tmp_path, 6, 200)
    assert [node.op_type for node in onnx.load(file).graph.node] == ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]
