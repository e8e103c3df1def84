"""Files that somebody forged to harm a reader: each is refused with a reason, in little memory and time, and nothing is written."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import zstandard
from onnx import TensorProto

from pared import codec
from pared.codec import container, frames
from pared.codec.cursor import checksum, number
from pared.codec.split import unique_names
from pared.core.errors import FileError

READER = """
import resource, sys, time
from pathlib import Path
from pared import codec
from pared.core.errors import FileError
codec.inspect(Path(sys.argv[1]) / "good.pared")  # everything is loaded and compiled
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).glob("*.pared")):
    start = time.process_time()
    try:
        codec.unpack(path, path.with_suffix(""))
        said = "opened"
    except FileError as error:
        said = str(error)
    print(path.stem, time.process_time() - start, said.replace("\\n", " ")[:300], sep="\\t")
"""


def framed(program: bytes, packed: bytes | None = None, size: int | None = None, source: int = 0) -> bytes:
    """The beginning of a file, up to its index."""
    packed = frames.pack(program, bare=True, dictionary=container._dictionary()) if packed is None else packed
    return container.MAGIC + bytes([1, source]) + number(len(program) if size is None else size) + number(len(packed)) + packed


def forged(program: bytes, blocks: list[bytes], source: int = 0, least: int = 0) -> bytes:
    """A file with right checksums, filled up to a length."""
    head = framed(program, source=source) + b"".join(number(len(block)) + checksum(block) for block in blocks)
    return (head + checksum(head) + b"".join(blocks)).ljust(least, b"\0")


def header(shape: list[int], dtype: str = "F32", size: int = 4) -> bytes:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, int(np.prod([float(n) for n in shape])) * size]}}).encode()


def model(**fields: object) -> bytes:
    """A model with one tensor."""
    proto = onnx.ModelProto()
    proto.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, raw_data=b"\0", **fields)  # pyright: ignore[reportArgumentType]
    return proto.SerializeToString()


def nested(levels: int) -> bytes:
    """A model whose attributes hold graphs that hold attributes, and so on."""
    inner = b""
    for _ in range(levels):
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            inner = bytes([field << 3 | 2]) + number(len(inner)) + inner
    return b"\x3a" + number(len(inner)) + inner


def zeros(count: int) -> bytes:
    """A bare frame of zeros, as small as can be."""
    small = zstandard.ZstdCompressionParameters(compression_level=19, format=zstandard.FORMAT_ZSTD1_MAGICLESS, window_log=23)
    writer = zstandard.ZstdCompressor(compression_params=small).compressobj()
    return b"".join(writer.compress(bytes(1 << 24)) for _ in range(count >> 24)) + writer.flush()


MILLION = 1 << 20
CLAIMS = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(1 << 12))
ADAPTIVE = b"\x53" + bytes(4) + b"\x63" + bytes(range(1, 100))  # integers that get longer and longer
LIED = CLAIMS[:4] + b"\xe0" + (1 << 50).to_bytes(8, "little") + CLAIMS[7:]  # the frame's own size, of eight bytes
SCALED = b"\xf0\xff\xff\x07\4\4\xff\x0f\xbf\1\x40\0\0\0\0"  # the largest of all that a scaled matrix begins with

ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "claims-16-gigabytes": (lambda: forged(header([1 << 32]), [b"\x06" + b"\0" * 4], least=MILLION), "claim to hold"),
    "claims-more-than-there-is": (lambda: forged(header([1 << 60]), [b"\x06" + b"\0" * 4]), "claim to hold"),
    "claims-a-large-program": (lambda: framed(b"", bytes(MILLION), size=(1 << 31) - 1), "claim to hold"),
    "claims-too-large-a-program": (lambda: framed(b"", bytes(9), size=1 << 40), "at most"),
    "claims-a-long-program": (lambda: container.MAGIC + b"\1\0\2" + number(1 << 40), "cut off"),
    "program-bomb": (lambda: framed(b"", zeros(1 << 30), size=1000), "can't be unpacked"),
    "program-with-a-size": (lambda: framed(b"", LIED[4:], size=1000), "can't be unpacked"),
    "program-that-is-longer": (lambda: framed(b"", frames.pack(b"{}" * 999, bare=True, dictionary=container._dictionary()), 9), "unpacked"),
    "tensor-bomb": (lambda: forged(header([16]), [b"\x02" + number(len(bomb := frames.pack(bytes(1 << 26)))) + bomb]), "unpacked"),
    "tensor-frame-with-a-size": (lambda: forged(header([16]), [b"\x02" + number(len(LIED)) + LIED]), "says more than it may"),
    "header-of-brackets": (lambda: forged(b"[" * 900_000, []), "isn't that of"),
    "header-of-objects": (lambda: forged(b'{"a":' * 200_000, []), "isn't that of"),
    "header-with-a-long-number": (lambda: forged(b'{"a": ' + b"9" * 900_000 + b"}", []), "isn't that of"),
    "header-with-many-axes": (lambda: forged(header([]).replace(b"[]", b"[" + b"9,9" * 200_000 + b"]"), []), "isn't that of"),
    "header-with-half-a-character": (lambda: forged(header([9]).replace(b"w", b"\\ud800"), []), "isn't that of"),
    "header-that-is-no-text": (lambda: forged(b"\xff\xfe" * 99, []), "isn't that of"),
    "model-with-many-axes": (lambda: forged(model(dims=[9] * 100_000), [], 1), "no array can have"),
    "model-with-large-axes": (lambda: forged(model(dims=[1 << 62] * 60), [], 1), "damaged"),
    "model-with-negative-axes": (lambda: forged(model(dims=[-8, -8]), [], 1), "no array can have"),
    "model-that-is-nested": (lambda: forged(nested(200), [], 1), "no ONNX model"),
    "model-elsewhere": (lambda: forged(elsewhere("/etc/passwd"), [b"\x06" + b"\0" * 4], 1), "in another file"),
    "adaptive-of-megabytes": (lambda: forged(header([4096, 1024], "I8", 1), [ADAPTIVE]), "more than 8 bits"),
    "adaptive-that-is-long": (lambda: forged(header([1 << 22, 1]), [b"\x56" + b"\0" * 4 + b"\0\0\0\1x"]), "too long for the adaptive"),
    "scaled-with-nothing": (lambda: forged(header([64, 64]), [b"\x66" + b"\0" * 4 + SCALED]), "shape of a matrix"),
    "table-that-is-long": (lambda: forged(header([64]), [b"\x05" + number(1 << 40)]), "at most"),
    "runs-that-are-many": (lambda: forged(header([64]), [b"\x36" + b"\0" * 4 + number(1 << 62)]), "at most"),
    "static-with-a-long-table": (lambda: forged(header([64]), [b"\x16" + b"\0" * 4 + number(1 << 30)]), "at most"),
    "static-of-one-symbol": (lambda: forged(header([1 << 20], "I8", 1), [b"\x13\0\1\0\0\0"]), "doesn't add up"),
}  # fmt: skip


def elsewhere(path: str) -> bytes:
    """A model whose tensor is in another file."""
    proto = onnx.ModelProto.FromString(model(dims=[64]))
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    proto.graph.initializer[0].external_data.add(key="location", value=path)
    return proto.SerializeToString()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set as in Linux")
def test_attacks_are_refused_in_little_memory_and_time(tmp_path: Path) -> None:
    for name, (make, _) in ATTACKS.items():
        (tmp_path / f"{name}.pared").write_bytes(make())
    nibbles = forged(header([1 << 13, 1 << 11], "U8", 1), [b"\x04\0"])
    (tmp_path / "good.pared").write_bytes(nibbles)  # 16 MiB, all that a small file may hold, of the kind that needs most memory
    before = set(tmp_path.iterdir())
    command = [sys.executable, "-c", READER, str(tmp_path), str(300 << 20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: (float(seconds), said) for name, seconds, said in (line.split("\t") for line in done.stdout.splitlines())}
    assert found.pop("good")[1] == "opened"
    assert set(found) == set(ATTACKS)
    for name, (seconds, said) in found.items():
        assert ATTACKS[name][1] in said, (name, said)
        assert seconds < 20, (name, seconds)
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"good"}


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    program = header([4], "U8", 1).replace(b'"w"', b'"../../x/\\u0000/etc/passwd"')
    (tmp_path / "n.pared").write_bytes(forged(program, [b"\0abcd"]))
    codec.unpack(tmp_path / "n.pared", tmp_path / "n.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"n.pared", "n.safetensors"}
    assert codec.PackedFile(tmp_path / "n.pared").read("../../x/\0/etc/passwd").tobytes() == b"abcd"


def test_names_that_look_like_those_made_here_stay_different() -> None:
    names = ["a", "a", "a#1", "", "#3", "a##1", "", "a"]
    found = unique_names(names)
    assert len(set(found)) == len(names)
    assert [name for name, given in zip(found, names, strict=True) if name == given] == ["a", "a#1", "#3", "a##1"]
    many = ["a", *("a" + "#" * n for n in range(1, 1500)), *["a"] * 1500]
    assert len(set(unique_names(many))) == len(many)


def test_a_program_with_data_elsewhere_is_not_run(tmp_path: Path) -> None:
    for path in ("/etc/passwd", "../x", "x"):
        (tmp_path / "e.pared").write_bytes(forged(elsewhere(path), [b"\0" + bytes(256)], 1))
        with pytest.raises(FileError, match="in another file"):
            codec.to_onnx(codec.PackedFile(tmp_path / "e.pared"))


@pytest.mark.parametrize("name", [b"\xff", b"\xc3", b"\0"])
def test_names_in_a_model_that_are_no_text(tmp_path: Path, name: bytes) -> None:
    program = model(dims=[8]).replace(b"B\x01w", b"B" + bytes([len(name)]) + name)
    (tmp_path / "n.pared").write_bytes(forged(program, [b"\0" + bytes(32)], 1))
    if name == b"\0":
        codec.unpack(tmp_path / "n.pared", tmp_path / "n.onnx")
        return
    with pytest.raises(FileError, match="is no text"):
        codec.unpack(tmp_path / "n.pared", tmp_path / "n.onnx")


def test_every_byte_of_a_model_that_is_another(tmp_path: Path) -> None:
    program = model(dims=[8])
    path = tmp_path / "m.pared"
    for place in range(len(program)):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            path.write_bytes(forged(program[:place] + bytes([value]) + program[place + 1 :], [b"\0" + bytes(32)], 1))
            with contextlib.suppress(FileError):
                codec.inspect(path)
