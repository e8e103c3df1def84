"""The HTML page of a run and of several runs."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pared.core.errors import RunError
from pared.report import write_comparison, write_page
from pared.report.charts import Axis, Point, scatter, shorten
from pared.report.labels import Box, place

HOSTILE = "<script>alert('1')</script>$\\frac{&\x00\n"
ORIGINAL = (431_080, 2_293_000, 1_726_000, 0.1312, 0.9917)
COMPRESSED = (44_426, 375_000, 55_300, 0.0405, 0.9884)


def profile(numbers: tuple[int, int, int, float, float], split: str = "test", file: str = "small.onnx") -> dict:
    params, macs, file_bytes, median, accuracy = numbers
    return {
        "params": params,
        "nonzero": params,
        "macs": macs,
        "file_bytes": file_bytes,
        "wire_bytes": file_bytes * 9 // 10,
        "program_bytes": 700,
        "latency_ms": {"median": median, "p90": 1.1 * median, "batch": 1, "threads": 1, "engine": "onnxruntime"},
        "metric": {"name": "accuracy", "value": accuracy, "split": split, "file": file},
    }


def make_run(directory: Path, layers: int = 5, model: str = "lenet5") -> Path:
    """Write the files of an invented run."""
    directory.mkdir(parents=True, exist_ok=True)
    step = profile((131_000, 750_000, 527_000, 0.062, 0.9903), split="valid")
    result = {
        "schema": 1,
        "model": model,
        "data": "digits",
        "seed": 0,
        "original": profile(ORIGINAL, file="original.onnx"),
        "compressed": profile(COMPRESSED),
        "steps": [
            {"name": "prune.neurons", "settings": {"keep": 0.5}, "seconds": 42.1, "profile": step},
            {"name": "quantize.int8", "settings": {}, "seconds": 1.0, "profile": profile(COMPRESSED, split="valid")},
        ],
        "ratios": {"latency": 3.2},
        "drop": 0.0033,
        "budget": {"size": 0.1, "size_bytes": None, "latency": None, "drop": 0.01},
        "met": True,
    }
    entries = [{"path": f"features.{index}", "params": 10 * (index + 1), "macs": 1000 - index} for index in range(layers)]
    baselines = [
        {
            "name": "from scratch",
            "description": "The same architecture from random weights.",
            "profile": profile((44_426, 375_000, 55_300, 0.0405, 0.98)),
        }
    ]
    files = {
        "result.json": result,
        "baselines.json": baselines,
        "layers.json": {"original": entries, "compressed": [{**entry, "params": entry["params"] // 2} for entry in entries[1:]]},
        "environment.json": {"date": "2025-01-01", "versions": {"torch": "2.9"}, "threads": 1},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "recipe.yaml").write_text("steps:\n  - prune.neurons: {keep: 0.5}\n")
    return directory


def edit(directory: Path, **changes: object) -> None:
    path = directory / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Page(HTMLParser):
    """Tags, ids, references and text of a page; complains about tags that don't match."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    path = write_page(make_run(tmp_path))
    page = Page(path.read_text())
    assert path == tmp_path / "report.html"
    for said in (
        "31.2 times smaller, 3.2 times faster, 0.3 points less accurate on test",
        "file at most 0.1 of the original, accuracy at most 1 point lower. Met.",
        "Accuracy, validation",
        "42.1 s",
        "The same architecture from random weights.",
        "prune.neurons: {keep: 0.5}",
        "Accuracy was computed on the test split, read from small.onnx.",
        "Steps are measured on the validation split, the other networks on test",
        "batches of 1",
        "2.9",
    ):
        assert said in page.text
    # size, latency, parameters by layer, MACs by layer
    assert page.tags.count("figure") == 4


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    text = write_page(make_run(tmp_path)).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    # every address in the text would be one that a browser may fetch
    assert "http" not in text.replace("http-equiv", "")
    assert len(page.ids) == len(set(page.ids))


def test_charts_take_their_colours_from_the_page(tmp_path: Path) -> None:
    text = write_page(make_run(tmp_path)).read_text()
    charts = "".join(re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}\b", charts) == []
    used = set(re.findall(r"var\((--\w+)\)", text))
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark", 1)
    assert used <= set(re.findall(r"(--\w+):", light))
    assert used <= set(re.findall(r"(--\w+):", dark.split("@media print")[0]))


def contrast(first: str, second: str) -> float:
    """The contrast of two colours as WCAG 2.1 defines it."""

    def luminance(colour: str) -> float:
        channels = (int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))
        linear = [channel / 12.92 if channel <= 0.03928 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_all_text_colours_reach_contrast_aa_in_light_dark_and_print(tmp_path: Path) -> None:
    text = write_page(make_run(tmp_path)).read_text()
    palettes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)]
    assert len(palettes) == 3
    for palette, name in itertools.product(palettes, ("ink", "muted", "accent", "rival", "good", "bad")):
        assert contrast(palette[name], palette["paper"]) >= 4.5, name
        assert contrast(palette["ink"], palette["panel"]) >= 4.5


