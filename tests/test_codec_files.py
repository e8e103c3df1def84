"""Packed files: what comes back, from whatever is packed; lazy reading; the command line; and files that somebody damaged or forged."""

from __future__ import annotations

import json
import re
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import codec_twin
import pared
from pared import codec, runtime
from pared.architecture.nets import lenet5
from pared.cli.main import app
from pared.codec import container, frames, onnx_program
from pared.codec.cursor import checksum, number
from pared.core.errors import FileError, RunError, SettingsError
from pared.report.tensors import draw_tensors


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sparse = ((rng.random((60, 80)) < 0.1) * rng.integers(-3, 4, (60, 80))).astype(np.float32) * np.float32(0.1)
    return {
        "first.weight": sparse, "first.bias": rng.normal(size=60).astype(np.float32), "count": np.array(7),
        "empty": np.zeros((0, 4), np.float32), "large": rng.normal(size=(200, 100)).astype(np.float32),
        "half": rng.normal(size=(9, 9)).astype(np.float16),
    }  # fmt: skip


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "w.safetensors", metadata={"format": "pt"})
    codec.pack(tmp_path / "w.safetensors", tmp_path / "w.pared")
    return tmp_path / "w.pared"


def model_of_all_kinds() -> onnx.ModelProto:
    """Tensors in every field that can hold one, in a subgraph, an attribute, a function and a sparse initializer."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph("g (float[n, 8] x) => (float[n, 8] y) { y = MatMul(x, w) }")
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), ""))
    graph.node.insert(0, node)
    branch = onnx.parser.parse_graph("branch () => (float[5] z) { z = Identity(v) }")
    branch.initializer.append(numpy_helper.from_array(rng.normal(size=5).astype(np.float32), "v"))
    graph.node.insert(0, helper.make_node("If", ["condition"], ["d"], then_branch=branch, else_branch=branch))
    graph.initializer.append(numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), "w"))
    for kind, content in (
        (TensorProto.FLOAT, rng.normal(size=40).tolist()), (TensorProto.INT64, list(range(-20, 20))), (TensorProto.INT32, list(range(40))),
        (TensorProto.DOUBLE, rng.normal(size=40).tolist()), (TensorProto.UINT64, list(range(40))), (TensorProto.FLOAT16, [1.0] * 40),
        (TensorProto.INT8, [3] * 40), (TensorProto.INT4, [1, -2] * 20), (TensorProto.BFLOAT16, [1.5] * 40),
    ):  # fmt: skip
        graph.initializer.append(helper.make_tensor(f"typed{kind}", kind, [40], content))
    raw = np.arange(40).astype(ml_dtypes.bfloat16)
    graph.initializer.append(helper.make_tensor("bf16", TensorProto.BFLOAT16, [40], raw.tobytes(), raw=True))
    graph.initializer.append(helper.make_tensor("packed4", TensorProto.UINT4, [41], bytes(range(21)), raw=True))
    graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"one", b"two"]))
    graph.initializer.append(helper.make_tensor("tiny", TensorProto.UINT8, [1], b"\0", raw=True))
    graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [8], rng.normal(size=8).tolist()))  # a name twice
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [5], [1.0] * 5), helper.make_tensor("i", TensorProto.INT64, [5], range(5)), [9]
    )
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    function = model.functions.add()
    function.name, function.domain = "f", "local"
    function.node.append(node)
    return model


@pytest.mark.parametrize("prefer", ["auto", "smallest", "static", "huffman", "raw"])
def test_a_safetensors_file_comes_back_byte_for_byte(tmp_path: Path, prefer: Any) -> None:
    save_file(weights(), tmp_path / "w.safetensors", metadata={"format": "pt"})
    codec.pack(tmp_path / "w.safetensors", tmp_path / "w.pared", prefer)
    codec.unpack(tmp_path / "w.pared", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()


def test_both_readers_read_the_same(packed: Path) -> None:
    dictionary = resources.files("pared.codec").joinpath("program.dictionary").read_bytes()
    program, found = codec_twin.read(packed.read_bytes(), dictionary)
    reader = codec.PackedFile(packed)
    assert program == reader.program
    assert found == [content for _, content in sorted(reader.contents())]


def test_a_model_comes_back_as_an_equal_message(tmp_path: Path) -> None:
    model = model_of_all_kinds()
    before = model.SerializeToString(deterministic=True)
    (tmp_path / "m.onnx").write_bytes(before)
    for threads in (1, 3):
        codec.pack(tmp_path / "m.onnx", tmp_path / "m.pared", threads=threads)
        codec.unpack(tmp_path / "m.pared", tmp_path / "again.onnx", threads=threads)
        assert (tmp_path / "again.onnx").read_bytes() == before
    names = [row.name for row in codec.inspect(tmp_path / "m.pared").tensors]
    assert len(set(names)) == len(names)
    assert {"w", "typed1", "bf16", "packed4", "s", "i"} <= set(names)
    assert not {"text", "tiny"} & set(names)


def test_tensors_in_files_beside_a_model_become_part_of_it(tmp_path: Path) -> None:
    model = model_of_all_kinds()
    inline = model.SerializeToString(deterministic=True)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=100)
    codec.pack(tmp_path / "m.onnx", tmp_path / "m.pared")
    codec.unpack(tmp_path / "m.pared", tmp_path / "again.onnx")
    back = onnx.ModelProto.FromString((tmp_path / "again.onnx").read_bytes())
    for one, other in zip(back.graph.initializer, onnx.ModelProto.FromString(inline).graph.initializer, strict=True):
        if one.data_type not in (TensorProto.STRING, TensorProto.INT4, TensorProto.UINT4):
            assert numpy_helper.to_array(one).tobytes() == numpy_helper.to_array(other).tobytes()
    (tmp_path / "m.data").unlink()
    with pytest.raises(FileError, match="can't be read from a file beside it"):
        codec.pack(tmp_path / "m.onnx", tmp_path / "m.pared")


def test_a_file_elsewhere_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 64)
    (tmp_path / "models").mkdir()
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) { y = Relu(x) }')
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.UINT8, dims=[64], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "models" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match="'w'"):
        codec.pack(tmp_path / "models" / "m.onnx", tmp_path / "m.pared")


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.safetensors")
    for name, threads in (("a", 1), ("b", 4)):
        codec.pack(tmp_path / "w.safetensors", tmp_path / name, threads=threads)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_packed_network_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = runtime.export(lenet5().eval(), torch.rand(2, 1, 28, 28), tmp_path / "lenet5.onnx")
    codec.pack(path, tmp_path / "lenet5.pared")
    x = np.random.default_rng(0).random((3, 1, 28, 28), np.float32)
    assert np.array_equal(pared.load(tmp_path / "lenet5.pared").run(x)[0], pared.load(path).run(x)[0])
    assert codec.inspect(tmp_path / "lenet5.pared").program <= 700
    codec.unpack(tmp_path / "lenet5.pared", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_one_tensor_is_read_without_the_others(packed: Path) -> None:
    data = bytearray(packed.read_bytes())
    reader = codec.PackedFile(packed)
    large = next(block for block in reader.blocks if reader.tensors[block.members[0]].name == "large")
    data[large.offset + 5] ^= 1
    packed.write_bytes(data)
    reader = codec.PackedFile(packed)
    for name, array in weights().items():
        if name != "large":
            assert np.array_equal(reader.read(name), array)
    with pytest.raises(FileError, match="block of tensor 'large' is damaged"):
        reader.read("large")
    with pytest.raises(FileError, match="no tensor 'largest'"):
        reader.read("largest")


def test_where_the_bytes_go(packed: Path) -> None:
    found = codec.inspect(packed)
    assert found.total == packed.stat().st_size == found.program + found.weights
    assert sum(row.stored for row in found.tensors) == found.weights
    rows = {row.name: row for row in found.tensors}
    assert rows["first.weight"].coding.startswith("grid")
    assert rows["first.weight"].bits < 1
    assert rows["large"].coding == "planes"


def test_a_large_tensor_of_zeros_is_padded_so_that_readers_need_not_trust(tmp_path: Path) -> None:
    save_file({"zeros": np.zeros((5000, 1000), np.float32)}, tmp_path / "z.safetensors")
    codec.pack(tmp_path / "z.safetensors", tmp_path / "z.pared")
    size = (tmp_path / "z.pared").stat().st_size
    assert (20_000_000 - (1 << 24)) // 256 < size == codec.inspect(tmp_path / "z.pared").total < 14_000
    data = bytearray((tmp_path / "z.pared").read_bytes())
    data[-1] = 1
    assert "after the last tensor" in refused(tmp_path / "y.pared", bytes(data))
    assert "claim to hold" in refused(tmp_path / "y.pared", bytes(data[:-1]))
    codec.unpack(tmp_path / "z.pared", tmp_path / "again.safetensors")
    assert not load_file(tmp_path / "again.safetensors")["zeros"].any()


@pytest.mark.parametrize("name", ["missing.onnx", "w.bin", "w.onnx", "w.safetensors", "empty.onnx", "empty.safetensors"])
def test_what_can_not_be_packed(tmp_path: Path, name: str) -> None:
    if "missing" not in name:
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"\xff\xfenot a model" * 9)
    with pytest.raises(FileError, match=name.replace(".", r"\.")):
        codec.pack(tmp_path / name, tmp_path / "x.pared")
    assert not (tmp_path / "x.pared").exists()


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"[" * 5000,
    ],
)  # fmt: skip
def test_safetensors_headers_that_lie(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(FileError, match=r"w\.safetensors: "):
        codec.pack(tmp_path / "w.safetensors", tmp_path / "w.pared")


def test_a_tensor_whose_data_does_not_fit_its_shape(tmp_path: Path) -> None:
    model = model_of_all_kinds()
    model.graph.initializer.add(name="short", data_type=TensorProto.FLOAT, dims=[8], raw_data=b"x")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match="'short' doesn't fit its shape"):
        codec.pack(tmp_path / "m.onnx", tmp_path / "m.pared")


def refused(path: Path, data: bytes) -> str:
    """The reason for which a whole file is refused."""
    path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        codec.inspect(path)
    return str(caught.value)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    sparse = ((rng.random((12, 10)) < 0.2) * rng.integers(-3, 4, (12, 10))).astype(np.float32)
    save_file({"w": sparse, "b": rng.normal(size=8).astype(np.float32)}, tmp_path / "s.safetensors")
    codec.pack(tmp_path / "s.safetensors", tmp_path / "s.pared")
    return tmp_path / "s.pared"


def test_every_length_and_every_bit_is_checked(small: Path) -> None:
    data = small.read_bytes()
    for length in range(len(data)):
        assert refused(small, data[:length])
    for place in range(len(data)):
        for bit in (1, 0x80):
            wrong = bytearray(data)
            wrong[place] ^= bit
            assert refused(small, bytes(wrong))
    assert "something was added" in refused(small, data + b"\0")
    assert "version is 9" in refused(small, data[:4] + b"\x09" + data[5:])
    assert "no .pared file" in refused(small, b"PK" + data[2:])


def forged(program: bytes, blocks: list[bytes], source: int = 0, size: int | None = None) -> bytes:
    """A file with right checksums, whatever is in it."""
    packed = frames.pack(program, bare=True, dictionary=container._dictionary())
    head = container.MAGIC + bytes([1, source]) + number(len(program) if size is None else size) + number(len(packed)) + packed
    head += b"".join(number(len(block)) + checksum(block) for block in blocks)
    return head + checksum(head) + b"".join(blocks)


def header(shape: list[int], dtype: str = "F32") -> bytes:
    size = int(np.prod([float(n) for n in shape])) * 4
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (forged(header([1 << 20, 1 << 20]), [b"\x06\0\0\0\0"]), "claim to hold"),
        (forged(header([4096]), [b"\x06" + b"\0" * 9]), "after tensor 'w'"),
        (forged(header([16]), [b"\x06\0\0\x80?"]) + b"\0", "something was added"),
        (forged(header([16]), [b"\x06\0\0\x80?\1"]), "after tensor 'w'"),
        (forged(header([16]), [b"\x06\0"]), "cut off"),
        (forged(header([0, 1 << 62]), [b"\x16\0\0\x80?\0\0\0"]), "can't be held in memory"),
        (forged(header([16]), [b"\x16\0\0\x80?\xff\xff\xff\xff\x7f"]), "at most"),
        (forged(header([16]), [b"\x05\xff\xff\x7f\0"]), "at most"),
        (forged(header([16]), [b"\x02\x04abcd"]), "can't be unpacked"),
        (forged(b"{}", [], size=1 << 30), "claim to hold"),
        (forged(b"{}", [], size=3), "instead of"),
        (forged(b"no header", []), "isn't that of a safetensors"),
        (forged(b"\xff\xff\xff", [], source=1), "no ONNX model"),
        (forged(b"", [], source=2), "something unknown"),
    ],
)
def test_forgeries_with_right_checksums(tmp_path: Path, data: bytes, reason: str) -> None:
    assert re.search(reason, refused(tmp_path / "f.pared", data))


def test_a_model_program_that_lies_about_fields(tmp_path: Path) -> None:
    for marker, kind, reason in ((9, TensorProto.FLOAT, "doesn't exist"), (3, TensorProto.FLOAT, "another type")):
        model = onnx.ModelProto()
        model.graph.initializer.add(name="w", data_type=kind, dims=[8], raw_data=bytes([marker]))
        assert reason in refused(tmp_path / "f.pared", forged(model.SerializeToString(), [b"\0" + b"\0" * 32], source=1))
    model.graph.initializer[0].dims[0] = -8
    assert "shape" in refused(tmp_path / "f.pared", forged(model.SerializeToString(), [], source=1))


def test_a_model_without_a_graph_can_not_be_run(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="tensors only"):
        pared.load(packed)
    with pytest.raises(FileError, match=r"holds a \.safetensors file"):
        codec.unpack(packed, tmp_path / "w.onnx")
    with pytest.raises(FileError, match="there is no such file"):
        codec.inspect(tmp_path / "nothing.pared")
    with pytest.raises(RunError):
        pared.load(tmp_path / "nothing.pared")


def test_markers_are_one_byte_each() -> None:
    model = model_of_all_kinds()
    split = onnx_program.split(model, "m")
    _, found, messages = onnx_program.parse(split.program, "m")
    assert list(found) == list(split.tensors)
    assert all(len(message.raw_data) == 1 for message in messages)
    assert zlib.crc32(split.program) == zlib.crc32(model.SerializeToString(deterministic=True))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_line(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.safetensors")
    source, packed, again = (str(tmp_path / name) for name in ("w.safetensors", "w.pared", "again.safetensors"))
    done = run("pack", source, "-o", packed)
    assert done.exit_code == 0
    assert "times smaller" in done.output
    done = run("inspect", packed, "--json", "--picture", str(tmp_path / "w.svg"))
    found = json.loads(done.output)
    assert found["bytes"] == Path(packed).stat().st_size
    assert len(found["tensors"]) == 6
    assert (tmp_path / "w.svg").read_text().startswith("<?xml")
    assert "first.weight" in run("inspect", packed).output
    assert run("unpack", packed, "-o", again, "--quiet").exit_code == 0
    assert Path(again).read_bytes() == Path(source).read_bytes()
    assert json.loads(run("pack", source, "-o", packed, "--prefer", "raw", "--json").output)["source_bytes"] == Path(source).stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pack", "nothing.onnx", "-o", "x.pared"), "no such file"),
        (("pack", "nothing.onnx", "-o", "x.pared", "--prefer", "best"), "--prefer"),
        (("inspect", "nothing.pared"), "no such file"),
        (("unpack", "nothing.pared", "-o", "x.onnx"), "no such file"),
        (("inspect", "nothing.pared", "--picture", "x.gif"), r"\.svg or \.png"),
    ],
)
def test_mistakes_on_the_command_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert re.search(message, done.output)


def test_a_picture_of_many_tensors(tmp_path: Path) -> None:
    save_file({f"layer{n}.weight": np.ones((n + 1, 40), np.float32) for n in range(50)}, tmp_path / "w.safetensors")
    codec.pack(tmp_path / "w.safetensors", tmp_path / "w.pared")
    found = codec.inspect(tmp_path / "w.pared")
    first = draw_tensors(found, tmp_path / "a.svg").read_bytes()
    assert b"20 others" in first
    assert first == draw_tensors(found, tmp_path / "b.svg").read_bytes()
    assert draw_tensors(found, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SettingsError):
        draw_tensors(found, tmp_path / "a.gif")


def test_a_module_without_weights(tmp_path: Path) -> None:
    path = runtime.export(nn.Sequential(nn.ReLU()).eval(), torch.rand(2, 3), tmp_path / "relu.onnx")
    codec.pack(path, tmp_path / "relu.pared")
    assert pared.load(tmp_path / "relu.pared").run(np.array([[-1.0, 2.0, 0.0]], np.float32))[0].tolist() == [[0, 2, 0]]
