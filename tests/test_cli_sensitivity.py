"""`pared plan --sensitivity`: what it prints and draws, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pared.cli.main import app

MINE = """
import torch
from torch import nn
from pared.training import Task

def net(classes):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, classes))

def data(seed):
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(32, 6, generator=generator)
    targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)
    batches = list(zip(inputs.split(16), targets.split(16)))
    return Task(batches, batches, batches, name="mine")
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def plan(folder: Path, *arguments: str | Path, data: bool = True) -> Result:
    given = ["--data", f"{folder}/mine.py:data"] if data else []
    return CliRunner().invoke(app, ["plan", f"{folder}/mine.py:net", *given, *map(str, arguments)])


def test_table_picture_and_progress(mine: Path) -> None:
    found = plan(mine, "--sensitivity", "--picture", mine / "lost.svg")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].startswith("accuracy on the validation split 0.")
    assert lines[0].endswith(", 144 MACs; one class cut at a time")
    assert lines[1].split("  ")[0] == "layers"
    assert all(f"keep {share} %" in lines[1] for share in (75, 50, 25))
    assert [part in lines[2] for part in ("(75 % MACs)", "(50 % MACs)", "(25 % MACs)")] == [True] * 3
    assert lines[3] == f"Picture: {mine / 'lost.svg'}"
    assert "[1/1] 0" in found.stderr
    assert "the weights are those that MODEL comes with" in found.stderr
    assert (mine / "lost.svg").read_text().startswith("<?xml")


def test_json_and_weights(mine: Path) -> None:
    weights = {
        "0.weight": torch.zeros(16, 6),
        "0.bias": torch.ones(16),
        "2.weight": torch.zeros(3, 16),
        "2.bias": torch.tensor([1.0, 0, 0]),
    }
    torch.save(weights, mine / "weights.pt")
    found = plan(mine, "--sensitivity", "--shares", "0.5", "--weights", mine / "weights.pt", "--json")
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    assert printed["model"].endswith("mine.py:net")
    assert printed["shares"] == [0.5]
    assert printed["classes"][0]["points"] == [{"share": 0.5, "neurons": 8, "metric": printed["original"], "macs": 72}]
    assert "MODEL comes with" not in found.stderr


def test_mistakes_are_said_before_anything_is_measured(mine: Path) -> None:
    cases = {
        "goes with --sensitivity": plan(mine, "--shares", "0.5"),
        "--picture goes with": plan(mine, "--picture", "a.svg"),
        "--weights goes with": plan(mine, "--weights", "a.pt"),
        "--sensitivity needs --data": plan(mine, "--sensitivity", data=False),
        "numbers between 0 and 1": plan(mine, "--sensitivity", "--shares", "0.5,2"),
        "such as 0.75,0.5,0.25. Got 'half'": plan(mine, "--sensitivity", "--shares", "half"),
        "Got ''": plan(mine, "--sensitivity", "--shares", ""),
        "ends in .svg or .png": plan(mine, "--sensitivity", "--picture", "a.pdf"),
        "no such folder": plan(mine, "--sensitivity", "--picture", mine / "nowhere" / "a.svg"),
    }
    for words, found in cases.items():
        assert found.exit_code == 2, (words, found.output)
        assert found.stderr.startswith("pared: "), words
        assert words in found.stderr, (words, found.stderr)
        assert found.stdout == ""


def test_the_plan_alone_is_as_before(mine: Path) -> None:
    found = plan(mine)
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith("can be cut:\n  0: 16 neurons")
