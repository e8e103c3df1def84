"""The same integers packed by pared and by nncodec, the reference coder of ISO/IEC 15938-17, and by what one would else take."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import save_file

from pared import codec
from pared.codec import frames
from pared.core.errors import ModelError
from pared.core.problems import Problems
from pared.lab.against_nncodec import worker
from pared.lab.against_nncodec.tensors import SETS, Integers
from pared.lab.claims import judged
from pared.lab.experiment import Progress, Row, Verdict

SMALLER, FASTER = 0.97, 5.0


@dataclass(frozen=True)
class AgainstNncodec:
    """Whole files of the same integers: bytes, and processor seconds to decode them.

    Args:
        seeds: of the networks that are trained here.
        sets: which of the tensors.
        epochs: of training before pruning.
        repeats: of decoding; the shortest counts.
        python: of an environment with nncodec 2.1.3, which needs numpy below 2.
    """

    name: ClassVar[str] = "against_nncodec"
    claim: ClassVar[str] = (
        "Of the same quantized weights, a .pared file is at least 3 % smaller than the bitstream of nncodec, "
        "and is decoded in at most a fifth of the processor time."
    )

    seeds: tuple[int, ...] = (0,)
    sets: tuple[str, ...] = tuple(SETS)
    epochs: int = 12
    repeats: int = 5
    python: str = "venv-nncodec/bin/python"

    def __post_init__(self) -> None:
        problems = Problems("lab.against_nncodec")
        problems.check(all(name in SETS for name in self.sets), "sets", f"names of {', '.join(SETS)}", self.sets)
        problems.number("epochs", self.epochs, low=0, integer=True)
        problems.number("repeats", self.repeats, low=1, integer=True)
        problems.raise_if_any()

    def keys(self) -> tuple[str, ...]:
        """A set of tensors and a seed each."""
        return tuple(f"{name}, seed {seed}" for name in self.sets for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        """Pack the sets that aren't done."""
        _check(self.python)
        for name in self.sets:
            for seed in self.seeds:
                if (key := f"{name}, seed {seed}") not in done:
                    tensors = SETS[name](self.epochs, seed)
                    yield {"key": key, "set": name, "seed": seed, **measured(tensors, out, self.python, self.repeats)}

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Every set has to be smaller and faster; where an integer didn't come back from one of both, nothing is compared."""
        claims = {}
        for row in rows:
            size, speed = row["pared"]["bytes"] / row["nncodec"]["bytes"], row["nncodec"]["decode_seconds"] / row["pared"]["decode_seconds"]
            claims[f"{row['set']}: {100 * (1 - size):.1f} % smaller, which is 3 % or more"] = size <= SMALLER
            claims[f"{row['set']}: decoded {speed:.1f} times faster, which is 5 times or more"] = speed >= FASTER
        lost = [row["set"] for row in rows if not (row["pared"]["same"] and row["nncodec"]["same"])]
        if lost:
            return Verdict("did not reproduce", f"Not every integer came back from both: {', '.join(lost)}.", figures(rows))
        return judged(claims, figures(rows))


def figures(rows: Sequence[Row]) -> tuple[tuple[str, ...], ...]:
    """A line for each set: weights, bytes of each way to store them, and seconds of the two."""
    ways = {"pared": ".pared", "nncodec": "nncodec", "entropy": "entropy", "huffman": "Huffman", "zstandard": "zstd -19"}
    head = ("bytes", "weights", *ways.values(), "pared decodes, s", "nncodec decodes, s")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        sizes = (f"{row[way]['bytes']:,}" for way in ways)
        times = (f"{row[way]['decode_seconds']:.3f}" for way in ("pared", "nncodec"))
        lines.append((row["set"], f"{row['weights']:,}", *sizes, *times))
    return tuple(lines)


def measured(tensors: Integers, out: Path, python: str, repeats: int) -> dict[str, Any]:
    """One set packed in every way."""
    out.mkdir(parents=True, exist_ok=True)
    source, packed = out / "weights.safetensors", out / "weights.pared"
    save_file(tensors, source)
    start = time.process_time()
    codec.pack(source, packed)
    encoding = time.process_time() - start
    decoding = []
    for _ in range(repeats):
        start = time.process_time()
        contents = dict(codec.PackedFile(packed).contents())
        decoding.append(time.process_time() - start)
    reader = codec.PackedFile(packed)
    same = all(contents[index] == tensors[tensor.name].tobytes() for index, tensor in enumerate(reader.tensors))
    codec.pack(source, out / "huffman.pared", "huffman")
    return {
        "weights": sum(tensor.size for tensor in tensors.values()),
        "pared": {
            "bytes": packed.stat().st_size, "of_them_head": reader.head_bytes, "encode_seconds": encoding,
            "decode_seconds": min(decoding), "same": same,
        },
        "nncodec": nncodec(tensors, out, python, repeats),
        "entropy": {"bytes": math.ceil(sum(entropy(tensor) for tensor in tensors.values()) / 8)},
        "huffman": {"bytes": (out / "huffman.pared").stat().st_size},
        "zstandard": {"bytes": len(frames.pack(b"".join(small(tensor).tobytes() for tensor in tensors.values())))},
    }  # fmt: skip


def nncodec(tensors: Integers, out: Path, python: str, repeats: int) -> dict[str, Any]:
    """What the other coder needs, in an environment of its own on one thread.

    Raises:
        ModelError: if it fails.
    """
    np.savez(out / "weights.npz", **tensors)  # pyright: ignore[reportArgumentType]
    command = [python, str(worker.__file__), str(out / "weights.npz"), str(repeats)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)
    if done.returncode:
        raise ModelError(f"lab.against_nncodec: {python} can't run nncodec: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def entropy(tensor: np.ndarray) -> float:
    """Bits of a tensor's integers, each independent of the others, without any table.

    >>> entropy(np.array([1, 1, 2, 3]))
    6.0
    """
    _, counts = np.unique(tensor, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def small(tensor: np.ndarray) -> np.ndarray:
    """Integers in one byte each where they fit, else in two."""
    return tensor.astype(np.int8 if np.abs(tensor).max(initial=0) < 128 else np.int16)


def _check(python: str) -> None:
    if not Path(python).is_file():
        raise ModelError(
            f"lab.against_nncodec needs nncodec in an environment of its own, and there is no {python}. Run: "
            "python -m venv venv-nncodec && venv-nncodec/bin/pip install 'numpy<2' nncodec==2.1.3, "
            "or say where its Python is: --set python=PATH"
        )


EXPERIMENT = AgainstNncodec()
