"""The comparison with nncodec, without it: what is packed, what is said where it is missing, and the verdict on rows by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pared.core.errors import ModelError, SettingsError
from pared.lab.against_nncodec import tensors
from pared.lab.against_nncodec.run import EXPERIMENT, AgainstNncodec, measured, nncodec


def row(name: str, ours: int, theirs: int, seconds: tuple[float, float], *, same: bool = True) -> dict[str, Any]:
    others = {way: {"bytes": 100} for way in ("entropy", "huffman", "zstandard")}
    pared = {"bytes": ours, "decode_seconds": seconds[0], "same": same}
    return {"set": name, "weights": 9, "pared": pared, "nncodec": {"bytes": theirs, "decode_seconds": seconds[1], "same": True}, **others}


def test_the_verdict_needs_three_percent_and_a_fifth_of_the_time() -> None:
    assert EXPERIMENT.verdict([row("a", 97, 100, (1, 5))]).outcome == "reproduced"
    assert EXPERIMENT.verdict([row("a", 98, 100, (1, 5))]).outcome == "partly reproduced"
    assert EXPERIMENT.verdict([row("a", 97, 100, (1, 4.9))]).outcome == "partly reproduced"
    assert EXPERIMENT.verdict([row("a", 98, 100, (1, 4))]).outcome == "did not reproduce"
    lost = EXPERIMENT.verdict([row("a", 97, 100, (1, 5), same=False)])
    assert (lost.outcome, lost.text) == ("did not reproduce", "Not every integer came back from both: a.")
    found = EXPERIMENT.verdict([row("a", 97, 100, (1, 5)), row("b", 110, 100, (1, 5))])
    assert "b: -10.0 % smaller, which is 3 % or more: no." in found.text
    assert found.figures[1][:4] == ("a", "9", "97", "100")


def test_a_missing_environment_is_said_to_be(tmp_path: Path) -> None:
    experiment = AgainstNncodec(sets=("LeNet-5, 8 %, clustered",), python=str(tmp_path / "python"))
    with pytest.raises(ModelError, match=r"there is no .*python\. Run: python -m venv"):
        next(experiment.run(lambda event: None, tmp_path, frozenset()))
    (tmp_path / "nncodec.py").write_text("raise ImportError('numpy is too new')")
    with pytest.raises(ModelError, match="can't run nncodec"):
        nncodec({"w": np.ones((2, 2), np.float32)}, tmp_path, sys.executable, 1)


def test_settings() -> None:
    assert EXPERIMENT.keys()[0] == "EfficientNet-Lite0, qp -38, seed 0"
    with pytest.raises(SettingsError, match="sets"):
        AgainstNncodec(sets=("VGG-16",))


def test_what_is_packed() -> None:
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.2], [0.0, 0.5], [-0.24, 1.0]]))
    assert tensors.levels(layer, 0.5)["weight"].tolist() == [[1, 0], [0, 1], [0, 2]]
    assert not np.signbit(tensors.levels(layer, 0.5)["weight"]).any()
    assert tensors.ranks(layer)["weight"].tolist() == [[1, -1], [0, 1], [-2, 2]]


def test_every_way_of_packing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.lab.against_nncodec.run.nncodec", lambda *_: {"bytes": 1, "decode_seconds": 1.0, "same": True})
    integers = np.random.default_rng(0).integers(-9, 10, (40, 50)).astype(np.float32)
    found = measured({"w": integers}, tmp_path, "python", 1)
    assert found["weights"] == 2000
    assert found["pared"]["same"]
    assert found["pared"]["bytes"] == (tmp_path / "weights.pared").stat().st_size
    assert found["entropy"]["bytes"] == 1062
    assert all(1062 < found[way]["bytes"] < 2000 for way in ("pared", "huffman", "zstandard"))
