"""Turn a piece of YAML into a value of a given type, keeping the line of every mistake."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import re
import types
import typing
from typing import Any, NamedTuple

import yaml

from pared.core.errors import SettingsError
from pared.recipe.methods import choices, dataclass_choices, field_types, snake

NOTHING = ("", "~", "null", "Null", "NULL", "none", "None")
"""Unquoted words that mean no value; all but the last two are YAML's own."""


class Mistake(NamedTuple):
    """One thing that is wrong in a file: the line, counted from 1, and a sentence."""

    line: int
    text: str


class Mistakes(Exception):
    """What is wrong in a part of a file; never leaves this package."""

    def __init__(self, found: list[Mistake]) -> None:
        self.found = found
        super().__init__(found)


def mistake(node: yaml.Node, text: str) -> Mistakes:
    """One mistake, at the line where `node` begins."""
    return Mistakes([Mistake(node.start_mark.line + 1, text)])


def decode(node: yaml.Node, hint: Any, where: str, field: str) -> Any:
    """The value of type `hint` that `node` holds.

    Args:
        node: a composed node of YAML.
        hint: a resolved type: a plain type, `Literal`, a list, tuple or dict of them, a dataclass, or a union.
        where: the method, for messages.
        field: the path of the field within the method, for messages.

    Raises:
        Mistakes: all that is wrong below this node.
    """
    options = choices(hint)
    if _is_null(node) and (type(None) in options or hint is None):
        return None
    members = dataclass_choices(hint)
    if members and (found := _dataclass_value(node, members, where, field)) is not None:
        return found
    for option in options:
        if option not in members and option is not type(None):
            try:
                return _plain_value(node, option, where, field)
            except Mistakes as error:
                if len(options) == 1:
                    raise
                last = error
                if isinstance(node, yaml.SequenceNode | yaml.MappingNode) and typing.get_origin(option) is not None:
                    raise last from None
    raise mistake(node, f"{where}: {field} must be {describe(hint)}. Got {show(node)}.")


def build(kind: type, node: yaml.Node | None, where: str, prefix: str = "", at: yaml.Node | None = None) -> Any:
    """An instance of dataclass `kind` from a mapping of its fields (`None` or an empty value: all defaults).

    Raises:
        Mistakes: all that is wrong in the mapping, or that the class itself refuses.
    """
    at = at or node
    assert at is not None
    hints = field_types(kind)
    keys: dict[str, yaml.Node] = {}
    values: dict[str, Any] = {}
    found: list[Mistake] = []
    if node is not None and not _is_null(node):
        if not isinstance(node, yaml.MappingNode):
            raise mistake(node, f"{where}: {prefix or 'its settings'} must be a mapping such as {{{_example(hints)}}}. Got {show(node)}.")
        for key, value in pairs(node, where, found):
            keys[key] = value
            if key not in hints:
                found.append(Mistake(value.start_mark.line + 1, f"{where}: {_unknown('field', prefix + key, list(hints), key)}"))
                continue
            try:
                values[key] = decode(value, hints[key], where, prefix + key)
            except Mistakes as error:
                found += error.found
    for field in dataclasses.fields(kind):
        if field.init and field.name not in keys and field.default is field.default_factory is dataclasses.MISSING:
            found.append(Mistake(at.start_mark.line + 1, f"{where}: {prefix}{field.name} is missing."))
    try:
        result = kind(**values)  # also when mistakes were found: what the class itself refuses is reported along with them
    except SettingsError as error:
        raise Mistakes([*found, *(Mistake(_line_of(problem, keys, at), problem) for problem in error.problems)]) from None
    except TypeError:
        if not found:  # else a field without a default is missing, which is among the mistakes
            raise
    if found:
        raise Mistakes(found)
    return result  # pyright: ignore[reportPossiblyUnbound]


def pairs(node: yaml.MappingNode, where: str, found: list[Mistake]) -> list[tuple[str, yaml.Node]]:
    """The keys and values of a mapping; keys that are not words, and keys that stand there twice, go to `found`."""
    seen: dict[str, int] = {}
    result = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            found.append(Mistake(line, f"{where}: a key must be a word. Got {show(key)}."))
        elif key.value in seen:
            found.append(Mistake(line, f"{where}: {key.value} stands here twice (first on line {seen[key.value]})."))
        else:
            seen[key.value] = line
            result.append((key.value, value))
    return result


