"""The documentation is run: code, commands, recipes, tables of fields and options, links."""

from __future__ import annotations

import dataclasses
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from pared.architecture import nets
from pared.architecture.load import load_model
from pared.cli.main import app
from pared.distill import Teach
from pared.recipe import METHODS, loads, method_name

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md"]
COMMANDS: Any = typer.main.get_command(app)


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language in a page, with the line on which each begins."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def section(path: Path, title: str) -> str:
    """The text below a heading of the second level."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert match is not None, f"{path.name} has no section {title}"
    return match[1]


@pytest.mark.parametrize("path", [page for page in PAGES if blocks(page, "python")], ids=lambda path: path.name)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page are one program; its lines are numbered as in the page."""
    monkeypatch.chdir(tmp_path)
    program = ""
    for line, code in blocks(path, "python"):
        program += "\n" * (line - program.count("\n")) + code
    script = tmp_path / f"{path.stem}.py"
    script.write_text(program, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("path", [page for page in TEXTS if blocks(page, "console")], ids=lambda path: path.name)
def test_commands_parse(path: Path) -> None:
    for _, text in blocks(path, "console"):
        for line in text.splitlines():
            assert line.startswith("$ pared "), line
            name, *arguments = shlex.split(line.removeprefix("$ pared "))
            command = COMMANDS.get_command(typer.Context(COMMANDS), name)
            assert command is not None, line
            # parses and checks every option, and runs nothing
            given = command.make_context(name, arguments).params
            if given.get("data") == "digits" and "model" in given:
                assert load_model(given["model"], classes=10, channels=1, size=8)


@pytest.mark.parametrize("path", [page for page in TEXTS if blocks(page, "yaml")], ids=lambda path: path.name)
def test_recipes_are_read(path: Path) -> None:
    for line, text in blocks(path, "yaml"):
        assert loads(text, f"{path.name}+{line}").steps


@pytest.mark.parametrize("method", METHODS, ids=method_name)
def test_tables_of_fields_are_those_of_the_methods(method: type) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section(ROOT / "docs" / "methods.md", method_name(method)), flags=re.MULTILINE)
    expected = [(field.name, repr(_default(field))) for field in dataclasses.fields(method) if field.init]
    assert [(name, text.replace('"', "'")) for name, text in rows] == [(name, _short(text)) for name, text in expected]


def _default(field: dataclasses.Field) -> object:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]


def _short(text: str) -> str:
    """A plan's repr has all its fields; the tables write those that matter."""
    if text == repr(Teach()):
        return "Teach()"
    return re.sub(r"Train\((epochs=\d+),.*\)", r"Train(\1)", text)


def test_every_method_has_a_section_and_no_other() -> None:
    titles = re.findall(r"^## (\S+)$", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(titles) == sorted(method_name(method) for method in METHODS)


@pytest.mark.parametrize("name", sorted(COMMANDS.commands))
def test_tables_of_options_are_those_of_the_commands(name: str) -> None:
    documented = set(re.findall(r"`(--[\w-]+)`", "\n".join(_table_rows(section(ROOT / "docs" / "command-line.md", f"pared {name}")))))
    options = [parameter for parameter in COMMANDS.commands[name].params if parameter.param_type_name == "option"]
    assert documented == {text for option in options for text in (*option.opts, *option.secondary_opts) if text.startswith("--")} - {
        "--help"
    }


def _table_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| `")]


def _anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.is_file(), target
        assert not anchor or anchor in _anchors(linked), target


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES} - {"index.md"} == set(re.findall(r"\]\((\w[\w-]*\.md)\)", index))


def test_every_reference_network_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")))
    assert set(nets.__all__) <= named


def test_every_error_has_a_section() -> None:
    from pared.core import errors

    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    kinds = [name for name in vars(errors) if name.endswith("Error") and name != "ParedError"]
    assert len(kinds) == 8
    for name in kinds:
        assert re.search(rf"^##+ {name}$", text, flags=re.MULTILINE), name
