"""Collect every mistake in a set of values and report them together."""

from __future__ import annotations

from typing import Any

from pared.core.errors import SettingsError


class Problems:
    """A list of mistakes in one sentence form: "{where}: {field} must be {rule}. Got {value}."

    >>> problems = Problems("prune.neurons")
    >>> problems.check(1.5 <= 1, "keep", "between 0 and 1", 1.5)
    >>> problems.found
    ['prune.neurons: keep must be between 0 and 1. Got 1.5.']
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: list[str] = []

    def check(self, holds: bool, field: str, rule: str, value: Any) -> None:
        """Note a mistake unless `holds`."""
        if not holds:
            self.found.append(f"{self.where}: {field} must be {rule}. Got {value!r}.")

    def number(
        self,
        field: str,
        value: Any,
        *,
        low: float | None = None,
        high: float | None = None,
        above: float | None = None,
        integer: bool = False,
    ) -> None:
        """Note a mistake unless `value` is a number in [low, high], and greater than `above`; `integer` asks for a whole one."""
        kind = "a whole number" if integer else "a number"
        limits = [f"at least {low:g}"] if low is not None else []
        limits += [f"greater than {above:g}"] if above is not None else []
        limits += [f"at most {high:g}"] if high is not None else []
        is_number = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
        holds = is_number and value == value
        holds = holds and (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
        self.check(holds, field, " ".join([kind, " and ".join(limits)]).strip(), value)

    def raise_if_any(self) -> None:
        """Raise `SettingsError` with all mistakes noted so far."""
        if self.found:
            raise SettingsError(self.found)
