"""Terminal tables and progress."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from pared.core.errors import RunError
from pared.report import Progress, comparison_table, parse_result, print_table, result_table

RESULT = {
    "schema": 1,
    "model": "[red]net[/red]",
    "data": "digits",
    "original": {
        "params": 1000,
        "file_bytes": 4000,
        "latency_ms": {"median": 2.0, "p90": 3.0},
        "metric": {"name": "accuracy", "value": 0.98, "split": "test"},
    },
    "compressed": {
        "params": 100,
        "file_bytes": 500,
        "latency_ms": {"median": 4.0, "p90": 6.0},
        "metric": {"name": "accuracy", "value": 0.97, "split": "test"},
    },
    "drop": 0.01,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(table: object) -> list[str]:
    stream = io.StringIO()
    print_table(table, stream)  # type: ignore[arg-type]
    return stream.getvalue().splitlines()


def test_result_in_a_pipe_is_plain_and_aligned() -> None:
    assert printed(result_table(RESULT)) == [
        "[red]net[/red] on digits  Original  Compressed  Change",
        "Accuracy, test             98.00 %     97.00 %  1.00 points less",
        "Parameters                   1,000         100  10.0 times fewer",
        "File                       4.00 kB       500 B  8.0 times smaller",
        "Latency, median            2.00 ms     4.00 ms  2.0 times slower",
        "Latency, p90               3.00 ms     6.00 ms  2.0 times slower",
    ]


def test_comparison_has_the_original_first_and_every_line_whole() -> None:
    lines = printed(comparison_table([RESULT, parse_result({**RESULT, "model": "x" * 90})]))
    assert [line.split()[0] for line in lines[1:]] == ["original", "[red]net[/red]", "x" * 90]
    assert lines[0].split("  ")[-1] == "Latency (median)"
    assert lines[2].endswith("4.00 ms (0.50x)")
    # right-aligned numbers end in the same column
    assert len({len(line) for line in lines[2:]}) == 1


def test_the_result_of_compress_is_shown_like_its_file(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Result:
        directory: Path

        def to_dict(self) -> dict:
            return RESULT

    result = Result(tmp_path / "small")
    assert printed(result_table(result)) == printed(result_table(RESULT))
    assert printed(comparison_table([result]))[2].startswith("small ")


def test_comparison_of_nothing_has_only_its_head() -> None:
    assert len(printed(comparison_table([]))) == 1


def test_a_wrong_result_is_named() -> None:
    with pytest.raises(RunError, match=r"result: model must be a string"):
        result_table({**RESULT, "model": 3})


EVENTS = [
    {"event": "stage", "name": "prune.neurons", "index": 1, "of": 2},
    {"event": "batch", "done": 1, "total": 2},
    {"event": "epoch", "epoch": 1, "epochs": 2, "loss": 0.5, "metric": "accuracy", "value": 0.75},
    {"event": "resume", "epoch": 1, "epochs": 2},
    {"event": "epoch", "epoch": 2, "epochs": 2, "loss": 0.25, "valid": 0.8},
    {"event": "cut", "round": 1, "rounds": 4, "of": "neurons", "macs": 4100, "original_macs": 8200},
    {"event": "cut", "round": 2, "rounds": 4, "of": "bytes", "macs": 4100, "original_macs": 12300, "target": 0.25, "reached": 0.2487},
    {"event": "guard", "round": 1, "rounds": 4, "metric": "accuracy", "value": 0.9, "lost": -0.01, "allowed": 0.02, "holds": True},
    {"event": "guard", "round": 2, "rounds": 4, "metric": "accuracy", "value": 0.8, "lost": 0.09, "allowed": 0.02, "holds": False},
    {"event": "blocks", "round": 1, "rounds": 1, "removed": ["a", "b"], "scores": {}, "macs": 82_000, "original_macs": 82_000},
    {"event": "blocks", "round": 1, "rounds": 1, "removed": []},
    {"event": "guard", "round": 1, "rounds": 1, "holds": True},
    {"event": "profile", "name": "x"},
    {"event": "something new"},
    {},
    {"event": "stage", "name": "[bold]int8"},
]


def test_progress_in_a_pipe_is_one_line_each() -> None:
    stream = io.StringIO()
    with Progress(file=stream) as progress:
        for event in EVENTS:
            progress(event)
    assert stream.getvalue().splitlines() == [
        "[1/2] prune.neurons",
        "  epoch 1/2  loss 0.5000  accuracy 0.7500",
        "  resumed after epoch 1/2",
        "  epoch 2/2  loss 0.2500  valid 0.8000",
        "  round 1/4  4,100 of 8,200 MACs (50 %)",
        "  round 2/4  4,100 of 12.3 k MACs (33 %)  24.9 % of the bytes for a target of 25 %",
        "  round 1/4  accuracy 0.9000  nothing lost, 0.0200 allowed",
        "  round 2/4  accuracy 0.8000  0.0900 lost, 0.0200 allowed  too much, so the network before this round is the result",
        "  round 1/1  82.0 k of 82.0 k MACs (100 %)  without a, b",
        "  round 1/1  no block goes",
        "  round 1/1",
        "[bold]int8",
    ]


def test_quiet_progress_shows_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress(quiet=True, file=stream) as progress:
            for event in EVENTS:
                progress(event)
        assert stream.getvalue() == ""


def test_progress_on_a_terminal_draws_bars_and_keeps_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(file=stream) as progress:
        for event in EVENTS:
            progress(event)
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "[1/2] prune.neurons" in text
    assert "epoch 2/2  loss 0.2500" in text


def test_an_error_inside_takes_the_bars_away_and_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()

    def fail() -> None:
        with Progress(file=stream) as progress:
            progress(EVENTS[1])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    # the cursor was hidden, and is shown again
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0
