"""Recipes as YAML files: read with every mistake named by its line, written so that reading gives the same recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pared.core.errors import SettingsError
from pared.core.files import write_atomic
from pared.core.method import Method, Recipe
from pared.recipe.decode import NOTHING, Mistake, Mistakes, build, decode, mistake, nearest, pairs, show
from pared.recipe.methods import METHODS, method_name, settings
from pared.training import Train

_DEEPEST = 20  # levels; PyYAML's time grows with the square of the depth
_LARGEST = 100_000  # bytes; a recipe is a page, and a damaged or wrong file shouldn't be parsed for minutes


def read(path: str | Path, methods: Sequence[type] = METHODS) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: the file.
        methods: the classes that the file can name.

    Raises:
        SettingsError: with all mistakes of the file, each as "file.yaml:7: prune.neurons: keep must be …".

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    ...     _ = file.write("steps: [prune.weights: {keep: 0.1}, quantize.int8]")
    ...     file.flush()
    ...     read(file.name).steps[0].keep
    0.1
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise SettingsError(f"{path}: there is no such recipe file.") from None
    except OSError as error:
        raise SettingsError(f"{path}: can't be read ({error.strerror}).") from None
    if len(content) > _LARGEST:
        raise SettingsError(f"{path}: is {len(content):,} bytes long, which is no recipe (at most {_LARGEST:,}).")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not a text file in UTF-8 ({error.reason} at byte {error.start}).") from None
    return loads(text, str(path), methods)


def write(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as YAML; fields that have their default are left out.

    Raises:
        RunError: if the file can't be written.
    """
    write_atomic(path, dumps(recipe))


def loads(text: str, name: str = "recipe", methods: Sequence[type] = METHODS) -> Recipe:
    """Read a recipe from YAML text; `name` stands for the file in messages.

    Raises:
        SettingsError: with all mistakes, each with its line.

    >>> loads("steps: [prune.weights: {keep: 2}]", "my.yaml")
    Traceback (most recent call last):
    pared.core.errors.SettingsError: my.yaml:1: prune.weights: keep must be ...
    """
    try:
        return _recipe(_compose(text), methods)
    except Mistakes as error:
        raise SettingsError([f"{name}:{line}: {problem}" for line, problem in sorted(error.found)]) from None


def dumps(recipe: Recipe) -> str:
    """A recipe as YAML text, one step a line.

    >>> from pared.prune import Weights
    >>> print(dumps(Recipe(Weights(keep=0.2))), end="")
    steps:
      - prune.weights: {keep: 0.2}
    """
    lines = [f"train: {_flow(settings(recipe.train, only_changed=True))}"] if recipe.train is not None else []
    lines.append("steps:" if recipe.steps else "steps: []")
    for step in recipe.steps:
        fields = settings(step, only_changed=True)
        lines.append(f"  - {method_name(step)}" + (f": {_flow(fields)}" if fields else ""))
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Quotes the words that a recipe reads as no value and YAML doesn't."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """A text; quoted where it would be taken for nothing."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if data in NOTHING else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _flow(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**9).strip()


def _compose(text: str) -> yaml.MappingNode:
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise Mistakes([Mistake(event.start_mark.line + 1, f"this is nested more than {_DEEPEST} deep, which no recipe is.")])
            # an alias can blow a page up to gigabytes, and a recipe has no use for one
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise Mistakes(
                    [Mistake(event.start_mark.line + 1, "anchors and aliases (& and *) can't be used here; write the value out.")]
                )
            if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None):
                raise Mistakes([Mistake(event.start_mark.line + 1, f"tags such as {event.tag} can't be used here.")])  # pyright: ignore
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Mistakes([Mistake(mark.line + 1 if mark else 1, f"this is not YAML: {error.problem or error.context}.")]) from None
    except yaml.YAMLError as error:
        raise Mistakes([Mistake(1, f"this is not YAML: {str(error).splitlines()[0]}.")]) from None
    if root is None:
        raise Mistakes([Mistake(1, "the file is empty. A recipe has a list of steps, such as `steps: [quantize.int8]`.")])
    if not isinstance(root, yaml.MappingNode):
        raise mistake(root, f"a recipe must be a mapping with the keys train and steps. Got {show(root)}.")
    return root


def _recipe(root: yaml.MappingNode, methods: Sequence[type]) -> Recipe:
    found: list[Mistake] = []
    steps: list[Method] = []
    train: Train | None = None
    entries = dict(pairs(root, "recipe", found))
    for key, node in entries.items():
        try:
            if key == "train":
                train = decode(node, Train | None, "train", "train")
            elif key == "steps":
                steps = _steps(node, methods, found)
            else:
                found.append(Mistake(node.start_mark.line + 1, f"recipe: there is no key {key}; {nearest(key, ['train', 'steps'])}"))
        except Mistakes as error:
            found += error.found
    if "steps" not in entries:
        found.append(Mistake(root.start_mark.line + 1, "recipe: steps is missing."))
    if found:
        raise Mistakes(found)
    return Recipe(*steps, train=train)


def _steps(node: yaml.Node, methods: Sequence[type], found: list[Mistake]) -> list[Method]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise mistake(
            node, f"recipe: steps must be a list of methods. Got {'an empty list' if isinstance(node, yaml.SequenceNode) else show(node)}."
        )
    steps = []
    for step in node.value:
        try:
            steps.append(_step(step, methods))
        except Mistakes as error:
            found += error.found
    return steps


def _step(node: yaml.Node, methods: Sequence[type]) -> Method:
    by_name = {method_name(method): method for method in methods}
    if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        key, value = node.value[0]
    elif isinstance(node, yaml.ScalarNode):
        key, value = node, None
    else:
        what = f"{len(node.value)} keys" if isinstance(node, yaml.MappingNode) else show(node)
        raise mistake(
            node, f"recipe: a step must be one method and its settings, such as `quantize.int8: {{calibration: 512}}`. Got {what}."
        )
    if not isinstance(key, yaml.ScalarNode) or key.value not in by_name:
        shown = key.value if isinstance(key, yaml.ScalarNode) else show(key)
        raise mistake(key, f"recipe: there is no method {shown!r}; {nearest(str(shown), list(by_name))}")
    return build(by_name[key.value], value, key.value, at=key)
