"""The methods that a recipe file can name, the names they have there, and their settings as plain values."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from pared.architecture import LowRank, Separable
from pared.distill import Generations, Mutual, Teach
from pared.dynamic import Exits
from pared.prune import Blocks, GroupLasso, GrowingRegularization, Movement, Neurons, Regrow, Weights
from pared.quantize import Bits, Clusters, Int8, Integers, Rate, Rounding
from pared.training import Train

METHODS: tuple[type, ...] = (
    Neurons,
    Blocks,
    GroupLasso,
    GrowingRegularization,
    Weights,
    Movement,
    Regrow,
    Teach,
    Generations,
    Mutual,
    Int8,
    Bits,
    Integers,
    Rounding,
    Clusters,
    Rate,
    LowRank,
    Separable,
    Exits,
    Train,
)


def snake(name: str) -> str:
    """A class name in lower snake case.

    >>> snake("LowRank"), snake("Int8")
    ('low_rank', 'int8')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def method_name(method: object | type) -> str:
    """The name of a method in a recipe file: its package and its class.

    >>> method_name(Neurons), method_name(LowRank(energy=0.9))
    ('prune.neurons', 'architecture.low_rank')
    """
    kind = method if isinstance(method, type) else type(method)
    parts = kind.__module__.split(".")
    package = parts[1] if parts[0] == "pared" and len(parts) > 1 else parts[-1]
    return f"{package}.{snake(kind.__name__)}"


def settings(method: object, *, only_changed: bool = False) -> dict[str, Any]:
    """The fields of a method as values that JSON and YAML can hold.

    Args:
        method: any dataclass.
        only_changed: leave out fields that have their default value.

    >>> settings(Weights(keep=0.2), only_changed=True)
    {'keep': 0.2}
    """
    hints = field_types(type(method))
    return {
        field.name: _plain(getattr(method, field.name), hints[field.name], only_changed)
        for field in dataclasses.fields(typing.cast(Any, method))
        if field.init and not (only_changed and _is_default(field, getattr(method, field.name)))
    }


def field_types(kind: type) -> dict[str, Any]:
    """The fields that a dataclass's constructor takes, with their resolved types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone; protocols, for objects of the user's own, are no choices of a file."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return (hint,)
    return tuple(member for member in typing.get_args(hint) if not getattr(member, "_is_protocol", False))


def dataclass_choices(hint: Any) -> tuple[type, ...]:
    """The dataclasses among the members of a type."""
    return tuple(choice for choice in choices(hint) if isinstance(choice, type) and dataclasses.is_dataclass(choice))


def is_unit(kind: type) -> bool:
    """Whether a dataclass is one number with a short form, such as `Epochs`."""
    return hasattr(kind, "parse") and len(dataclasses.fields(kind)) == 1


def _is_default(field: dataclasses.Field[Any], value: object) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(type(field.default) is type(value) and field.default == value)
    return field.default_factory is not dataclasses.MISSING and field.default_factory() == value


def _plain(value: Any, hint: Any, only_changed: bool) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, Any, only_changed) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, Any, only_changed) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if is_unit(type(value)):
            return getattr(value, dataclasses.fields(value)[0].name)
        fields = settings(value, only_changed=only_changed)
        if dataclass_choices(hint) == (type(value),):
            return fields
        return {snake(type(value).__name__): fields} if fields else snake(type(value).__name__)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"
