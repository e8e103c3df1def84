"""How far a run has got: bars on a terminal, one plain line for each stage and epoch in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from pared.report.words import count


class Progress:
    """Shows the events of a run; give it as `report` to a `Task`.

    It understands {"event": "stage", "name", "index", "of"}, {"event": "epoch", "epoch", "epochs", "loss", "metric", "value"} (or
    "valid" in place of the last two), {"event": "resume", "epoch", "epochs"}, {"event": "batch", "done", "total"}, and what rounds of
    pruning tell: "cut" and "guard" of `prune.Neurons`, "blocks" of `prune.Blocks`. It passes over all others. Bars are drawn only
    inside a `with` block and on a terminal; without the block every stage, round and epoch is a line. Progress goes to the standard
    error, so that results can be piped.

    Args:
        quiet: show nothing at all.
        file: where to write; the standard error if None.

    >>> progress = Progress(file=sys.stdout)
    >>> progress({"event": "stage", "name": "prune.neurons", "index": 1, "of": 2})
    [1/2] prune.neurons
    >>> progress({"event": "epoch", "epoch": 1, "epochs": 4, "loss": 0.25, "metric": "accuracy", "value": 0.9612})
      epoch 1/4  loss 0.2500  accuracy 0.9612
    >>> progress({"event": "cut", "round": 1, "rounds": 3, "of": "latency", "macs": 61_200, "original_macs": 122_000, "target": 0.5,
    ...           "reached": 0.496})
      round 1/3  61.2 k of 122 k MACs (50 %)  49.6 % of the latency for a target of 50 %
    >>> progress({"event": "guard", "round": 1, "rounds": 3, "metric": "accuracy", "value": 0.9432, "lost": 0.018, "allowed": 0.02,
    ...           "holds": True})
      round 1/3  accuracy 0.9432  0.0180 lost, 0.0200 allowed
    """

    def __init__(self, quiet: bool = False, file: IO[str] | None = None) -> None:
        self._quiet = quiet
        self._console = Console(file=file if file is not None else sys.stderr, highlight=False)
        self._bars: Bars | None = None
        self._epoch: TaskID | None = None
        self._batch: TaskID | None = None

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal:
            bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
            )
            bars.start()
            self._bars = bars
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = self._epoch = self._batch = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event; unknown events, and fields that are missing, are passed over."""
        if self._quiet:
            return
        match event.get("event"):
            case "stage":
                self._show_stage(event)
            case "epoch":
                self._show_epoch(event)
            case "batch":
                self._show_batch(event)
            case "cut" | "blocks" | "guard":
                self._show_round(event)
            case "resume":
                self._line(f"  resumed after epoch {event.get('epoch')}/{event.get('epochs')}")

    def _show_stage(self, event: Mapping[str, Any]) -> None:
        index, of = event.get("index"), event.get("of")
        place = f"[{index}/{of}] " if index is not None and of is not None else ""
        self._clear()
        self._line(f"{place}{event.get('name', 'working')}")

    def _show_epoch(self, event: Mapping[str, Any]) -> None:
        done, total = event.get("epoch"), event.get("epochs")
        quality = event.get("value", event.get("valid"))
        measured = {"loss": event.get("loss"), str(event.get("metric", "valid")): quality}
        numbers = [f"{name} {value:.4f}" for name, value in measured.items() if isinstance(value, int | float)]
        text = "  ".join([f"  epoch {done}/{total}" if total is not None else f"  epoch {done}", *numbers])
        if self._bars is None:
            self._line(text)
            return
        if self._epoch is None:
            self._epoch = self._bars.add_task(text, total=total)
        self._bars.update(self._epoch, completed=done, total=total, description=text)
        if done == total:
            self._line(text)
            self._clear()

    def _show_round(self, event: Mapping[str, Any]) -> None:
        self._clear()  # of the training before it
        said = guarded(event) if event.get("event") == "guard" else without(event)
        self._line("  ".join([f"  round {event.get('round')}/{event.get('rounds')}", *said]))

    def _show_batch(self, event: Mapping[str, Any]) -> None:
        # a line for each batch would drown a log
        if self._bars is None:
            return
        done, total = event.get("done"), event.get("total")
        if self._batch is None:
            self._batch = self._bars.add_task("  batches", total=total)
        self._bars.update(self._batch, completed=done, total=total)

    def _clear(self) -> None:
        """Take the bars of a finished fit away."""
        if self._bars is not None:
            for task in (self._epoch, self._batch):
                if task is not None:
                    self._bars.remove_task(task)
            self._epoch = self._batch = None

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def without(event: Mapping[str, Any]) -> list[str]:
    """What a network is after neurons were cut or blocks removed, in parts of a line.

    >>> without({"removed": ["layer1.1", "layer2.0"], "macs": 900, "original_macs": 1200})
    ['900 of 1,200 MACs (75 %)', 'without layer1.1, layer2.0']
    """
    said = []
    macs, original, reached, target = (event.get(name) for name in ("macs", "original_macs", "reached", "target"))
    if macs is not None and original:
        said.append(f"{count(macs)} of {count(original)} MACs ({macs / original:.0%})".replace("%", " %"))
    if reached is not None and isinstance(target, int | float):
        said.append(f"{100 * reached:.3g} % of the {event.get('of')} for a target of {100 * target:.3g} %")
    if "removed" in event:
        said.append(f"without {', '.join(event['removed'])}" if event["removed"] else "no block goes")
    return said


def guarded(event: Mapping[str, Any]) -> list[str]:
    """What a guard found at the end of a round, and what comes of it, in parts of a line.

    >>> guarded({"metric": "accuracy", "value": 0.9, "lost": 0.08, "allowed": 0.01, "holds": False})
    ['accuracy 0.9000', '0.0800 lost, 0.0100 allowed', 'too much, so the network before this round is the result']
    """
    said = []
    value, lost, allowed = (event.get(name) for name in ("value", "lost", "allowed"))
    if value is not None:
        said.append(f"{event.get('metric', 'valid')} {value:.4f}")
    if lost is not None and allowed is not None:
        said.append(f"{'nothing' if lost <= 0 else f'{lost:.4f}'} lost, {allowed:.4f} allowed")
    return said if event.get("holds") else [*said, "too much, so the network before this round is the result"]
