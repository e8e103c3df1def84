"""Typed reading of a JSON object, with errors that name the file and the field."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

from pared.core.errors import RunError


class Fields:
    """The fields of one JSON object; a field that is missing or null reads as None unless it is required.

    Args:
        content: the object.
        source: the file's name, for errors.
        path: where in the file the object stands, for errors.

    Raises:
        RunError: from every reading method, for example "result.json: original.macs must be a number. Got 'many'."
    """

    def __init__(self, content: Any, source: str, path: str = "") -> None:
        """Check that `content` is an object."""
        self._source, self._path = source, path
        if not isinstance(content, Mapping):
            raise RunError(f"{source}: {path or 'the content'} must be an object. Got {_short(content)}.")
        self._content = content

    def __iter__(self) -> Iterator[str]:
        """The names of all fields."""
        return iter(self._content)

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self._content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._wrong(name, "a finite number", value)
        return value

    def whole(self, name: str) -> int | None:
        """A whole number of at least 0."""
        value = self.number(name)
        if value is None:
            return None
        if value != int(value) or value < 0:
            self._wrong(name, "a whole number of at least 0", value)
        return int(value)

    def truth(self, name: str) -> bool | None:
        """True or false."""
        value = self._content.get(name)
        if value is not None and not isinstance(value, bool):
            self._wrong(name, "true, false or null", value)
        return value

    @overload
    def text(self, name: str, optional: Literal[False]) -> str: ...
    @overload
    def text(self, name: str, optional: Literal[True] = True) -> str | None: ...
    def text(self, name: str, optional: bool = True) -> str | None:
        """A string."""
        value = self._content.get(name)
        if not isinstance(value, str) and not (optional and value is None):
            self._wrong(name, "a string", value)
        return value

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object, unread."""
        value = self._content.get(name)
        if value is not None and not isinstance(value, Mapping):
            self._wrong(name, "an object", value)
        return value

    @overload
    def inside(self, name: str, optional: Literal[False] = False) -> Fields: ...
    @overload
    def inside(self, name: str, optional: Literal[True]) -> Fields | None: ...
    def inside(self, name: str, optional: bool = False) -> Fields | None:
        """The fields of an object in this one."""
        value = self._content.get(name)
        if optional and value is None:
            return None
        return Fields(value, self._source, self._join(name))

    def each(self, name: str) -> list[Fields]:
        """The fields of every object of a list; a missing list is an empty one."""
        value = self._content.get(name)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            self._wrong(name, "a list", value)
        return [Fields(entry, self._source, f"{self._join(name)}[{index}]") for index, entry in enumerate(value)]

    def _join(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def _wrong(self, name: str, rule: str, value: Any) -> None:
        raise RunError(f"{self._source}: {self._join(name)} must be {rule}. Got {_short(value)}.")


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
