"""Small networks on small pictures: int8 and fewer bits from the file, and what rounding does to the outputs of every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pared import data
from pared.architecture.nets import lenet5, resnet20
from pared.core.layers import compressible, split_weight
from pared.core.seeds import seed_everything
from pared.graph.fold_layers import fold_layers
from pared.lab.claims import fewer
from pared.lab.int8_against_peers.cpu_time import cpu_milliseconds
from pared.measure import file_metric, sample_inputs
from pared.measure.deployed import deploy
from pared.quantize import Int8, Integers, adaround, gptq, round_to_nearest, row_scales
from pared.quantize.row_rounding import row_errors
from pared.runtime import Engine
from pared.training import Task, Train
from pared.training.layer_inputs import execution_order, layer_gram
from pared.training.samples import first_inputs

NETS: Mapping[str, Callable[..., nn.Module]] = {"lenet5": lenet5, "resnet20": resnet20}
FEW_BITS = (("lsq", 4), ("lsq", 2), ("pact", 2), ("dorefa", 2))
ROUNDED_BITS = (4, 3)


@dataclass(frozen=True)
class Plan:
    """How long is trained, and on how much.

    Attributes:
        epochs: of the float network.
        tune: of networks of few bits, from the float one.
        samples: that both are trained on.
        calibration: that ranges are measured on.
    """

    epochs: int
    tune: int
    samples: int
    calibration: int


def measure(net: str, seed: int, plan: Plan, folder: Path, *, few_bits: bool) -> dict[str, Any]:
    """A trained network, its int8 file, and with `few_bits` files of fewer bits and the errors of rounded layers."""
    seed_everything(seed)
    task = fewer(data.load("fashion-mnist", seed), plan.samples, seed)
    network = NETS[net](channels=1)
    task.tune(network, Train(epochs=plan.epochs))
    files = {"float": deploy(network, task, folder / "float.onnx")}
    small = Int8(calibration=plan.calibration)(network, task)
    files["int8"] = deploy(small, task, folder / "int8.onnx")
    row: dict[str, Any] = {"same": agreement(small, files["int8"], task), "layers": []}
    if few_bits:
        row["layers"] = layer_errors(network, task, plan.calibration)
        for method, bits in FEW_BITS:
            seed_everything(seed)
            few = Integers(bits, bits, method, Train(epochs=plan.tune), calibration=plan.calibration)(network, task)  # type: ignore[arg-type]
            files[f"{method} {bits}"] = deploy(few, task, folder / f"{method}-{bits}.onnx")
            row["same few"] = min(agreement(few, files[f"{method} {bits}"], task), row.get("same few", 1.0))
    row["test"] = {name: round(100 * (1 - file_metric(file, task, "test")), 2) for name, file in files.items()}
    row["bytes"] = {name: file.stat().st_size for name, file in files.items()}
    row["ms"] = cpu_milliseconds({name: files[name] for name in ("float", "int8")}, sample_inputs(task, "valid", 1)[0])
    return row


def agreement(model: nn.Module, file: Path, task: Task) -> float:
    """The share of test samples of which a module and its file say the same class."""
    engine, same, count = Engine(file), 0, 0
    with torch.no_grad():
        for inputs, _ in task.test:
            ours = model(*task.prepare(inputs)).argmax(1).numpy()
            theirs = engine.run(inputs.numpy())[0].argmax(1)
            same, count = same + int((ours == theirs).sum()), count + len(theirs)
    return same / count


def layer_errors(network: nn.Module, task: Task, samples: int) -> list[dict[str, Any]]:
    """Of every layer: the squared error of its outputs as a share of their squares, for three ways to round to the same grid.

    Batch norms are folded first. Layers are looked at one by one, on the inputs that the float network gives them.
    """
    batches = first_inputs(task, samples, "they show what rounding does")
    folded = fold_layers(network, tuple(part[:2] for part in batches[0])).eval()
    layers = compressible(folded, (), "lab")
    found = []
    for path in execution_order(folded, layers, batches[0]):
        rows = split_weight(layers[path], layers[path].weight.detach()).flatten(2)
        gram = layer_gram(folded, path, layers[path], batches)
        whole = float(((rows.double() @ gram) * rows.double()).sum())
        for bits in ROUNDED_BITS:
            found.append({"layer": path, "bits": bits, **_errors(rows, gram, 2 ** (bits - 1) - 1, whole)})
    return found


def _errors(rows: Tensor, gram: Tensor, limit: int, whole: float) -> dict[str, float]:
    scales = row_scales(rows, limit, gram.diagonal(dim1=1, dim2=2))
    ways = {
        "nearest": round_to_nearest(rows, scales, -limit, limit),
        "adaround": adaround(rows, gram, scales, -limit, limit),
        "gptq": gptq(rows, gram, scales, -limit, limit),
    }
    return {name: float(np.float32(float(row_errors(rows, integers, gram, scales).sum()) / whole)) for name, integers in ways.items()}
