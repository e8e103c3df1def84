"""Units that people write: epochs ("2ep"), bytes ("1.5MB"), ratios ("1/10", "12%", "0.1")."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pared.core.errors import SettingsError

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_BYTE_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


@dataclass(frozen=True, order=True)
class Epochs:
    """A number of passes over the training data.

    >>> Epochs.parse("2ep"), Epochs.parse(3)
    (Epochs(count=2), Epochs(count=3))
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise SettingsError(f"epochs must be a whole number of at least 0. Got {self.count!r}.")

    @classmethod
    def parse(cls, text: str | int | Epochs) -> Epochs:
        """Accept 2, "2", "2ep" or "2 epochs"."""
        if isinstance(text, Epochs):
            return text
        if isinstance(text, int):
            return cls(text)
        match = re.fullmatch(r"\s*(\d+)\s*(?:ep|epochs?)?\s*", text) if isinstance(text, str) else None
        if match is None:
            raise SettingsError(f"epochs must be written like 2 or 2ep. Got {text!r}.")
        return cls(int(match[1]))

    def __str__(self) -> str:
        return f"{self.count}ep"


@dataclass(frozen=True, order=True)
class Bytes:
    """A size on disk; kB and MB are powers of 1000, KiB and MiB of 1024.

    >>> Bytes.parse("1.5MB").count
    1500000
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise SettingsError(f"a size must be a whole number of bytes. Got {self.count!r}.")

    @classmethod
    def parse(cls, text: str | int | Bytes) -> Bytes:
        """Accept 2000, "2 kB", "1.5MB", "3MiB"."""
        if isinstance(text, Bytes):
            return text
        if isinstance(text, int):
            return cls(text)
        match = re.fullmatch(rf"\s*{_NUMBER}\s*([a-zA-Z]*)\s*", text) if isinstance(text, str) else None
        if match is None or match[2].lower() not in _BYTE_UNITS:
            raise SettingsError(f"a size must be written like 250kB or 1.5MB. Got {text!r}.")
        return cls(round(float(match[1]) * _BYTE_UNITS[match[2].lower()]))

    def __str__(self) -> str:
        for unit, size in (("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
            if self.count >= size * 0.9995:
                return f"{self.count / size:.3g} {unit}"
        return f"{self.count} B"


@dataclass(frozen=True, order=True)
class Ratio:
    """A positive share of something, 1 meaning all of it.

    >>> Ratio.parse("1/10").value, Ratio.parse("12%").value
    (0.1, 0.12)
    """

    value: float

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not self.value > 0 or self.value == float("inf"):
            raise SettingsError(f"a ratio must be a finite number greater than 0. Got {self.value!r}.")

    @classmethod
    def parse(cls, text: str | float | Ratio) -> Ratio:
        """Accept 0.1, "0.1", "10%" or "1/10"."""
        if isinstance(text, Ratio):
            return text
        if isinstance(text, int | float):
            return cls(text)
        if isinstance(text, str):
            if match := re.fullmatch(rf"\s*{_NUMBER}\s*%\s*", text):
                return cls(float(match[1]) / 100)
            if (match := re.fullmatch(rf"\s*{_NUMBER}\s*/\s*{_NUMBER}\s*", text)) and float(match[2]):
                return cls(float(match[1]) / float(match[2]))
            if match := re.fullmatch(rf"\s*{_NUMBER}\s*", text):
                return cls(float(match[1]))
        raise SettingsError(f"a ratio must be written like 1/10, 10% or 0.1. Got {text!r}.")

    def __str__(self) -> str:
        return f"{self.value:g}"
