"""Latency: what is timed, how often, and what is done about other programs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pared.core.errors import DataError, ModelError, RunError, SettingsError
from pared.measure import Latency, latency
from pared.runtime import Engine, export

module = sys.modules["pared.measure.latency"]  # the name in the package is the function


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    large = nn.Sequential(nn.Linear(64, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 4))
    return {
        "large": export(large, torch.zeros(2, 64), folder / "large.onnx"),
        "small": export(nn.Linear(64, 4), torch.zeros(2, 64), folder / "small.onnx"),
    }


def test_fields(files: dict[str, Path]) -> None:
    found = latency(files, torch.zeros(1, 64), quick=True)
    for entry in found.values():
        assert entry.calls >= 60
        assert entry.batch == 1
        assert entry.threads == 1
        assert entry.engine.startswith("onnxruntime 1.")
        assert 0 < entry.minimum <= entry.median
        assert entry.minimum <= entry.p90
        assert set(entry.to_dict()) == {"median", "p90", "batch", "threads", "engine"}
    assert found["large"].median > 3 * found["small"].median  # 2.3 million MACs to 256


def test_interleaving(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = Engine.run

    def run(self: Engine, *arrays: np.ndarray) -> list[np.ndarray]:
        order.append(self.path.stem)
        return original(self, *arrays)

    monkeypatch.setattr(Engine, "run", run)
    monkeypatch.setattr(module, "WARM_UP", 0.0)
    monkeypatch.setattr(module, "FOREIGN", 2.0)
    latency(files, torch.zeros(1, 64), seconds=1e-6)
    assert len(order) == 3 * (
        2 + 20 * 2 * 2
    )  # three sessions: a warm-up call of each, then 20 rounds of an untimed and a timed call of each
    first = order[: len(order) // 3]
    assert first[:2] == ["large", "small"]
    for number in range(20):
        turn = first[2 + 4 * number : 6 + 4 * number]
        assert turn == (["large"] * 2 + ["small"] * 2 if number % 2 == 0 else ["small"] * 2 + ["large"] * 2)


def test_several_inputs_are_averaged() -> None:
    summary = module._summary([[0.001, 0.002, 0.003], [0.010, 0.010, 0.040]], 1, 1)
    assert summary.median == pytest.approx(6.0)
    assert summary.minimum == pytest.approx(5.5)
    assert summary.calls == 6
    assert summary.p90 == pytest.approx(25.0)


def test_disturbed_measurement_is_repeated_once_and_marked(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.5, 0.01, 0.5, 0.2])
    monkeypatch.setattr(module._Load, "foreign", lambda self: next(loads))
    monkeypatch.setattr(module, "WARM_UP", 0.0)
    assert latency({"small": files["small"]}, torch.zeros(1, 64), seconds=1e-3)["small"].quiet
    assert not latency({"small": files["small"]}, torch.zeros(1, 64), seconds=1e-3)["small"].quiet
    assert next(loads, None) is None


def test_own_work_is_not_foreign() -> None:
    load = module._Load()
    begin = load._begin
    if begin is None:
        pytest.skip("the system doesn't tell its load")
    wall, busy, own = begin
    load._begin = (wall - 10, busy - 12, own - 9)  # ten seconds in which all cores worked 12 s, 9 s of them here
    cores = module.os.cpu_count()
    assert load.foreign() == pytest.approx(3 / (10 * cores), abs=0.05)


def test_fixed_batch_gets_what_it_takes(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 4).cumsum(0)

    file = export(Fixed(), torch.zeros(3, 4), tmp_path / "fixed.onnx")
    assert latency({"fixed": file}, torch.zeros(1, 4), seconds=1e-3)["fixed"].batch == 3
    arrays = module.fit_batch((np.arange(2.0).reshape(2, 1),), 3)
    assert arrays[0].tolist() == [[0.0], [1.0], [0.0]]


def test_errors(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="files must name at least one"):
        latency({}, torch.zeros(1, 64))
    with pytest.raises(SettingsError, match=r"threads must be at least 1 .* Got 0 and 2.0"):
        latency(files, torch.zeros(1, 64), 0)
    with pytest.raises(DataError, match="no inputs to time"):
        latency(files, [])
    with pytest.raises(RunError, match=r"gone.onnx"):
        latency({"gone": tmp_path / "gone.onnx"}, torch.zeros(1, 64))
    with pytest.raises(ModelError, match=r"inputs of shape \(1, 63\)"):
        latency(files, torch.zeros(1, 63))


def test_latency_compares_by_what_is_reported() -> None:
    assert Latency(1.0, 2.0, 1, 1, "e", minimum=0.5) == Latency(1.0, 2.0, 1, 1, "e", minimum=0.6)


@pytest.mark.slow
def test_two_equal_files_take_equally_long(files: dict[str, Path]) -> None:
    found = latency({"a": files["large"], "b": files["large"]}, torch.zeros(1, 64), seconds=1.0)
    if all(entry.quiet for entry in found.values()):
        assert 0.9 < found["a"].median / found["b"].median < 1.1
