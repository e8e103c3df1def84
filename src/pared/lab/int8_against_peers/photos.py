"""EfficientNet-Lite0 made int8 by four tools from the same crops of photos, and convolutions of the sizes of ResNet-18."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pared.core.seeds import seed_everything
from pared.lab.int8_against_peers.cpu_time import cpu_milliseconds
from pared.lab.int8_against_peers.peers import by_nncf, by_onnxruntime, by_torchao, quantized_convolutions, top_one, versions
from pared.lab.repair_without_labels.networks import Sizes, efficientnet
from pared.measure.deployed import deploy
from pared.quantize import Int8, Rounding
from pared.runtime import Engine, export, saturates
from pared.training import Task

BATCH = 8
VALIDATION = 64
CONVOLUTIONS = {"64 channels, 56 x 56": (64, 56), "128, 28 x 28": (128, 28), "256, 14 x 14": (256, 14), "512, 7 x 7": (512, 7)}
DEPTH = 3


def measure(seed: int, calibration: int, rounding: int, evaluation: int, folder: Path) -> dict[str, Any]:
    """Agreement with the original's class on crops that nothing else looks at; bytes, and processor time of a picture.

    Of pared's two ways the agreement on validation crops is noted too, by which one is chosen.
    """
    net = efficientnet()
    task = net.task(Sizes(calibration, VALIDATION, evaluation), seed)
    batches = [inputs[0] for inputs, _ in task.train]
    crops, others = (torch.cat([inputs[0] for inputs, _ in split]) for split in (task.test, task.valid))
    original = deploy(net.model, task, folder / "original.onnx")
    expected, known = answers(original, crops), answers(original, others)

    def rounded_first() -> nn.Module:
        """Weights of 7 bits by GPTQ, biases corrected, on the very grids that int8 takes."""
        bits = 7 if saturates() else 8
        rounded = Rounding(bits=bits, scales="minmax", samples=rounding)(net.model, task)
        return Int8(calibration=calibration, method="mse")(rounded, task)

    makers: dict[str, Callable[[], Path]] = {
        "pared, int8": lambda: deploy(Int8(calibration=calibration)(net.model, task), task, folder / "pared.onnx"),
        "pared, rounding and int8": lambda: deploy(rounded_first(), task, folder / "pared-rounded.onnx"),
        "onnxruntime": lambda: by_onnxruntime(original, batches, folder / "onnxruntime.onnx"),
        "nncf": lambda: by_nncf(original, batches, folder / "nncf.onnx"),
    }
    arms: dict[str, dict[str, Any]] = {}
    files = {"original": original}
    for name, make in makers.items():
        begin = time.process_time()
        files[name] = make()
        seconds = time.process_time() - begin
        arms[name] = {
            "agreement": agreement(answers(files[name], crops), expected),
            "bytes": files[name].stat().st_size,
            "seconds": seconds,
        }
        if name.startswith("pared"):
            arms[name]["valid"] = agreement(answers(files[name], others), known)
    begin = time.process_time()
    simulated = by_torchao(net.model, [task.prepare(batch)[0] for batch in batches])
    seconds = time.process_time() - begin
    with torch.no_grad():
        scores = torch.cat([simulated(*task.prepare(part)) for part in crops.split(BATCH)])
    arms["torchao"] = {"agreement": agreement(scores.numpy(), expected), "seconds": seconds, "layers": quantized_convolutions(simulated)}
    times = cpu_milliseconds(files, (crops[:1],), calls=30)
    for name, each in times.items():
        arms.setdefault(name, {"bytes": original.stat().st_size})["ms"] = each
    return {
        "arms": {name: {key: round(value, 4) for key, value in arm.items()} for name, arm in arms.items()},
        "versions": dict(versions()),
    }


def answers(file: Path, crops: Tensor) -> np.ndarray:
    """What a file says to crops, in ONNX Runtime."""
    engine = Engine(file)
    return np.concatenate([engine.run(part.numpy())[0] for part in crops.split(BATCH)])


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """The share of samples with the same class.

    >>> agreement(np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]]))
    0.5
    """
    return float((top_one(found) == top_one(expected)).mean())


def convolutions(folder: Path) -> dict[str, dict[str, float]]:
    """Processor time of three 3x3 convolutions with ReLU in a row, in float and in int8, by their size."""
    found = {}
    for name, (channels, side) in CONVOLUTIONS.items():
        seed_everything(0)
        stack = nn.Sequential(*(part for _ in range(DEPTH) for part in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()))).eval()
        x = torch.randn(2, channels, side, side)
        batches = [(x, torch.zeros(2))]
        small = Int8()(stack, Task(batches, batches, batches))
        stem = f"{channels}"
        files = {"float": export(stack, x, folder / f"{stem}-float.onnx"), "int8": export(small, x, folder / f"{stem}-int8.onnx")}
        found[name] = cpu_milliseconds(files, (x[:1],))
    return found
