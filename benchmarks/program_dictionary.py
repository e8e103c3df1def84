"""Make the dictionary that programs in `.pared` files are packed with: the one in the package was made by this script, once.

The samples are programs of reference networks in float and int8 and headers of safetensors files. Another dictionary would be
another format: files packed with one can't be read with the other.

    python benchmarks/program_dictionary.py src/pared/codec/program.dictionary
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
import zstandard
from safetensors.torch import save_file
from torch import nn

from pared import quantize, runtime
from pared.architecture import nets
from pared.codec import onnx_program, safetensors_program
from pared.training import Task

SIZE = 12_288
"""Bytes of the dictionary: programs of small networks gain little from more, and each process that reads a file loads it."""

NAMES = ("lenet300", "lenet5", "resnet8", "resnet20", "vgg_small", "mobilenet_v2", "squeezenet1_1")


def main(target: str) -> None:
    """Write the dictionary to `target`."""
    torch.manual_seed(0)
    samples = list(programs())
    trained = zstandard.train_dictionary(SIZE, samples, level=19)
    Path(target).write_bytes(trained.as_bytes())
    print(f"{len(samples)} samples of {sum(map(len, samples)):,} bytes, {len(trained.as_bytes()):,} bytes")


def programs() -> Iterator[bytes]:
    """The programs and headers to learn from."""
    for name in NAMES:
        if not hasattr(nets, name):
            continue
        for channels, size in ((1, 28), (3, 32)):
            for classes in (10, 100):
                model = getattr(nets, name)(classes=classes, channels=channels, size=size).eval()
                task = _task(channels, size)
                for network in (model, *([quantize.Int8(calibration=8)(model, task)] if classes == 10 else [])):
                    yield from _both(network, torch.rand(2, channels, size, size))
    yield from _both(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)), torch.rand(2, 8))
    yield from _both(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.rand(2, 5, 16))


def _task(channels: int, size: int) -> Task:
    batches = [(torch.rand(8, channels, size, size), torch.zeros(8, dtype=torch.long))]
    return Task(batches, batches, batches)


def _both(network: nn.Module, inputs: torch.Tensor) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = runtime.export(network.eval(), inputs, Path(folder) / "x.onnx")
        yield onnx_program.split(onnx.load(str(path)), "x").program
        if all(value.dtype == torch.float32 for value in network.state_dict().values()):
            save_file({name: value.contiguous() for name, value in network.state_dict().items()}, Path(folder) / "x.safetensors")
            yield safetensors_program.split(Path(folder) / "x.safetensors").program


if __name__ == "__main__":
    main(sys.argv[1])
