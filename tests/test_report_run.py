"""Reading a run directory back, and the errors that name the file and the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pared.core.errors import RunError
from pared.report import parse_result, read_run

SMALLEST = {"schema": 1, "model": "m", "data": "d", "original": {}, "compressed": {}}


def test_the_smallest_result_is_read() -> None:
    run = parse_result(SMALLEST)
    assert (run.model, run.data, run.steps, run.ratios, run.baselines) == ("m", "d", (), {}, ())


def test_recorded_ratios_win_over_divided_ones() -> None:
    content = {
        **SMALLEST,
        "original": {"params": 10, "macs": 8, "latency_ms": {"median": 3}},
        "compressed": {"params": 5, "macs": 0, "latency_ms": {"median": 1}},
    }
    assert parse_result(content).ratios == {"params": 2, "latency": 3}
    assert parse_result({**content, "ratios": {"latency": 2.5, "macs": None}}).ratios == {"params": 2, "latency": 2.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"result: schema must be 1\. Got 2"),
        ({"schema": None}, r"result: schema must be 1\. Got None"),
        ({"model": None}, r"result: model must be a string\. Got nothing"),
        ({"original": None}, r"result: original must be an object\. Got nothing"),
        ({"compressed": {"macs": "many"}}, r"result: compressed\.macs must be a finite number\. Got 'many'"),
        ({"compressed": {"macs": float("nan")}}, r"result: compressed\.macs must be a finite number"),
        ({"compressed": {"params": True}}, r"result: compressed\.params must be a finite number"),
        ({"compressed": {"params": -1}}, r"result: compressed\.params must be a whole number of at least 0\. Got -1"),
        ({"compressed": {"latency_ms": {"median": []}}}, r"result: compressed\.latency_ms\.median must be"),
        ({"steps": 3}, r"result: steps must be a list\. Got 3"),
        ({"steps": [{"name": "a"}, {"name": 1}]}, r"result: steps\[1\]\.name must be a string\. Got 1"),
        ({"ratios": {"macs": "3x"}}, r"result: ratios\.macs must be a finite number\. Got '3x'"),
        ({"met": "yes"}, r"result: met must be true, false or null\. Got 'yes'"),
        ({"budget": []}, r"result: budget must be an object\. Got \[\]"),
    ],
)
def test_a_wrong_field_is_named(change: dict, message: str) -> None:
    with pytest.raises(RunError, match=f"^{message}"):
        parse_result({**SMALLEST, **change}, source="result")


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"result\.json: not found\. .* finished run"):
        read_run(tmp_path)
    (tmp_path / "result.json").write_text('{"schema": 1,\n "model"')
    with pytest.raises(RunError, match=r"result\.json: isn't JSON \(line 2: .*\)"):
        read_run(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(RunError, match=r"result\.json: the content must be an object\. Got \[\]"):
        read_run(tmp_path)
    (tmp_path / "result.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match=r"result\.json: can't be read"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("baselines.json", [{"name": "a", "profile": 3}], r"baselines\.json: baselines\[0\]\.profile must be an object"),
        ("baselines.json", {"a": 1}, r"baselines\.json: baselines must be a list"),
        ("layers.json", {"original": [{"params": 1}]}, r"layers\.json: original\[0\]\.path must be a string\. Got nothing"),
        ("environment.json", [1], r"environment\.json: must be an object\. Got a list"),
    ],
)
def test_wrong_files_beside_the_result_are_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    (tmp_path / "result.json").write_text(json.dumps(SMALLEST))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(RunError, match=message):
        read_run(tmp_path)
