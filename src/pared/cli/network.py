"""`pared profile` and `pared plan`: look at a network without changing it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import typer
from rich.table import Table
from rich.text import Text
from torch import nn

from pared import codec, graph, prune
from pared.architecture import nets
from pared.architecture.load import load_model
from pared.cli.setting import load_task, model_for, print_json
from pared.core.seeds import seed_everything
from pared.measure import file_metric, latency, layer_times, packed
from pared.report import print_table
from pared.runtime import export
from pared.training import Task


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network on the CPU, an example for it, and the task, where one was named."""

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    raw: tuple[torch.Tensor, ...]
    task: Task | None


def subject(spec: str, data: str | None, weights: Path | None, seed: int) -> Subject:
    """Load MODEL in the shapes of DATA; without DATA in those that its paper used, which are the defaults of `nets`, or as of ImageNet."""
    if data is not None:
        task = load_task(data, seed)
        inputs = tuple(part.cpu() for part in task.example_inputs())
        raw = tuple(part.cpu() for part in dataclasses.replace(task, normalize=None).example_inputs())
        return Subject(model_for(spec, task, weights, seed), inputs, raw, task)
    shape = {"classes": 1000, "channels": 3, "size": 224}
    if spec in nets.__all__:
        shape = {name: getattr(nets, spec).__kwdefaults__[name] for name in shape}
    seed_everything(seed)
    model = load_model(spec, **shape, weights=weights)
    inputs = (torch.rand(2, shape["channels"], shape["size"], shape["size"]),)
    return Subject(model, inputs, inputs, None)


def show_profile(spec: str, data: str | None, weights: Path | None, *, seed: int, json: bool) -> int:
    """Print parameters, MACs, bytes and time by layer, and size and latency of the exported file."""
    found = subject(spec, data, weights, seed)
    counts = graph.count(found.model, found.inputs)
    normalize = found.task.normalize if found.task is not None else None
    layers = _layers(found, counts, layer_times(found.model, found.raw, normalize))
    with tempfile.TemporaryDirectory() as folder:
        path = export(found.model, found.raw, Path(folder) / "model.onnx", normalize=normalize)
        time = latency({"model": path}, tuple(part[:1] for part in found.raw), quick=True)["model"]
        small = codec.inspect(packed(path))
        whole: dict[str, Any] = {
            "params": counts.params, "nonzero": counts.nonzero, "macs": counts.macs, "file_bytes": path.stat().st_size,
            "wire_bytes": small.total, "program_bytes": small.program, "latency_ms": time.to_dict(),
        }  # fmt: skip
        if found.task is not None and weights is not None:
            metric = found.task.metric.name
            whole["metric"] = {"name": metric, "value": file_metric(path, found.task, "test"), "split": "test", "file": path.name}
    if json:
        print_json({"model": spec, "layers": layers, **whole})
        return 0
    print_table(_table(layers, whole))
    typer.echo(
        f"File: {whole['file_bytes']:,} bytes, packed {small.total:,} (program {small.program:,}, weights {small.total - small.program:,})."
    )
    typer.echo(f"Latency: {time.median:.4f} ms (median), {time.p90:.4f} ms (p90); one sample, {time.threads} thread, {time.engine}.")
    if "metric" in whole:
        typer.echo(f"{whole['metric']['name'].capitalize()}: {whole['metric']['value']:.4f} on the test split, read from the file.")
    return 0


def _layers(found: Subject, counts: graph.Counts, times: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each module that owns parameters, multiplies or takes time, in the model's order; the rest of the time comes last."""
    modules = dict(found.model.named_modules())
    counted = {each.path: each for each in counts.modules}
    rows = []
    for path in [*(path for path in modules if path), *(path for path in counted if path not in modules), ""]:
        each, time = counted.get(path), times.get(path)
        if time is None and (each is None or not (each.params or each.macs)):
            continue
        bytes_ = sum(tensor.nbytes for tensor in modules[path].parameters(recurse=False)) if path in modules else 0
        numbers = (each.params, each.nonzero, each.macs) if each is not None else (0, 0, 0)
        rows.append({"path": path, **dict(zip(("params", "nonzero", "macs"), numbers, strict=True)), "bytes": bytes_, "milliseconds": time})
    return rows


def show_plan(spec: str, data: str | None, *, seed: int, json: bool) -> int:
    """Print what can be cut and what can't, and why."""
    found = subject(spec, data, None, seed)
    plan = prune.plan(found.model, found.inputs)
    if json:
        print_json(plan.to_dict())
    else:
        typer.echo(str(plan))
    return 0


def _table(layers: list[dict[str, Any]], whole: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Layer", no_wrap=True)
    for title in ("Parameters", "MACs", "Bytes", "Time (ms)"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in layers:
        time = "" if layer["milliseconds"] is None else f"{layer['milliseconds']:.4f}"
        table.add_row(Text(layer["path"] or "(between layers)"), *(f"{layer[name]:,}" for name in ("params", "macs", "bytes")), time)
    total = [f"{whole['params']:,}", f"{whole['macs']:,}", f"{sum(layer['bytes'] for layer in layers):,}"]
    table.add_row("whole network", *total, f"{whole['latency_ms']['median']:.4f}", style="bold")
    return table
