"""How near to entropy does the codec come, and how fast is it? Independent symbols, trained weights, and whole files, on one thread.

    python benchmarks/codec.py [--repeats 7] [--count 4000000] [--out benchmarks/results]

Three parts:

- Independent symbols of several distributions: bytes of the static and the adaptive coding against the empirical entropy, and megabytes of
  float32 weights (four bytes a symbol) that are coded and decoded in a second.
- A LeNet-300-100 for Fashion-MNIST that is trained with the price on its bits for `--epochs` epochs: bytes of its packed weights against
  the zeroth-order entropy of its tensors.
- The same symbols by zstandard at level 19 and 3 and by zlib, as bytes, in the same run, in turn: what the ratio of speeds refers to.

The result is written to codec.json in the results folder, with versions and processor. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from a_a import machine
from numpy.typing import NDArray

from pared.architecture.nets import lenet300
from pared.codec import integers
from pared.codec.cursor import Cursor
from pared.codec.integers import Coding
from pared.core.files import write_atomic
from pared.lab.packed import dark_task, packed_row
from pared.quantize import Rate
from pared.training import Train

Symbols = NDArray[np.int32]
ROWS = 1000
MEGABYTE = 1e6


def entropy(symbols: NDArray[Any]) -> float:
    """Bytes of so many independent symbols at their own frequencies."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / symbols.size)).sum() / 8)


def distributions(count: int) -> dict[str, Symbols]:
    """Matrices of independent symbols, as quantized weights have them."""
    rng = np.random.default_rng(0)
    shape = (ROWS, count // ROWS)
    signs = rng.choice([-1, 1], shape)
    found = {
        "ternary, 5 % not zero": signs * (rng.random(shape) < 0.05),
        "ternary, 30 % not zero": signs * (rng.random(shape) < 0.3),
        "sparse, 8 % not zero, geometric": signs * (rng.random(shape) < 0.08) * rng.geometric(0.4, shape),
        "4 bits, normal": np.clip(np.rint(rng.normal(0, 2.2, shape)), -7, 7),
        "8 bits, normal": np.clip(np.rint(rng.normal(0, 30, shape)), -127, 127),
        "8 bits, Laplace": np.clip(np.rint(rng.laplace(0, 12, shape)), -127, 127),
    }
    return {name: values.astype(np.int32) for name, values in found.items()}


def timed(call: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def ways(matrix: Symbols) -> dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any]]]:
    """Coders by name: of the matrix to bytes, and back."""
    small = matrix.astype(np.int8 if np.abs(matrix).max(initial=0) < 128 else np.int32).tobytes()

    def ours(coding: Coding) -> tuple[Callable[[], bytes], Callable[[bytes], Any]]:
        return lambda: integers.encode(matrix, coding), lambda data: integers.decode(Cursor(data, "x"), matrix.shape, coding)

    return {
        "static": ours(Coding.STATIC),
        "runs, static": ours(Coding.RUNS_STATIC),
        "adaptive": ours(Coding.ADAPTIVE),
        "zstd -19": (lambda: zstandard.ZstdCompressor(19).compress(small), lambda data: zstandard.ZstdDecompressor().decompress(data)),
        "zstd -3": (lambda: zstandard.ZstdCompressor(3).compress(small), lambda data: zstandard.ZstdDecompressor().decompress(data)),
        "zlib -6": (lambda: zlib.compress(small, 6), zlib.decompress),
    }


def measure(matrix: Symbols, repeats: int) -> dict[str, Any]:
    """Bytes and speed of all coders, in turn."""
    coders, ideal = ways(matrix), entropy(matrix)
    data = {name: encode() for name, (encode, _) in coders.items()}
    for name, (_, decode) in coders.items():
        decode(data[name])
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in coders}
    for _ in range(repeats):
        for name, (encode, decode) in coders.items():
            if name != "zstd -19" or not seconds[name][0]:  # half a minute each time
                seconds[name][0].append(timed(encode))
            seconds[name][1].append(timed(lambda name=name, decode=decode: decode(data[name])))
    amount = 4 * matrix.size / MEGABYTE
    coded = {
        name: {
            "bytes": len(data[name]),
            "of_entropy": round(len(data[name]) / ideal, 5),
            "encode_mb_s": round(amount / statistics.median(seconds[name][0]), 1),
            "decode_mb_s": round(amount / statistics.median(seconds[name][1]), 1),
        }
        for name in coders
    }
    return {"symbols": matrix.size, "entropy_bytes": round(ideal), "coders": coded}


def trained(epochs: int, price: float) -> dict[str, Any]:
    """Bytes of a rate-aware network's weights against the zeroth-order entropy of its tensors, and its accuracy."""
    task, network = dark_task("fashion-mnist", 0), lenet300()
    task.tune(network, Train(epochs=8))
    small = Rate(price=price, train=Train(epochs=epochs))(network, dataclasses.replace(task, teacher=network))
    with tempfile.TemporaryDirectory() as folder:
        row = packed_row(small, task, Path(folder))
    return {**row, "of_entropy": round(row["weights"] / row["entropy"], 4)}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--count", type=int, default=4_000_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--price", type=float, default=6e-6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result: dict[str, Any] = {name: measure(matrix, options.repeats) for name, matrix in distributions(options.count).items()}
    for name, each in result.items():
        print(f"{name}: {each['entropy_bytes']:,} bytes of entropy")
        for coder, figures in each["coders"].items():
            print(
                f"  {coder:13} {figures['bytes']:>10,}  {figures['of_entropy']:.4f} of entropy  "
                f"{figures['encode_mb_s']:>8.1f} MB/s  {figures['decode_mb_s']:>8.1f} MB/s back"
            )
    network = trained(options.epochs, options.price)
    print(f"trained with the contexts: {network['weights']:,} bytes, {network['of_entropy']:.3f} of the zeroth-order entropy")
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    settings = {"repeats": options.repeats, "count": options.count, "epochs": options.epochs, "price": options.price}
    whole = {"independent": result, "trained": network, "machine": machine(), **settings, "load": load_average}
    write_atomic(options.out / "codec.json", json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
