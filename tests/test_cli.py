"""The command line: what it accepts, what it prints, and with which status it ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from pared import __version__
from pared.cli.main import app

MINE = """
import torch
from torch import nn
from pared.training import Task

def net(classes):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, classes))

def data(seed):
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(96, 6, generator=generator)
    targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)
    batches = list(zip(inputs.split(16), targets.split(16)))
    return Task(batches[:4], batches[4:5], batches[5:], name="mine")
"""
RECIPE = "train: {epochs: 2, learning_rate: 0.01}\nsteps:\n  - prune.weights: {keep: 0.5}\n"


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    """Timing for the sake of the fields, not of the numbers."""
    with pytest.MonkeyPatch.context() as patch:
        timing = importlib.import_module("pared.measure.latency")
        patch.setattr(timing, "WARM_UP", 0.0)
        patch.setattr(timing, "FOREIGN", float("inf"))
        yield


def pared(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def compress(folder: Path, *arguments: str | Path, recipe: str = RECIPE, out: str = "run") -> Result:
    (folder / "mine.py").write_text(MINE)
    (folder / "recipe.yaml").write_text(recipe)
    return pared(
        "compress", f"{folder}/mine.py:net", "--data", f"{folder}/mine.py:data", "--recipe", folder / "recipe.yaml", "-o", folder / out,
        "--quick", "--no-baselines", "--device", "cpu", "--threads", "1", *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with a finished run, and how the command ended."""
    folder = tmp_path_factory.mktemp("cli")
    return folder, compress(folder, "--json", "--drop", "100%")


def test_compress_prints_result_json(done: tuple[Path, Result]) -> None:
    folder, found = done
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    assert printed == json.loads((folder / "run" / "result.json").read_text())
    assert (printed["met"], printed["budget"]["drop"]) == (True, 1.0)
    assert "[1/1] 01-prune.weights" in found.stderr
    assert (folder / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_compress_again(done: tuple[Path, Result]) -> None:
    folder, _ = done
    refused = compress(folder, "--drop", "100%")
    assert refused.exit_code == 2
    assert (
        refused.stderr
        == f"pared: {folder}/run: holds a run already (finished). Go on with --resume (resume=True), or choose another directory.\n"
    )
    resumed = compress(folder, "--drop", "100%", "--resume", "--quiet")
    assert (resumed.exit_code, resumed.stderr) == (0, "")
    assert "Parameters" in resumed.stdout
    assert "The budget is met." in resumed.stdout
    assert f"Report: {folder}/run/report.html" in resumed.stdout


def test_a_budget_that_is_not_met(done: tuple[Path, Result]) -> None:
    folder, _ = done
    missed = compress(folder, "--size", "1kB", "--drop", "100%", "--quiet", out="missed")
    assert missed.exit_code == 1
    assert "The budget is not met: size." in missed.stdout
    assert json.loads((folder / "missed" / "result.json").read_text())["met"] is False


def test_bench(done: tuple[Path, Result]) -> None:
    folder, _ = done
    found = pared("bench", folder / "run", "--quick")
    assert found.exit_code == 0, found.output
    assert [line.split()[0] for line in found.stdout.splitlines()] == ["original", "small", "ratio"]
    printed = json.loads(pared("bench", folder / "run", "--quick", "--json", "--threads", "2").stdout)
    assert printed["small"]["threads"] == 2
    assert printed["ratio"] == pytest.approx(printed["original"]["median"] / printed["small"]["median"])
    missing = pared("bench", folder)
    assert missing.exit_code == 2
    assert "result.json: is not there" in missing.stderr


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("steps: [prune.weights: {keep: 2}]", (), "recipe.yaml:1: prune.weights: keep must be"),
        ("steps: [prune.weight]", (), "did you mean prune.weights?"),
        ("steps: [prune.weights]", (), "has no `train:`"),
        (RECIPE, ("--size", "small"), "--size: a"),
        (RECIPE, ("--precision", "3"), "precision must be one of"),
        (RECIPE, ("--weights", "none.safetensors"), "none.safetensors: no such file"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, recipe: str, arguments: tuple[str, ...], message: str) -> None:
    found = compress(tmp_path, *arguments, recipe=recipe)
    assert found.exit_code == 2
    assert message in found.stderr
    assert "Traceback" not in found.output
    assert not (tmp_path / "run").exists()


def test_neither_recipe_nor_limits() -> None:
    found = pared("compress", "lenet300", "--data", "digits", "-o", "nowhere")
    assert found.exit_code == 2
    assert "give --recipe FILE, or at least one of --size, --latency and --drop" in found.stderr
    assert pared("compress", "lenet300").exit_code == 2
    assert pared("carve").exit_code == 2


def test_unknown_names() -> None:
    assert "lenet6: no such model. Did you mean" in pared("profile", "lenet6").stderr
    found = pared("profile", "lenet300", "--data", "digit")
    assert (found.exit_code, "Did you mean digits?" in found.stderr) == (2, True)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("pared.cli.compress"), "run", stopped)
    monkeypatch.setattr(sys, "argv", ["pared", "compress", "my net", "-o", "run"])
    found = compress(tmp_path)
    assert found.exit_code == 130
    assert found.stderr == "pared: stopped. Go on with: pared compress 'my net' -o run --resume\n"