def test_same_run_same_bytes(tmp_path: Path) -> None:
    first = write_page(make_run(tmp_path / "a")).read_bytes()
    assert write_page(make_run(tmp_path / "b")).read_bytes() == first


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    directory = make_run(tmp_path, model=HOSTILE)
    step = {"name": HOSTILE, "profile": profile((3, 4, 5, 0.06, 0.5))}
    edit(directory, data=HOSTILE, steps=[step])
    (directory / "layers.json").write_text(json.dumps({"original": [{"path": HOSTILE, "params": 4}], "compressed": []}))
    (directory / "baselines.json").write_text(
        json.dumps([{"name": HOSTILE, "description": HOSTILE, "profile": profile((4, 4, 4, 0.4, 0.4))}])
    )
    (directory / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (directory / "recipe.yaml").write_text("<script>")
    page = Page(write_page(directory).read_text())
    assert "script" not in page.tags
    assert "<script>alert('1')</script>" in page.text


def test_half_a_character_in_a_name_is_no_crash(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    edit(directory, model="\ud800")
    assert "? on digits" in write_page(directory).read_text()


@pytest.mark.parametrize("name", ["baselines.json", "layers.json", "environment.json", "recipe.yaml"])
def test_a_file_that_is_missing_is_left_out(tmp_path: Path, name: str) -> None:
    directory = make_run(tmp_path)
    (directory / name).unlink()
    heading = {"baselines.json": "Baselines", "layers.json": "Layer by layer", "environment.json": "Environment", "recipe.yaml": "Recipe"}[
        name
    ]
    page = Page(write_page(directory).read_text())
    assert heading not in page.texts
    assert "Original" in page.text


def test_null_fields_leave_out_their_part(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    empty = dict.fromkeys(("params", "nonzero", "macs", "file_bytes", "wire_bytes", "latency_ms", "metric"))
    steps = [{"name": "quantize.int8", "settings": None, "seconds": None, "profile": None}]
    edit(directory, original=empty, compressed=empty, steps=steps, ratios=None, drop=None, budget=None, met=None, seed=None)
    (directory / "baselines.json").unlink()
    page = Page(write_page(directory).read_text())
    assert "Nothing was measured in this run" in page.text
    assert "Budget" not in page.text
    # only the layers still have charts
    assert page.tags.count("figure") == 2


def test_a_missed_budget_is_said(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    edit(directory, met=False)
    assert "Not met; what was reached stands below." in Page(write_page(directory).read_text()).text


@pytest.mark.parametrize(("layers", "hidden"), [(3, 0), (25, 0), (26, 1), (200, 175)])
def test_many_layers_are_cut_to_the_largest(tmp_path: Path, layers: int, hidden: int) -> None:
    text = write_page(make_run(tmp_path, layers=layers)).read_text()
    parameters = text[text.index("Parameters by layer</figcaption>") : text.index("MACs by layer</figcaption>")]
    shown = re.findall(r">features\.(\d+)</text>", parameters)
    # parameters grow with the index, so the last ones are the largest, and they stand in order
    assert [int(name) for name in shown] == list(range(hidden, layers))
    words = {0: None, 1: "1 more layer is not", 175: "175 more layers are not"}[hidden]
    assert (words in text) if words else ("more layer" not in text)


def test_a_layer_that_is_gone_ends_at_zero(tmp_path: Path) -> None:
    assert "features.0: 10 to 0" in write_page(make_run(tmp_path)).read_text()


def test_comparison_links_to_the_pages_of_the_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("prune", "a b#c")]
    for run in runs:
        write_page(run)
    edit(runs[1], compressed=profile((9, 9, 9_000, 0.2, 0.99)), ratios={}, drop=0.0017)
    page = Page(write_comparison(tmp_path, runs).read_text())
    assert [link for link in page.links if not link.startswith("#")] == ["prune/report.html", "a%20b%23c/report.html"]
    assert ("2 recipes: up to 192 times smaller (a b#c, 0.17 points less) and 3.2 times faster (prune, 0.33 points less)") in page.text
    assert "192 times smaller, 1.5 times slower in spite of 254,778 times fewer MACs, 0.2 points less accurate on test" in page.text
    assert page.tags.count("figure") == 2


def test_comparison_of_nothing_or_onto_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least one run"):
        write_comparison(tmp_path, [])
    directory = make_run(tmp_path / "run")
    with pytest.raises(RunError, match="is one of the runs to compare"):
        write_comparison(directory, [directory])
    assert not (directory / "report.html").exists()


def test_a_damaged_result_is_named_and_leaves_no_page(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    edit(directory, compressed={"macs": "many"})
    with pytest.raises(RunError, match=r"result\.json: compressed\.macs must be a finite number"):
        write_page(directory)
    assert not (directory / "report.html").exists()


def test_chart_of_points_that_coincide() -> None:
    points = [Point("a", 1.0, 0.5, "original"), Point("b", 1.0, 0.5, "compressed")]
    assert scatter(points, Axis("x", str), Axis("y", str), "t", "k").count("<text") >= 4


def test_labels_keep_off_each_other_and_inside() -> None:
    frame = Box(0, 0, 300, 200)
    points = [(150.0 + 7 * index, 100.0) for index in range(6)]
    places = place(points, [(40, 12)] * 6, frame)
    for first, second in itertools.combinations(places, 2):
        assert first.box.overlap(second.box) == 0
    assert all(chosen.box.outside(frame) == 0 for chosen in places)


def test_a_label_at_the_right_edge_turns_to_the_left() -> None:
    (chosen,) = place([(95, 50)], [(30, 10)], Box(0, 0, 100, 100))
    assert chosen.box.right < 95


def test_shorten_at_its_length() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abc…fg"
    assert shorten("a\nb\x00", 9) == "a\ufffdb\ufffd"
