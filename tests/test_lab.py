from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from pared.cli.lab import parse_settings
from pared.cli.main import app
from pared.core.errors import RunError, SettingsError
from pared.core.files import locked
from pared.lab import Results, Row, Verdict, entries, entry, run
from pared.lab.catalogue import BEGIN, END, Entry, page, rendered, with_results
from pared.lab.experiment import Progress, configured, judge, settings


@dataclasses.dataclass(frozen=True)
class Squares:
    name: ClassVar[str] = "squares"
    claim: ClassVar[str] = "All squares are below ten."

    factor: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    wait: float = 0.0

    def keys(self) -> tuple[str, ...]:
        return tuple(str(seed) for seed in self.seeds)

    def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
        for key in self.keys():
            if key not in done:
                yield {"key": key, "square": self.factor * int(key) ** 2}
                time.sleep(self.wait)

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        most = max(row["square"] for row in rows)
        return Verdict("reproduced" if most < 10 else "did not reproduce", f"The largest is {most}.", (("rows",), (str(len(rows)),)))


def test_rows_verdict_and_origin_are_written(tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    results = run(Squares(), tmp_path, command="pared lab run squares", progress=lambda event: events.append(dict(event)))
    content = json.loads((tmp_path / "result.json").read_text())
    assert [row["square"] for row in content["rows"]] == [0, 1, 4]
    assert content["verdict"] == {"outcome": "reproduced", "text": "The largest is 4.", "figures": [["rows"], ["3"]]}
    assert content["command"] == "pared lab run squares"
    assert content["settings"] == {"factor": 1, "seeds": [0, 1, 2], "wait": 0.0}
    assert {"torch", "processor", "python", "date"} <= set(content["environment"])
    assert [event["index"] for event in events] == [1, 2, 3]
    assert all(len(row["code"]) == 12 for row in results.rows)
    assert Results.read(tmp_path / "result.json") == results


def test_a_claim_that_does_not_hold_is_a_result(tmp_path: Path) -> None:
    assert run(Squares(seeds=(1, 4)), tmp_path).verdict["outcome"] == "did not reproduce"


def test_missing_rows_are_said(tmp_path: Path) -> None:
    assert judge(Squares(), [])["outcome"] == "unfinished"
    found = judge(Squares(), [{"key": "1", "square": 1}])
    assert found["outcome"] == "unfinished"
    assert found["text"] == "2 rows are missing. So far: The largest is 1."


def test_a_result_is_not_overwritten(tmp_path: Path) -> None:
    run(Squares(), tmp_path)
    with pytest.raises(RunError, match="holds a result already"):
        run(Squares(), tmp_path)
    assert len(run(Squares(), tmp_path, resume=True).rows) == 3


def test_two_processes_do_not_measure_in_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunError, match="another process is working in it"):
        run(Squares(), tmp_path)
    run(Squares(), tmp_path)
    with pytest.raises(RunError, match=r"result\.json: can't be made \(.*\)\. Choose another --out\."):
        run(Squares(), tmp_path / "result.json")


