"""What the rows say, and the table of the card."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from pared.lab.claims import judged
from pared.lab.experiment import Row, Verdict

ALLOWED = {2.6: 0.3}
"""Points that may be lost to the dense network at a speedup; nothing at any other."""

LEARNING = "sparse learning"

Arm = dict[str, Any]


def average(rows: Sequence[Row], figure: Callable[[dict[str, Arm]], float]) -> float:
    """The mean over rows of a figure of their arms."""
    return statistics.mean(figure(row["arms"]) for row in rows)


def lost(rows: Sequence[Row], arm: str, to: str = "dense") -> float:
    """By how many points the test error of an arm is above that of another, on average.

    >>> lost([{"arms": {"dense": {"test": 9.0}, "small": {"test": 9.5}}}], "small")
    0.5
    """
    return round(average(rows, lambda arms: arms[arm]["test"] - arms[to]["test"]), 3)


def ratio(rows: Sequence[Row], arm: str, to: str, column: str) -> float:
    """What an arm has of a column, as a multiple of what another has, on average."""
    return average(rows, lambda arms: arms[arm][column] / arms[to][column])


def judge(rows: Sequence[Row], speedups: Sequence[float]) -> Verdict:
    """At every speedup: what is lost to the dense network, and whether the other tool's network is better or faster."""
    claims: dict[str, bool] = {}
    remarks = []
    for speedup in speedups:
        ours, peer = f"pared {speedup}", f"group norm {speedup}"
        allowed = ALLOWED.get(speedup, 0.0)
        change, apart, time = lost(rows, ours), lost(rows, ours, peer), ratio(rows, ours, peer, "ms")
        limit = f"at most {allowed:g} points" if allowed else "nothing"
        claims |= {
            f"at {speedup} times pared loses {limit} ({change:+.2f} points of test error)": change <= allowed,
            f"at {speedup} times it is at least as accurate as the group-norm pruner ({apart:+.2f})": apart <= 0,
            f"at {speedup} times it is at least as fast ({time:.2f} of its time)": time <= 1,
        }
        remarks.append(f"at {speedup} times pared has {lost(rows, ours, 'dense, trained on'):+.2f} to the dense network trained on as long")
    found = judged(claims, table(rows))
    refused = sum(bool(row["unprojected"]) for row in rows)
    notes = (
        f"Not claimed: {'; '.join(remarks)}. torch-pruning can't cut {refused} of {len(rows)} networks as they come, with padded shortcuts."
    )
    return dataclasses.replace(found, text=f"{found.text} {notes}")


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], ...]:
    """A line for every arm: its test error in every row and on average, then means over rows."""
    head = ("test error, %", "mean", *(row["key"] for row in rows), "MACs", "parameters", "time", "training, s")
    names = [*dict.fromkeys(name for row in rows for name in row["arms"])]
    return (head, *(_line(rows, name) for name in names))


def _line(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    errors = [row["arms"][name]["test"] for row in rows]
    shares = [ratio(rows, name, "dense", column) for column in ("macs", "params", "ms")]
    before = LEARNING if name.startswith("group norm") and LEARNING in rows[0]["arms"] else name  # done once, but part of the way there
    seconds = average(rows, lambda arms: arms[name]["seconds"] + (arms[before]["seconds"] if before != name else 0))
    numbers = (statistics.mean(errors), *errors)
    return (name, *(f"{number:.2f}" for number in numbers), *(f"{share:.3f}" for share in shares), f"{seconds:.0f}")
