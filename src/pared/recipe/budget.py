"""How small, how fast and how good the compressed file has to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.core.units import Bytes, Ratio


@dataclass(frozen=True)
class Budget:
    """Limits that are checked against what was measured on the deployed file, on the test split.

    Args:
        size: of `small.onnx` on disk: a share of the original's file, or a number of bytes.
        latency: median latency as a share of the original's, both taken in one interleaved measurement.
        drop: how much worse the metric may be, in its own unit (0.01 is one point of accuracy).

    Raises:
        SettingsError: for a value out of its range, or if there is no limit at all.

    >>> budget = Budget.parse(size="1/10", drop="1%")
    >>> budget.check(file_bytes=(4000, 400), latency=(1.0, 0.9), drop=0.004)
    {'size': True, 'drop': True}
    """

    size: Ratio | Bytes | None = None
    latency: Ratio | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        problems = Problems("budget")
        problems.check(self.size is None or isinstance(self.size, Ratio | Bytes), "size", "a Ratio or Bytes", self.size)
        problems.check(self.latency is None or isinstance(self.latency, Ratio), "latency", "a Ratio", self.latency)
        if self.drop is not None:
            problems.number("drop", self.drop, low=0)
            problems.check(self.drop != math.inf, "drop", "finite", self.drop)
        problems.check(any(limit is not None for limit in (self.size, self.latency, self.drop)), "size, latency or drop", "given", None)
        problems.raise_if_any()

    @classmethod
    def parse(cls, size: str | None = None, latency: str | None = None, drop: str | None = None) -> Budget:
        """From what a person writes: size "1/10", "10%" or "250kB", latency "1/3", drop "1%", "0.01" or "0"."""
        problems: list[str] = []

        def parsed(name: str, text: str | None, units: tuple[type, ...]) -> Any:
            if text is None:
                return None
            for unit in units:
                try:
                    return unit.parse(text)  # type: ignore[attr-defined]
                except SettingsError as error:
                    last = error
            problems.append(f"{name}: {last}")
            return None

        # letters are what tells bytes from a share
        in_bytes = size is not None and any(letter.isalpha() for letter in size)
        limits = parsed("--size", size, (Bytes,) if in_bytes else (Ratio,)), parsed("--latency", latency, (Ratio,))
        points = 0.0 if drop is not None and drop.strip() in ("0", "0%", "0.0") else parsed("--drop", drop, (Ratio,))
        if problems:
            raise SettingsError(problems)
        return cls(*limits, points.value if isinstance(points, Ratio) else points)

    def check(self, file_bytes: tuple[float, float], latency: tuple[float, float], drop: float) -> dict[str, bool]:
        """Which limits hold; the pairs are (original, compressed)."""
        found: dict[str, bool] = {}
        if self.size is not None:
            limit = self.size.count if isinstance(self.size, Bytes) else self.size.value * file_bytes[0]
            found["size"] = file_bytes[1] <= limit
        if self.latency is not None:
            found["latency"] = latency[1] <= self.latency.value * latency[0]
        if self.drop is not None:
            # the metric is a mean of few values; a last digit of rounding is no drop
            found["drop"] = drop <= self.drop + 1e-9
        return found

    def to_dict(self) -> dict[str, Any]:
        """As it stands in result.json: size as a share, or as `size_bytes`; null where there is no limit."""
        return {
            "size": self.size.value if isinstance(self.size, Ratio) else None,
            "size_bytes": self.size.count if isinstance(self.size, Bytes) else None,
            "latency": self.latency.value if self.latency is not None else None,
            "drop": self.drop,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Budget:
        """Read back what `to_dict` gave."""
        size = Ratio(content["size"]) if content["size"] is not None else None
        in_bytes = Bytes(content["size_bytes"]) if content["size_bytes"] is not None else None
        return cls(size or in_bytes, Ratio(content["latency"]) if content["latency"] is not None else None, content["drop"])