def test_rows_of_other_settings_or_versions_are_not_mixed(tmp_path: Path) -> None:
    run(Squares(seeds=(0,)), tmp_path)
    with pytest.raises(RunError, match=r"another factor \(1 then, 2 now\), another seeds"):
        run(Squares(factor=2), tmp_path, resume=True)
    path = tmp_path / "result.json"
    found = Results.read(path)
    dataclasses.replace(found, environment={**found.environment, "torch": "0.1", "date": "2001-01-01"}).write(path)
    with pytest.raises(RunError, match="another torch"):
        run(Squares(seeds=(0,)), tmp_path, resume=True)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += (
        f"from pathlib import Path; from test_lab import Squares; from pared.lab import run; run(Squares(wait=60.0), Path({str(out)!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    while not (out / "result.json").exists() and child.poll() is None:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = json.loads((out / "result.json").read_text())
    assert [row["key"] for row in before["rows"]] == ["0"]
    assert before["verdict"]["outcome"] == "unfinished"
    path = out / "result.json"
    found = Results.read(path)
    dataclasses.replace(found, settings={**found.settings, "wait": 0.0}).write(path)
    after = run(Squares(), out, resume=True)
    assert [row["key"] for row in after.rows] == ["0", "1", "2"]
    assert after.rows[0] == before["rows"][0]
    assert sorted(file.name for file in out.iterdir()) == ["result.json"]


def test_a_row_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    class Twice(Squares):
        def run(self, progress: Progress, out: Path, done: frozenset[str]) -> Iterator[Row]:
            yield {"key": "0", "square": 0}
            yield {"key": "0", "square": 0}

    with pytest.raises(RunError, match="'0' is not one of those"):
        run(Twice(), tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}', '{"schema": 9, "rows": []}', '{"schema": 1, "rows": 3}'])
def test_a_damaged_result_is_a_run_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(RunError, match=r"result\.json"):
        Results.read(tmp_path / "result.json")


def test_settings_can_be_changed_by_name() -> None:
    changed = configured(Squares(), {"factor": 3, "seeds": [5]})
    assert changed == Squares(factor=3, seeds=(5,))
    assert settings(changed) == {"factor": 3, "seeds": [5], "wait": 0.0}
    with pytest.raises(SettingsError, match=r"frames is no setting\. Settings are factor, seeds, wait"):
        configured(Squares(), {"frames": 3})
    with pytest.raises(SettingsError, match=r"must be NAME=VALUE\. Got 'factor'"):
        parse_settings(["factor"])
    with pytest.raises(SettingsError, match="NAME=VALUE"):
        parse_settings(["seeds=[1"])


def test_a_card_shows_what_was_found(tmp_path: Path) -> None:
    results = run(Squares(), tmp_path / "out")
    (tmp_path / "squares").mkdir()
    card = f"# Squares\n\n## Claim\n\nAll squares\nare below ten.\n\n## Result\n\n{BEGIN}\nold\n{END}\nThe end.\n"
    (tmp_path / "squares" / "card.md").write_text(card)
    (tmp_path / "squares" / "run.py").write_text("")
    (found,) = entries(tmp_path)
    assert found.claim == "All squares are below ten."
    assert found.results is None
    found.commit(results)
    assert found.results == results
    assert "**Reproduced.** The largest is 4." in found.card
    assert "| rows |\n| --- |\n| 3 |" in found.card
    assert "old" not in found.card
    assert found.card.endswith("The end.\n")
    assert with_results(found.card, results) == found.card
    assert page((found,)).startswith("# Results of the lab\n\n## squares\n\nAll squares are below ten.\n\n**Reproduced.**")
    with pytest.raises(RunError, match="lacks the lines"):
        with_results("# Squares", results)
    with pytest.raises(RunError, match="results of 'squares'"):
        Entry("cubes", tmp_path).commit(results)


@pytest.mark.parametrize("found", entries(), ids=lambda found: found.name)
def test_committed_cards_and_results_agree(found: Entry) -> None:
    experiment = found.load()
    assert experiment.name == found.name
    assert experiment.claim == found.claim
    results = found.results
    if results is not None:
        assert results.claim == experiment.claim
        assert results.verdict == judge(configured(experiment, results.settings), results.rows)
        assert f"{BEGIN}\n\n{rendered(results)}\n{END}" in found.card


def test_unknown_experiments_are_named() -> None:
    with pytest.raises(SettingsError, match=r"no experiment 'cover'\. Experiments are .*coverage"):
        entry("cover")


def test_the_command_lists_and_reports(tmp_path: Path) -> None:
    runner = CliRunner()
    listed = json.loads(runner.invoke(app, ["lab", "list", "--json"]).stdout)
    assert "coverage" in [each["name"] for each in listed]
    assert "coverage: " in runner.invoke(app, ["lab", "list"]).stdout
    out = tmp_path / "page.md"
    assert runner.invoke(app, ["lab", "report", "-o", str(out)]).exit_code == 0
    assert out.read_text().startswith("# Results of the lab")
    assert runner.invoke(app, ["lab", "report", "--json"]).exit_code == 0
    wrong = runner.invoke(app, ["lab", "run", "cover", "-o", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "no experiment" in wrong.stderr


def test_listing_imports_no_torch() -> None:
    code = "import sys; from pared.cli.lab import list_experiments; list_experiments(True)\n"
    code += "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("[]")