def test_profile_counts_by_layer() -> None:
    found = json.loads(pared("profile", "lenet300", "--data", "digits", "--json").stdout)
    assert [(layer["path"], layer["params"], layer["macs"], layer["bytes"]) for layer in found["layers"] if layer["params"]] == [
        ("fc1", 64 * 300 + 300, 64 * 300, 4 * 19500),
        ("fc2", 300 * 100 + 100, 300 * 100, 4 * 30100),
        ("fc3", 100 * 10 + 10, 100 * 10, 4 * 1010),
    ]
    assert found["params"] == 50610
    assert found["file_bytes"] > 4 * (50610 - 410)  # fresh biases are zeros, which the file leaves out
    table = pared("profile", "lenet300")
    assert ["whole", "network", "266,610", "266,200", "1,066,440"] in [line.split()[:5] for line in table.stdout.splitlines()]
    assert "Latency:" in table.stdout


def test_plan_names_what_can_be_cut() -> None:
    found = pared("plan", "lenet300", "--data", "digits")
    assert found.exit_code == 0
    assert "fc1: 300 neurons" in found.stdout
    assert "fc3: 10 outputs" in found.stdout
    assert [entry["neurons"] for entry in json.loads(pared("plan", "lenet300", "--json").stdout)["classes"]] == [300, 100]


def test_demo_keeps_off_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    found = pared("demo", "-o", tmp_path)
    assert found.exit_code == 2
    assert "is not empty" in found.stderr


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    found = pared("demo", "-o", tmp_path / "demo", "--json", "--quiet")
    assert found.exit_code == 0, found.output
    runs = json.loads(found.stdout)["runs"]
    assert list(runs) == ["pruning", "distillation", "quantization", "low-rank", "early-exits", "combined"]
    assert all(run["compressed"]["metric"]["value"] > 0.9 for run in runs.values())
    assert runs["combined"]["ratios"]["file_bytes"] > 20
    assert runs["early-exits"]["ratios"]["macs"] > 1.1
    assert (tmp_path / "demo" / "report.html").exists()


def test_help_is_quick_and_the_module_is_the_command() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # the time itself is the machine's; what makes it long is imports, which test_house looks at
    found = subprocess.run(
        [sys.executable, "-m", "pared", "--help"], capture_output=True, text=True, env=environment, timeout=20, check=True
    )
    assert all(command in found.stdout for command in ("demo", "compress", "profile", "plan", "bench"))
    assert pared("--version").stdout == f"{__version__}\n"


def test_threads_are_set(done: tuple[Path, Result]) -> None:
    assert done
    from pared.cli.setting import use_threads

    use_threads(2)
    assert torch.get_num_threads() == 2
    use_threads(None)
    assert torch.get_num_threads() == 2
