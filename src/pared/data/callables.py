"""Functions that a user names on the command line: `package.module:callable` or `path/file.py:callable`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pared.core.errors import ParedError


def is_callable_spec(spec: str) -> bool:
    """Whether `spec` has the form of a named function.

    >>> is_callable_spec("my.nets:tiny"), is_callable_spec("nets.py:tiny"), is_callable_spec("lenet5")
    (True, True, False)
    """
    place, _, name = spec.rpartition(":")
    return name.isidentifier() and (place.endswith(".py") or all(part.isidentifier() for part in place.split(".")))


def call(spec: str, arguments: dict[str, Any], error: type[ParedError]) -> Any:
    """Import the function that `spec` names and call it.

    Args:
        spec: `package.module:callable` or `path/file.py:callable`.
        arguments: keyword arguments; those that the function doesn't take are left out.
        error: what is raised.

    Raises:
        ParedError: of the class `error`, if the function can't be found, or raises: with its message and source line.
    """
    place, _, name = spec.rpartition(":")
    module = _from_file(Path(place), error) if place.endswith(".py") else _from_package(place, error)
    function = getattr(module, name, None)
    if not callable(function):
        reason = f"has no function {name}" if function is None else f"{name} can't be called"
        raise error(f"{place}: {reason}. Write it as package.module:callable or path/file.py:callable.")
    try:
        return function(**_accepted(function, arguments))
    except ParedError:
        raise
    except Exception as failure:
        raise error(f"{spec}: {_describe(failure)}") from failure


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    return {name: value for name, value in arguments.items() if name in names}


def _from_file(path: Path, error: type[ParedError]) -> ModuleType:
    if not path.is_file():
        raise error(f"{path}: no such file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise error(f"{path}: can't be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as failure:
        raise error(f"{path}: {_describe(failure)}") from failure
    return module


def _from_package(name: str, error: type[ParedError]) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as failure:
        if failure.name is not None and (name == failure.name or name.startswith(f"{failure.name}.")):
            raise error(f"{name}: no such module. Install it, add its folder to PYTHONPATH, or write path/file.py:callable.") from failure
        raise error(f"{name}: {_describe(failure)}") from failure
    except Exception as failure:
        raise error(f"{name}: {_describe(failure)}") from failure


def _describe(failure: Exception) -> str:
    """The failure's message, and the last line of a user's file that led to it."""
    message = f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__
    if isinstance(failure, SyntaxError):
        return f"{message}."
    frames = traceback.extract_tb(failure.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(("<frozen", __file__))]
    own = [frame for frame in outside if "site-packages" not in frame.filename] or outside
    return f"{message} ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})." if own else f"{message}."
