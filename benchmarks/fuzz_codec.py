"""Give the reader of `.pared` files a million wrong ones: whatever is in a file, it opens or says why not, and nothing else happens.

    pip install atheris
    python benchmarks/fuzz_codec.py [-runs=1000000] [-seed=1] [other options of libFuzzer]

Three of four inputs are tensors: one that was encoded here and changed in some bytes, or the input's bytes for any type and shape. The
others are whole files, most with right checksums, so that what is wrong is found by the inner decoders: a file that was packed here and
changed, a program of the input's bytes. An exception other than
`FileError`, a minute without an answer or 2 GB of memory end the run with a report. The compiled inner loops aren't measured for
coverage; with NUMBA_BOUNDSCHECK=1 (and a NUMBA_CACHE_DIR of its own) they check every index. From time to time the run prints how
many were opened, and the reasons for which the others were refused.
"""

from __future__ import annotations

import collections
import re
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

COMPILED = [f"pared.codec.{name}" for name in ("mixing", "contexts", "static", "tokens", "scales", "huffman", "integers", "logistic")]
with atheris.instrument_imports(include=["pared.codec"], exclude=COMPILED):
    from pared import codec
    from pared.codec import container, frames, tensors
    from pared.codec.cursor import Cursor, checksum, number
    from pared.codec.elements import ELEMENTS, Layout
    from pared.core.errors import FileError

EVERY = 50_000
"""Files after which a report is printed."""

TYPES = sorted(ELEMENTS)
HEADER = b'{"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}'
REASONS: collections.Counter[str] = collections.Counter()
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def arrays() -> dict[str, np.ndarray]:
    """Small tensors that are stored in every way there is."""
    rng = np.random.default_rng(0)
    sparse = (rng.random((24, 20)) < 0.1) * rng.integers(-3, 4, (24, 20))
    dense = np.rint(rng.normal(size=(40, 30)) * rng.uniform(1, 9, (40, 1)))
    dense[0, 0] = 1e6
    groups = np.repeat(rng.random((12, 3)).astype(np.float32), 16, axis=1)[:, :40] * rng.integers(-7, 8, (12, 40)).astype(np.float32)
    return {
        "sparse": sparse.astype(np.float32), "rows": (sparse * rng.random((24, 1))).astype(np.float32), "bytes": sparse.astype(np.int8),
        "dense": dense.astype(np.float32), "normal": rng.normal(size=(20, 20)).astype(np.float32), "zeros": np.zeros((9, 9)),
        "table": rng.normal(size=5).astype(np.float16)[rng.integers(0, 5, (9, 30))], "long": np.arange(99) * 12345,
        "halves": (rng.integers(0, 3, 400) * 17).astype(np.uint8), "again": np.tile(rng.integers(0, 256, 50, np.uint8), 9),
        "groups": groups, "groups down": np.ascontiguousarray(groups.T),
    }  # fmt: skip


def whole_files() -> list[bytes]:
    """Files as they are written, of both kinds, in all preferences."""
    found = []
    graph = onnx.parser.parse_graph("g (float[n, 8] x) => (float[n, 8] y) { y = MatMul(x, w) }")
    graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [8, 8], np.arange(64.0)))
    onnx.save(helper.make_model(graph), FOLDER / "m.onnx")
    save_file(arrays(), FOLDER / "m.safetensors", metadata={"format": "pt"})
    for source in ("m.onnx", "m.safetensors"):
        for prefer in ("auto", "smallest", "static", "huffman", "raw"):
            codec.pack(FOLDER / source, FOLDER / "seed.pared", prefer)
            found.append((FOLDER / "seed.pared").read_bytes())
    return found


def single_tensors() -> list[tuple[Layout, bytes]]:
    """Single tensors, coded in all preferences."""
    found = []
    for array in arrays().values():
        layout = Layout(ELEMENTS[str(array.dtype)], array.shape)
        found += [(layout, tensors.encode(array.tobytes(), layout, prefer)) for prefer in ("auto", "smallest", "static", "huffman")]
    return found


def file(program: bytes, blocks: list[bytes], source: int = 0) -> bytes:
    """A file with right checksums."""
    packed = frames.pack(program, 1, bare=True, dictionary=container._dictionary())
    head = container.MAGIC + bytes([container.VERSION, source]) + number(len(program)) + number(len(packed)) + packed
    head += b"".join(number(len(block)) + checksum(block) for block in blocks)
    return head + checksum(head) + b"".join(blocks)


