"""How far can a latency ratio be believed? Time a file against itself, and against the same network at half its width and in int8.

    python benchmarks/a_a.py [--repeats 10] [--threads 1] [--out benchmarks/results]

Two sessions of one file should take equally long: what their ratio strays from 1 is the error of every other ratio measured this
way. The result is written to a_a.json in the results folder, with versions and processor. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from torch import Tensor, nn

from pared.core.files import write_atomic
from pared.measure import Latency, latency
from pared.quantize import Int8
from pared.runtime import export
from pared.training import Task


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(body(x) + shortcut(x))."""
        return torch.relu(self.body(x) + self.shortcut(x))


def network(width: int) -> nn.Module:
    """A residual network of 14 convolutions for 32 x 32 images, with 1, 2 and 4 times `width` channels; random weights."""
    blocks = [Block(width, width, 1), Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1)]
    blocks += [Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *blocks, *head).eval()


def compare(files: dict[str, Path], repeats: int, threads: int) -> dict[str, Any]:
    """Time two files `repeats` times; the ratio of the first to the second, by medians and by minima."""
    runs: list[dict[str, Latency]] = [latency(files, torch.zeros(1, 3, 32, 32), threads) for _ in range(repeats)]
    first, second = files
    ratios = [run[first].median / run[second].median for run in runs]
    minima = [run[first].minimum / run[second].minimum for run in runs]
    return {
        "files": [first, second],
        "milliseconds": [statistics.median(run[name].median for run in runs) for name in files],
        "ratio_of_medians": _spread(ratios),
        "ratio_of_minima": _spread(minima),
        "quiet": [all(entry.quiet for entry in run.values()) for run in runs],
    }


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios), "deviation": statistics.pstdev(ratios)}


def machine() -> dict[str, Any]:
    """Versions and processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models) or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": numpy.__version__,
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = [(torch.rand(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))]
    original, half = network(32), network(16)
    small = Int8(calibration=64)(original, Task(images, images, images))
    with tempfile.TemporaryDirectory() as folder:
        example = torch.zeros(1, 3, 32, 32)
        files = {
            name: export(model, example, Path(folder) / f"{name}.onnx")
            for name, model in (("original", original), ("half", half), ("int8", small))
        }
        pairs = {
            "a_a": {"original": files["original"], "original again": files["original"]},
            "half_width": {"original": files["original"], "half width": files["half"]},
            "int8": {"original": files["original"], "int8": files["int8"]},
        }
        result: dict[str, Any] = {name: compare(pair, options.repeats, options.threads) for name, pair in pairs.items()}
        result["file_bytes"] = {name: file.stat().st_size for name, file in files.items()}
    result |= {"machine": machine(), "threads": options.threads, "repeats": options.repeats}
    write_atomic(options.out / "a_a.json", json.dumps(result, indent=2) + "\n")
    for name in pairs:
        ratio = result[name]["ratio_of_medians"]
        print(f"{name}: {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['greatest']:.3f}), deviation {ratio['deviation']:.4f}")


if __name__ == "__main__":
    main()
