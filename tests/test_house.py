"""The house rules: which package imports which, what is public, how long things may be, which words don't belong here."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pared

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "pared").rglob("*.py"))
# the keywords of these two are the options of one command
MANY_PARAMETERS = {"recipe/runner.py:compress", "cli/main.py:compress"}


def names(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "pared").as_posix()


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{names(path)}:{node.name}", node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def test_imports_go_only_downward() -> None:
    # in a process of its own: the linter's logging set-up switches every other logger off
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Contracts:" in run.stdout
    assert "0 broken" in run.stdout


def test_public_names_exist_and_are_these() -> None:
    assert pared.__all__ == [
        "Accuracy", "Budget", "CaptureError", "DataError", "FileError", "Journal", "Machine", "Method", "ModelError", "ParedError",
        "Recipe", "Result", "RunError", "SettingsError", "Task", "Train", "TrainingError", "WeightsError", "__version__",
        "architecture", "bake", "codec", "compress", "data", "distill", "dynamic", "evaluate", "fit", "graph", "load", "measure",
        "prune", "quantize", "recipe", "report", "runtime", "training",
    ]  # fmt: skip
    assert dir(pared) == pared.__all__
    assert all(getattr(pared, name) is not None for name in pared.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = pared.prunes


@pytest.mark.parametrize(
    "statement", ["import pared", "import pared.cli.main", "import pared.core.method, pared.core.files, pared.core.units"]
)
def test_light_imports_stay_light(statement: str) -> None:
    heavy = "[name for name in ('torch', 'onnx', 'onnxruntime', 'matplotlib', 'lightning_fabric', 'numpy') if name in sys.modules]"
    found = subprocess.run([sys.executable, "-c", f"import sys; {statement}; print({heavy})"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_files_are_short() -> None:
    lengths = {names(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_functions_are_short() -> None:
    def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        documented = ast.get_docstring(function) is not None
        first = function.body[1] if documented and len(function.body) > 1 else function.body[0]
        return function.end_lineno - first.lineno + 1  # type: ignore[operator]

    assert {name: length(function) for name, function in functions() if length(function) > 60} == {}


def test_functions_take_few_parameters() -> None:
    many = {name for name, function in functions() if len(parameters(function)) > 8}
    assert many == MANY_PARAMETERS


def test_functions_are_annotated() -> None:
    bare = [name for name, function in functions() if function.returns is None and function.name != "__init__"]
    bare += [
        f"{name}({argument.arg})" for name, function in functions() for argument in parameters(function) if argument.annotation is None
    ]
    assert bare == []


def test_modules_say_what_they_are() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not tree.body or names(path) == "core/__init__.py":
            continue
        assert ast.get_docstring(tree), f"{names(path)} has no docstring"
        later = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        has_future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
        assert has_future or not later, f"{names(path)} doesn't import annotations from __future__"


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [names(path) for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


# in two parts, so that this file doesn't find itself
FORBIDDEN = [
    "TO" + "DO", "FIX" + "ME", "X" * 3, r"\bHA" + "CK", r"glob" + r"als\(\)", "/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/",
    "py" + "pi.org", "pythonho" + "sted", "extra-in" + "dex", "tru" + "sted-host",
]  # fmt: skip


def texts() -> list[Path]:
    kinds = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.txt", "*.j2", "*.css", "*.json")
    folders = ("src", "tests", "docs", "recipes", "requirements", "benchmarks", ".ci")
    found = [path for folder in folders for kind in kinds for path in (ROOT / folder).rglob(kind)]
    return [*found, *ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("word", FORBIDDEN)
def test_words_that_do_not_belong_here(word: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        if path.suffix != ".json" or "benchmarks" in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(word, line)
    ]
    assert found == []


def test_constraints_are_plain_versions_of_what_is_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        line for line in (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    needed = {re.split(r"[><=\[]", name)[0] for name in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    assert needed <= pinned
    assert not any("<" in requirement for requirement in project["dependencies"])


def test_version_is_that_of_the_changelog() -> None:
    assert f"## {pared.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_package_can_be_imported_alone() -> None:
    packages = [path.parent for path in SOURCES if path.name == "__init__.py"]
    for package in packages:
        importlib.import_module(".".join(package.relative_to(ROOT / "src").parts))