def changed(data: bytes, provider: atheris.FuzzedDataProvider) -> bytes:
    """Some bytes replaced, or in one of four cases inserted or left out."""
    longer = provider.ConsumeIntInRange(0, 3) == 0
    found = bytearray(data)
    for _ in range(provider.ConsumeIntInRange(1, 6)):
        place = provider.ConsumeIntInRange(0, len(found))
        new = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 4))
        cut = provider.ConsumeIntInRange(0, 3) if longer else min(len(new), len(found) - place)
        found[place : place + cut] = new if longer else new[:cut]
    return bytes(found)


def mended(data: bytes) -> bytes:
    """Right checksums in a file whose head can still be read."""
    try:
        cursor = Cursor(data, "x")
        cursor.take(5, "it")
        source = container.Source(cursor.take(1, "it")[0])
        program = container._read_program(cursor)
        groups = container.grouped(container.parse_program(source, program, "x"))
        starts = []
        for _ in groups:
            length = cursor.number("it")
            starts.append((cursor.place, length))
            cursor.take(4, "it")
    except (FileError, ValueError):
        return data
    found, offset = bytearray(data), cursor.place + 4
    for place, length in starts:
        found[place : place + 4] = checksum(bytes(found[offset : offset + length]))
        offset += length
    found[cursor.place : cursor.place + 4] = checksum(bytes(found[: cursor.place]))
    return bytes(found)


def made(provider: atheris.FuzzedDataProvider) -> bytes:
    """The file that an input stands for."""
    way = provider.ConsumeIntInRange(0, 5)
    if way <= 2:
        return mended(changed(FILES[provider.ConsumeIntInRange(0, len(FILES) - 1)], provider))
    if way == 3:
        program = MODEL if provider.ConsumeBool() else b""
        return file(changed(program, provider), [provider.ConsumeBytes(300)], 1)
    if way == 4:
        return file(changed(HEADER, provider), [provider.ConsumeBytes(300)])
    return provider.ConsumeBytes(1 << 12)


def tensor(provider: atheris.FuzzedDataProvider) -> None:
    """Decode a tensor: one that was encoded here and changed, or bytes as they come for any type and shape."""
    if provider.ConsumeIntInRange(0, 4):
        layout, data = TENSORS[provider.ConsumeIntInRange(0, len(TENSORS) - 1)]
        data = changed(data, provider)
    else:
        axes = tuple(provider.ConsumeIntInRange(0, 40) for _ in range(provider.ConsumeIntInRange(0, 3)))
        layout = Layout(ELEMENTS[TYPES[provider.ConsumeIntInRange(0, len(TYPES) - 1)]], axes)
        data = provider.ConsumeBytes(1 << 12)
    content = tensors.decode(Cursor(data, "x"), layout)
    if len(content) != layout.size:
        raise AssertionError(f"{len(content)} bytes instead of {layout.size}")


def whole(provider: atheris.FuzzedDataProvider) -> None:
    """Open a file, and everything in it."""
    path = FOLDER / "x.pared"
    path.write_bytes(made(provider))
    packed = container.PackedFile(path)
    if packed.source is container.Source.ONNX:
        codec.to_onnx(packed)
    else:
        collections.deque((one for block in packed.blocks for one in packed.walk(block)), maxlen=0)


def once(data: bytes) -> None:
    """One input: three of four are tensors, the others whole files."""
    provider = atheris.FuzzedDataProvider(data)
    try:
        (tensor if provider.ConsumeIntInRange(0, 3) else whole)(provider)
        REASONS["opened"] += 1
    except FileError as error:
        reason = re.sub(r"'.*'|can't decode.*|\(.*\)|[-\d,]+|\[.*\]", "…", str(error).split(": ", 1)[-1])
        REASONS[reason.removeprefix("tensor …: ")[:90]] += 1
    if sum(REASONS.values()) % EVERY == 0:
        report()


def report() -> None:
    """Print how inputs ended."""
    print(f"{sum(REASONS.values()):,} inputs, {REASONS['opened']:,} opened, {len(REASONS) - 1} different reasons to refuse one:")
    for reason, count in REASONS.most_common():
        print(f"{count:10,} {reason}")
    sys.stdout.flush()


FILES, TENSORS = whole_files(), single_tensors()
MODEL = onnx.load(FOLDER / "m.onnx").SerializeToString()

if __name__ == "__main__":
    atheris.Setup([*sys.argv, "-timeout=60", "-rss_limit_mb=2048"], once)
    atheris.Fuzz()
