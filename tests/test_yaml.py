"""Recipes in YAML: what can be written, how mistakes are told, and that reading what was written gives the same recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import example, given, settings, strategies
from torch import nn

from pared.core.errors import SettingsError
from pared.core.method import Recipe
from pared.core.problems import Problems
from pared.core.units import Bytes, Epochs, Ratio
from pared.recipe import yaml as recipe_yaml
from pared.recipe.methods import METHODS, method_name
from pared.recipe.methods import settings as settings_of


@dataclass(frozen=True)
class Size:
    order: int = 2


@dataclass(frozen=True)
class HowOften:
    pass


@dataclass(frozen=True)
class Plan:
    epochs: int = 1
    rate: float = 0.1

    def __post_init__(self) -> None:
        problems = Problems("plan")
        problems.number("epochs", self.epochs, low=0, integer=True)
        problems.raise_if_any()

    @classmethod
    def parse(cls, text: str | int) -> Plan:
        return cls(epochs=Epochs.parse(text).count)


@dataclass(frozen=True)
class CutUp:
    keep: float = 0.5
    score: Size | HowOften = Size()
    tune: Plan | None = None
    leave: tuple[str, ...] = ()
    scope: Literal["global", "layer"] = "global"
    warmup: Epochs = Epochs(0)
    limit: Bytes | Ratio | None = None
    exact: bool = False
    bits: int = 8
    weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        problems = Problems("test_yaml.cut_up")
        problems.number("keep", self.keep, low=0, high=1)
        problems.number("bits", self.bits, low=2, high=8, integer=True)
        problems.raise_if_any()

    def __call__(self, model: nn.Module, task: object) -> nn.Module:
        return model


@dataclass(frozen=True)
class Needs:
    rank: int

    def __call__(self, model: nn.Module, task: object) -> nn.Module:
        return model


TOYS = (CutUp, Needs)


def loads(text: str) -> Recipe:
    return recipe_yaml.loads(text, "r.yaml", TOYS)


def step(fields: str) -> object:
    return loads(f"steps: [test_yaml.cut_up: {{{fields}}}]").steps[0]


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        loads(text)
    return caught.value.problems


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ("", CutUp()),
        ("keep: 1", CutUp(keep=1.0)),
        ("keep: 1e-3", CutUp(keep=0.001)),
        ("keep: .5", CutUp(keep=0.5)),
        ("score: size", CutUp(score=Size())),
        ("score: how_often", CutUp(score=HowOften())),
        ("score: {size: {order: 1}}", CutUp(score=Size(order=1))),
        ("score: {how_often: {}}", CutUp(score=HowOften())),
        ("score: {size: }", CutUp(score=Size())),
        ("tune: 2ep", CutUp(tune=Plan(epochs=2))),
        ("tune: 3", CutUp(tune=Plan(epochs=3))),
        ("tune: {epochs: 2, rate: 1e-2}", CutUp(tune=Plan(2, 0.01))),
        ("tune: {plan: {rate: 1}}", CutUp(tune=Plan(rate=1.0))),
        ("tune: null", CutUp()),
        ("leave: [a.b, 'on']", CutUp(leave=("a.b", "on"))),
        ("leave: [on, 1]", CutUp(leave=("on", "1"))),
        ("scope: layer", CutUp(scope="layer")),
        ("warmup: 2 epochs", CutUp(warmup=Epochs(2))),
        ("limit: 1.5MB", CutUp(limit=Bytes(1_500_000))),
        ("limit: 1/10", CutUp(limit=Ratio(0.1))),
        ("exact: true", CutUp(exact=True)),
        ("weights: {conv: 0.5, fc: 2}", CutUp(weights={"conv": 0.5, "fc": 2.0})),
    ],
)
def test_values(fields: str, value: CutUp) -> None:
    found = step(fields)
    assert found == value
    assert type(found.keep) is float  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("keep: half", "test_yaml.cut_up: keep must be a number. Got 'half'."),
        ("keep: true", "test_yaml.cut_up: keep must be a number. Got 'true'."),
        ("keep: '0.5'", "test_yaml.cut_up: keep must be a number. Got '0.5'."),
        ("keep: ", "test_yaml.cut_up: keep must be a number. Got nothing."),
        ("keep: [1]", "test_yaml.cut_up: keep must be a number. Got a list."),
        ("keep: 1.5", "test_yaml.cut_up: keep must be a number at least 0 and at most 1. Got 1.5."),
        ("bits: 4.0", "test_yaml.cut_up: bits must be a whole number. Got '4.0'."),
        ("bits: 010", "test_yaml.cut_up: bits must be a whole number. Got '010'."),
        ("exact: yes", "test_yaml.cut_up: exact must be true or false. Got 'yes'."),
        ("scope: everywhere", "test_yaml.cut_up: scope must be global or layer. Got 'everywhere'."),
        ("leave: conv1", "test_yaml.cut_up: leave must be a list. Got 'conv1'."),
        ("leave: [[a]]", "test_yaml.cut_up: leave[0] must be a word. Got a list."),
        ("score: sise", "test_yaml.cut_up: score must be size or how_often. Got 'sise'."),
        ("score: {sise: {}}", "test_yaml.cut_up: score must be one of these with its fields: size, how_often. Got sise."),
        ("score: {size: {ordr: 1}}", "test_yaml.cut_up: there is no field score.ordr; did you mean order?"),
        ("score: {size: {order: x}}", "test_yaml.cut_up: score.order must be a whole number. Got 'x'."),
        ("tune: 2 days", "test_yaml.cut_up: tune: epochs must be written like 2 or 2ep. Got '2 days'."),
        ("tune: {epochs: -1}", "plan: epochs must be a whole number at least 0. Got -1."),
        ("kep: 1", "test_yaml.cut_up: there is no field kep; did you mean keep?"),
        ("keep: 1, keep: 1", "test_yaml.cut_up: keep stands here twice (first on line 1)."),
        ("[a]: 1", "test_yaml.cut_up: a key must be a word. Got a list."),
        ("limit: big", "test_yaml.cut_up: limit must be bytes or ratio or empty. Got 'big'."),
        ("weights: {a: b}", "test_yaml.cut_up: weights.a must be a number. Got 'b'."),
        ("weights: 3", "test_yaml.cut_up: weights must be a mapping or empty. Got '3'."),
    ],
)
def test_mistake_in_a_field(fields: str, message: str) -> None:
    assert problems_of(f"steps: [test_yaml.cut_up: {{{fields}}}]") == (f"r.yaml:1: {message}",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: the file is empty."),
        ("# only a remark\n", "r.yaml:1: the file is empty."),
        ("- a", "r.yaml:1: a recipe must be a mapping with the keys train and steps. Got a list."),
        ("word", "r.yaml:1: a recipe must be a mapping"),
        ("steps: []", "r.yaml:1: recipe: steps must be a list of methods. Got an empty list."),
        ("steps: {a: 1}", "r.yaml:1: recipe: steps must be a list of methods. Got a mapping."),
        ("train: 1ep", "r.yaml:1: recipe: steps is missing."),
        ("step: [a]\nsteps: [test_yaml.cut_up]", "r.yaml:1: recipe: there is no key step; did you mean steps?"),
        ("steps:\n - test_yaml.cutup", "r.yaml:2: recipe: there is no method 'test_yaml.cutup'; did you mean test_yaml.cut_up?"),
        ("steps: [3]", "r.yaml:1: recipe: there is no method '3'; known: test_yaml.cut_up, test_yaml.needs."),
        ("steps: [[a]]", "r.yaml:1: recipe: a step must be one method and its settings"),
        ("steps:\n  - test_yaml.cut_up:\n    keep: 0.5", "r.yaml:2: recipe: a step must be one method and its settings"),
        (
            "steps: [test_yaml.cut_up: 5]",
            "r.yaml:1: test_yaml.cut_up: its settings must be a mapping such as {keep: …, score: …}. Got '5'.",
        ),
        ("steps: [test_yaml.needs]", "r.yaml:1: test_yaml.needs: rank is missing."),
        ("steps: [a\n", "r.yaml:2: this is not YAML: expected"),
        ("steps: &a [test_yaml.cut_up]\nb: *a", "r.yaml:1: anchors and aliases"),
        (
            "steps: !!python/object/apply:os.system [ls]",
            "r.yaml:1: tags such as tag:yaml.org,2002:python/object/apply:os.system can't be used",
        ),
        ("a: 1\n---\nb: 2", "r.yaml:2: this is not YAML: but found another document."),
        ("steps:\n " + "[" * 50_000, "r.yaml:2: this is nested more than 20 deep"),
        ("a: \x00", "r.yaml:1: this is not YAML"),
    ],
)
def test_mistake_in_the_file(text: str, message: str) -> None:
    assert any(problem.startswith(message) for problem in problems_of(text)), problems_of(text)


def test_all_mistakes_are_shown_together_in_the_order_of_lines() -> None:
    text = "train: {epoch: 2}\nsteps:\n  - test_yaml.cut_up:\n      bits: 1\n      keep: 7\n  - nonsense\n  - test_yaml.needs: {rank: x}\n"
    assert [problem.split(": ")[0] for problem in problems_of(text)] == ["r.yaml:1", "r.yaml:4", "r.yaml:5", "r.yaml:6", "r.yaml:7"]


def test_anchors_do_not_expand() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20))
    assert problems_of(bomb)[0].startswith("r.yaml:1: anchors")


@given(
    strategies.builds(
        CutUp,
        keep=strategies.floats(0, 1),
        score=strategies.one_of(strategies.builds(Size, order=strategies.integers(-5, 5)), strategies.just(HowOften())),
        tune=strategies.none() | strategies.builds(Plan, epochs=strategies.integers(0, 9), rate=strategies.floats(allow_nan=False)),
        leave=strategies.lists(strategies.text(max_size=5), max_size=3).map(tuple),
        scope=strategies.sampled_from(["global", "layer"]),
        warmup=strategies.builds(Epochs, strategies.integers(0, 9)),
        limit=strategies.none() | strategies.builds(Bytes, strategies.integers(0, 10**9)),
        exact=strategies.booleans(),
        weights=strategies.none()
        | strategies.dictionaries(strategies.text("ab.1~", min_size=1, max_size=3), strategies.floats(-1, 1), max_size=2),
    )
)
@example(CutUp(leave=("None", "none", "~", "", "null", "yes", "1e3", "2ep")))
@settings(max_examples=100, deadline=None)
def test_round_trip(method: CutUp) -> None:
    text = recipe_yaml.dumps(Recipe(method))
    again = loads(text)
    assert again == Recipe(method)
    assert recipe_yaml.dumps(again) == text


@given(strategies.text(max_size=60) | strategies.text(":-{}[]&*!'\"\n kepst", max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_recipe_or_a_settings_error(text: str) -> None:
    problems: tuple[str, ...] = ()
    try:
        assert isinstance(loads(text), Recipe)
    except SettingsError as error:
        problems = error.problems
    assert all(problem.startswith("r.yaml:") for problem in problems)


def test_files(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    recipe_yaml.write(Recipe(CutUp(keep=0.25)), folder / "a.yaml")
    assert (folder / "a.yaml").read_text() == "steps:\n  - test_yaml.cut_up: {keep: 0.25}\n"
    assert recipe_yaml.read(folder / "a.yaml", TOYS) == Recipe(CutUp(keep=0.25))
    with pytest.raises(SettingsError, match=r"b\.yaml: there is no such recipe file"):
        recipe_yaml.read(folder / "b.yaml")
    with pytest.raises(SettingsError, match="can't be read"):
        recipe_yaml.read(folder)
    (folder / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not a text file in UTF-8"):
        recipe_yaml.read(folder / "c.yaml")
    (folder / "d.yaml").write_text("#" * 200_000)
    with pytest.raises(SettingsError, match="200,000 bytes long"):
        recipe_yaml.read(folder / "d.yaml")


def test_settings_are_plain_and_complete() -> None:
    found = settings_of(CutUp(tune=Plan(2), limit=Bytes(1234567)))
    assert found == {
        "keep": 0.5,
        "score": {"size": {"order": 2}},
        "tune": {"epochs": 2, "rate": 0.1},
        "leave": [],
        "scope": "global",
        "warmup": 0,
        "limit": 1234567,
        "exact": False,
        "bits": 8,
        "weights": None,
    }


def test_every_method_has_a_name_of_its_own() -> None:
    names = [method_name(method) for method in METHODS]
    assert names == [
        "prune.neurons",
        "prune.blocks",
        "prune.group_lasso",
        "prune.growing_regularization",
        "prune.weights",
        "prune.movement",
        "prune.regrow",
        "distill.teach",
        "distill.generations",
        "distill.mutual",
        "quantize.int8",
        "quantize.bits",
        "quantize.integers",
        "quantize.rounding",
        "quantize.clusters",
        "quantize.rate",
        "architecture.low_rank",
        "architecture.separable",
        "dynamic.exits",
        "training.train",
    ]