def nearest(word: str, known: list[str]) -> str:
    """A hint at the known words that look like `word`, else all of them."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"known: {', '.join(known) or 'none'}."


def show(node: yaml.Node) -> str:
    """A node as a short quotation."""
    if isinstance(node, yaml.ScalarNode):
        text = "nothing" if _is_null(node) else repr(node.value)
        return text if len(text) <= 60 else text[:57] + "..."
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def describe(hint: Any) -> str:
    """A type in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "empty"}
    parts: list[str] = []
    for option in choices(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if option in words:
            parts.append(words[option])
        elif origin is typing.Literal:
            parts += [str(argument) for argument in arguments]
        elif isinstance(option, type) and dataclasses.is_dataclass(option):
            parts.append(snake(option.__name__))
        elif origin in (list, tuple, collections.abc.Sequence):
            parts.append("a list")
        elif origin in (dict, collections.abc.Mapping):
            parts.append("a mapping")
        else:
            parts.append(getattr(option, "__name__", str(option)))
    return " or ".join(dict.fromkeys(parts))


def _dataclass_value(node: yaml.Node, members: tuple[type, ...], where: str, field: str) -> Any:
    """A dataclass written as its name, its short form, `{name: fields}` or (if there is but one) its fields; None if none of these."""
    by_name = {snake(member.__name__): member for member in members}
    if isinstance(node, yaml.ScalarNode):
        if node.value in by_name:
            return build(by_name[node.value], None, where, f"{field}.", at=node)
        problems: list[str] = []
        for member in members:
            if hasattr(member, "parse"):
                try:
                    return typing.cast(Any, member).parse(_scalar(node))
                except SettingsError as error:
                    problems += error.problems
        if problems and len(by_name) == 1:
            raise Mistakes([Mistake(node.start_mark.line + 1, f"{where}: {field}: {problem}") for problem in problems])
        return None
    if isinstance(node, yaml.MappingNode):
        if len(node.value) == 1 and node.value[0][0].value in by_name:
            key, value = node.value[0]
            return build(by_name[key.value], value, where, f"{field}.", at=key)
        if len(members) == 1:
            return build(members[0], node, where, f"{field}.")
        keys = [str(key.value) for key, _ in node.value]
        raise mistake(
            node, f"{where}: {field} must be one of these with its fields: {', '.join(by_name)}. Got {', '.join(keys) or 'nothing'}."
        )
    return None


def _plain_value(node: yaml.Node, hint: Any, where: str, field: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    wrong = mistake(node, f"{where}: {field} must be {describe(hint)}. Got {show(node)}.")
    if origin in (list, tuple, collections.abc.Sequence):
        if not isinstance(node, yaml.SequenceNode):
            raise wrong
        items = [argument for argument in arguments if argument is not ...] or [str]
        decoded = [decode(item, items[min(at, len(items) - 1)], where, f"{field}[{at}]") for at, item in enumerate(node.value)]
        return decoded if origin is list else tuple(decoded)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(node, yaml.MappingNode):
            raise wrong
        found: list[Mistake] = []
        result = {key: decode(value, arguments[1], where, f"{field}.{key}") for key, value in pairs(node, where, found)}
        if found:
            raise Mistakes(found)
        return result
    if not isinstance(node, yaml.ScalarNode):
        raise wrong
    if origin is typing.Literal:
        for argument in arguments:
            if node.value == str(argument):
                return argument
        raise wrong
    if hint is str and not _is_null(node):
        return node.value
    value = _scalar(node)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value if isinstance(value, float) else float(value)
    if hint not in (bool, int, float, str) and not isinstance(hint, types.GenericAlias):
        raise mistake(node, f"{where}: {field} can't be written in a recipe file ({describe(hint)}); build the recipe in Python.")
    raise wrong


def _scalar(node: yaml.ScalarNode) -> Any:
    """A scalar as YAML 1.2 reads numbers: 1e-3 is one (to PyYAML it isn't), 1:30 and 010 aren't."""
    if node.style is None:
        if re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
            return int(node.value)
        if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", node.value):
            return float(node.value)
        if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", node.value):
            return float(node.value.replace(".", ""))
        if node.value in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return node.value.lower() == "true"
    return node.value


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NOTHING


def _unknown(kind: str, shown: str, known: list[str], word: str) -> str:
    return f"there is no {kind} {shown}; {nearest(word, known)}"


def _line_of(problem: str, keys: dict[str, yaml.Node], at: yaml.Node) -> int:
    """The line of the field that a sentence names in the form "where: field must …", else that of the whole."""
    head = problem.split(" must ")[0]
    named = [key for key in keys if re.search(rf"\b{re.escape(key)}\b", head.split(": ")[-1])]
    return (keys[named[0]] if named else at).start_mark.line + 1


def _example(hints: dict[str, Any]) -> str:
    return ", ".join(f"{name}: …" for name in list(hints)[:2])
