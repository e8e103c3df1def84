"""The committed results keep what the README says of them, to the digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pared.recipe import read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = {"lenet5-small": "LeNet-5, Fashion-MNIST", "resnet20-small": "ResNet-20, Fashion-MNIST"}


def row(name: str) -> str:
    """The line of the README's table for a committed run."""
    found = json.loads((RESULTS / name / "result.json").read_text())
    before, after, ratios = found["original"], found["compressed"], found["ratios"]
    accuracy = [100 * profile["metric"]["value"] for profile in (before, after)]
    time = [profile["latency_ms"]["median"] for profile in (before, after)]
    return (
        f"| {RUNS[name]} | {accuracy[0]:.2f} % → {accuracy[1]:.2f} % "
        f"| {before['file_bytes']:,} → {after['file_bytes']:,} ({ratios['file_bytes']:.1f} times smaller) "
        f"| {time[0]:.3f} → {time[1]:.3f} ({ratios['latency']:.1f} times faster) "
        f"| {before['macs'] / 1e6:.2f} → {after['macs'] / 1e6:.2f} million |"
    )


@pytest.mark.parametrize("name", RUNS)
def test_the_readme_says_what_was_measured(name: str) -> None:
    assert row(name) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_a_committed_run_carries_its_recipe_and_its_environment(name: str) -> None:
    folder = RESULTS / name
    assert read(ROOT / "recipes" / f"{name}.yaml") == read(folder / "recipe.yaml")
    environment = json.loads((folder / "environment.json").read_text())
    assert {"processor", "training threads", "torch", "onnxruntime", "date"} <= set(environment)
    assert (folder / "report.html").stat().st_size > 10_000
