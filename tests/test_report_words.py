"""Numbers, the sentence at the head of a report, and the cells of its tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pared.report import headline, parse_result, words
from pared.report.rows import budget_words, step_rows, summary_rows
from pared.report.run import Run


def run(before: dict, after: dict, **fields: object) -> Run:
    return parse_result({"schema": 1, "model": "m", "data": "d", "original": before, "compressed": after, **fields})


def accuracy(value: float, split: str = "test") -> dict:
    return {"name": "accuracy", "value": value, "split": split, "file": "small.onnx"}


def test_headline_names_size_speed_and_accuracy() -> None:
    before = {"file_bytes": 1230, "macs": 900, "latency_ms": {"median": 3.1}, "metric": accuracy(0.99)}
    after = {"file_bytes": 100, "macs": 300, "latency_ms": {"median": 1.0}, "metric": accuracy(0.986)}
    assert headline(run(before, after, drop=0.004)) == "12.3 times smaller, 3.1 times faster, 0.4 points less accurate on test"


def test_fewer_macs_are_never_called_faster() -> None:
    assert headline(run({"macs": 900}, {"macs": 300})) == "3.0 times fewer MACs"
    same = run({"macs": 900, "latency_ms": {"median": 1.0}}, {"macs": 300, "latency_ms": {"median": 1.0}})
    assert headline(same) == "about as fast in spite of 3.0 times fewer MACs"


def test_a_slower_and_larger_network_is_called_so() -> None:
    before, after = {"file_bytes": 10, "latency_ms": {"median": 1.0}}, {"file_bytes": 20, "latency_ms": {"median": 1.5}}
    assert headline(run(before, after)) == "2.0 times larger, 1.5 times slower"


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        (0.01, "1.0 point less accurate on test"),
        (-0.004, "0.4 points more accurate on test"),
        (0.0002, "0.02 points less accurate on test"),
        (0.0, "exactly as accurate on test"),
        (0.00001, "as accurate on test"),
    ],
)
def test_drop_in_points(drop: float, said: str) -> None:
    assert words.drop_words(run({"metric": accuracy(0.9)}, {"metric": accuracy(0.9 - drop)}, drop=drop)) == said


def test_drop_of_another_metric_keeps_its_unit_and_direction() -> None:
    error = {"name": "mean error", "value": 2.5, "split": "valid", "file": "small.onnx"}
    assert words.drop_words(run({"metric": error}, {"metric": error}, drop=0.25)) == "mean error worse by 0.250 on validation"
    # a smaller error is better, which only the recorded drop knows
    assert words.drop_words(run({"metric": error}, {"metric": {**error, "value": 2.0}})) is None


def test_drop_is_not_taken_across_splits() -> None:
    assert words.drop(run({"metric": accuracy(0.9, "test")}, {"metric": accuracy(0.8, "valid")})) is None
    assert words.drop(run({"metric": accuracy(0.9)}, {"metric": accuracy(0.8)})) == pytest.approx(0.1)


def test_headline_without_measurements() -> None:
    assert headline(run({}, {})) == "nothing was measured in this run"


@given(st.floats(1e-9, 1e15))
def test_significant_is_right_to_three_digits_and_never_scientific(value: float) -> None:
    text = words.significant(value)
    assert "e" not in text
    assert math.isclose(float(text.replace(",", "")), value, rel_tol=0.0051)


def test_numbers_at_the_edges_of_their_units() -> None:
    assert [words.size(value) for value in (0, 999, 1000, 999_499, 999_500, 10**9)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "999 kB",
        "1.00 MB",
        "1.00 GB",
    ]
    assert [words.count(value) for value in (0, 9_999, 10_000, 2_293_000)] == ["0", "9,999", "10.0 k", "2.29 M"]
    assert [words.seconds(value) for value in (0.04, 59.94, 59.95, 3599.4, 3600)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
    ]
    assert [words.ratio(value) for value in (0.5, 0.95, 1.0, 31.21, 99.94, 99.96, 1234.0)] == [
        "0.50",
        "0.9",
        "1.0",
        "31.2",
        "99.9",
        "100",
        "1,234",
    ]
    assert words.size(None) == words.count(None) == words.milliseconds(None) == words.seconds(None) == words.ratio(None) == words.UNKNOWN


def test_change_of_a_step() -> None:
    assert words.change(200, 100) == f"{words.MINUS}50 %"
    assert words.change(100, 105) == "+5.0 %"
    assert words.change(100, 100) == "unchanged"
    assert words.change(0, 5) == words.change(None, 5) == words.change(5, None) == ""


def test_steps_are_compared_with_the_step_before() -> None:
    profile = {"params": 50, "macs": None, "metric": accuracy(0.9, "valid")}
    steps = [
        {"name": "prune.neurons", "seconds": 2, "profile": profile},
        {"name": "quantize.int8", "seconds": None, "profile": {"params": 25, "metric": accuracy(0.89, "valid")}},
    ]
    first, second = step_rows(run({"params": 100, "metric": accuracy(0.95)}, {}, steps=steps))
    assert (first.seconds, second.seconds) == ("2.0 s", words.UNKNOWN)
    assert [cell.change for cell in (first.cells[0], second.cells[0])] == [f"{words.MINUS}50 %"] * 2
    # the original was measured on another split, so its accuracy is no ground to compare on
    assert (first.cells[-1].change, second.cells[-1].change) == ("", f"{words.MINUS}1.00 points")


def test_summary_leaves_out_what_was_not_measured() -> None:
    rows = summary_rows(run({"params": 100}, {"params": 99}))
    assert [(row.name, row.change) for row in rows] == [("Parameters", "1.01 times fewer")]


def test_summary_shows_zeros_only_where_there_are_some() -> None:
    rows = summary_rows(run({"params": 100, "nonzero": 100}, {"params": 100, "nonzero": 10}))
    assert [(row.name, row.after, row.change) for row in rows] == [
        ("Parameters", "100", "the same"),
        ("Not zero", "10", "10.0 times fewer"),
    ]


def test_budget_in_words() -> None:
    assert budget_words({"size_bytes": 250_000, "latency": 0.5, "drop": 0}, "accuracy") == (
        "file at most 250 kB, latency at most 0.5 of the original, accuracy no worse"
    )
    assert budget_words({"drop": 0.02}, "accuracy") == "accuracy at most 2 points lower"
    assert budget_words({"drop": 0.5}, "loss") == "loss at most 0.5 worse"
    assert budget_words({"energy": {"joule": 1.5}}) == "energy joule: 1.5"


def test_networks_that_adapt_are_said_to_be_means() -> None:
    fixed, adapting = (run({}, {"macs": 5}, steps=[{"name": name}]) for name in ("quantize.int8", "dynamic.exits"))
    assert not any("are means" in sentence for sentence in words.measured_how(fixed))
    assert any("are means" in sentence for sentence in words.measured_how(adapting))
