"""Runs: what is checked before, what is left behind, what result.json says, and that a stopped run ends with the same bytes."""

from __future__ import annotations

import copy
import dataclasses
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from torch import nn

from pared import codec
from pared.core.errors import DataError, ModelError, RunError, SettingsError, WeightsError
from pared.core.method import Recipe
from pared.core.units import Bytes, Ratio
from pared.prune import Random
from pared.prune import Weights as PruneWeights
from pared.recipe import Budget, Result, compress
from pared.recipe.run_directory import RunDirectory
from pared.training import Task, Train


@dataclass(frozen=True)
class Widest:
    """Keep the hidden units with the largest weights."""


@dataclass(frozen=True)
class Halve:
    """Keep half of the hidden units of `toy`, then train."""

    importance: Widest | Random = Widest()
    tune: Train = Train(epochs=2, learning_rate=0.01)

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        small: Any = copy.deepcopy(model)
        first, last = small[0], small[2]
        scores = torch.rand(len(first.weight)) if isinstance(self.importance, Random) else first.weight.abs().sum(1)
        keep = scores.topk(len(scores) // 2).indices.sort().values
        first.weight, first.bias = nn.Parameter(first.weight.detach()[keep]), nn.Parameter(first.bias.detach()[keep])
        last.weight = nn.Parameter(last.weight.detach()[:, keep].clone())
        first.out_features = last.in_features = len(keep)
        task.tune(small, self.tune)
        return small


RECIPE = Recipe(Halve(), PruneWeights(keep=0.5), train=Train(epochs=3, learning_rate=0.01))


def toy() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def toy_task(**changes: Any) -> Task:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(96, 6, generator=generator)
    targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)
    batches = list(zip(inputs.split(16), targets.split(16), strict=True))
    return Task(**{"train": batches[:4], "valid": batches[4:5], "test": batches[5:], "name": "toy", **changes})


def run(out: Path, recipe: Recipe = RECIPE, task: Task | None = None, **options: Any) -> Result:
    return compress(toy(), task or toy_task(), recipe, out, **{"quick": True, "baselines": False, "model_name": "mlp", **options})


def keys(content: Any) -> Any:
    return {key: keys(value) for key, value in content.items()} if isinstance(content, dict) else None


def measured(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what depends on the clock."""
    content = json.loads(json.dumps(result))
    for each in [content["original"], content["compressed"], *(step["profile"] for step in content["steps"])]:
        del each["latency_ms"]
    for step in content["steps"]:
        del step["seconds"]
    del content["ratios"]["latency"]
    return content


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    """Timing for the sake of the fields, not of the numbers: no warming up, no second measurement."""
    with pytest.MonkeyPatch.context() as patch:
        timing = importlib.import_module("pared.measure.latency")
        patch.setattr(timing, "WARM_UP", 0.0)
        patch.setattr(timing, "FOREIGN", float("inf"))
        yield


FINISHED: dict[str, Any] = {"baselines": True, "budget": Budget(size=Ratio(0.01), drop=1.0)}
SEEN: list[str] = []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, with baselines and a budget that can't be met; its events go to SEEN."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    torch.set_num_threads(1)
    run(out, task=toy_task(report=lambda event: SEEN.append(event["event"])), **FINISHED)
    return out


PROFILE = {
    "params": None,
    "nonzero": None,
    "macs": None,
    "file_bytes": None,
    "wire_bytes": None,
    "program_bytes": None,
    "latency_ms": dict.fromkeys(["median", "p90", "batch", "threads", "engine"]),
    "metric": dict.fromkeys(["name", "value", "split", "file"]),
}


def test_result_is_schema_1(finished: Path) -> None:
    content = json.loads((finished / "result.json").read_text())
    assert list(content) == ["schema", "model", "data", "seed", "original", "compressed", "steps", "ratios", "drop", "budget", "met"]
    assert (content["schema"], content["model"], content["data"], content["seed"]) == (1, "mlp", "toy", 0)
    assert keys(content["original"]) == keys(content["compressed"]) == PROFILE
    for step in content["steps"]:
        assert list(step) == ["name", "settings", "seconds", "profile"]
        assert keys(step["profile"]) == PROFILE
        assert step["profile"]["metric"]["split"] == "valid"
    assert [step["name"] for step in content["steps"]] == ["test_runner.halve", "prune.weights"]
    assert content["steps"][0]["settings"]["importance"] == "widest"
    assert set(content["ratios"]) == {"params", "macs", "file_bytes", "wire_bytes", "latency"}


def test_numbers_are_those_of_the_files(finished: Path) -> None:
    content = json.loads((finished / "result.json").read_text())
    # 6·16+16 + 16·3+3 parameters; half of the units; then half of the weights, biases stay
    assert content["original"]["params"] == 163
    assert content["compressed"]["params"] == 6 * 8 + 8 + 8 * 3 + 3
    assert content["original"]["macs"] == 6 * 16 + 16 * 3
    assert content["compressed"]["nonzero"] <= 36 + 11
    for name, file in (("original", "original.onnx"), ("compressed", "small.onnx")):
        assert content[name]["file_bytes"] == (finished / file).stat().st_size
        assert content[name]["wire_bytes"] == (finished / file).with_suffix(".pared").stat().st_size
        assert content[name]["program_bytes"] == codec.inspect((finished / file).with_suffix(".pared")).program
        assert content[name]["metric"]["file"] == file
        assert content[name]["metric"]["split"] == "test"
    assert content["ratios"]["params"] == pytest.approx(163 / 83, abs=1e-4)
    assert content["drop"] == pytest.approx(content["original"]["metric"]["value"] - content["compressed"]["metric"]["value"])
    assert content["budget"] == {"size": 0.01, "size_bytes": None, "latency": None, "drop": 1.0}
    assert content["met"] is False
    weights = [onnx.numpy_helper.to_array(each) for each in onnx.load(finished / "small.onnx").graph.initializer]
    assert sum(int(np.count_nonzero(each)) for each in weights if each.dtype == np.float32) == content["compressed"]["nonzero"]


def test_result_can_be_read_back(finished: Path) -> None:
    result = Result.read(finished)
    assert result.to_dict() == json.loads((finished / "result.json").read_text())
    assert result.limits == {"size": False, "drop": True}


def test_directory_holds_everything(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "recipe.yaml",
        "events.jsonl",
        "checkpoints",
        "steps",
        "original.onnx",
        "original.pared",
        "small.onnx",
        "small.pared",
    }
    assert names >= {"small.safetensors", "result.json", "baselines.json", "layers.json", "environment.json", "run.json"}
    assert not [path for path in finished.rglob("*") if path.name.endswith(".tmp")]
    assert [each["path"] for each in json.loads((finished / "layers.json").read_text())["compressed"]] == ["0", "2"]
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    assert [event["name"] for event in events if event["event"] == "stage"][:3] == ["00-train", "01-test_runner.halve", "02-prune.weights"]
    assert not [event for event in events if event["event"] == "batch"]
    with safe_open(str(finished / "small.safetensors"), "pt") as file:
        assert file.get_tensor("0.weight").shape == (8, 6)
        assert (file.get_tensor("0.weight") == 0).any()
        architecture = json.loads(file.metadata()["architecture"])
    assert architecture["modules"][1] == {
        "path": "0",
        "class": "torch.nn.modules.linear.Linear",
        "settings": "in_features=6, out_features=8, bias=True",
    }


def test_baselines(finished: Path) -> None:
    entries = json.loads((finished / "baselines.json").read_text())
    assert [entry["name"] for entry in entries] == ["scratch", "random"]
    small = json.loads((finished / "result.json").read_text())["compressed"]
    for entry in entries:
        assert list(entry) == ["name", "description", "profile"]
        assert keys(entry["profile"]) == PROFILE
        assert entry["profile"]["params"] == small["params"]
        assert entry["profile"]["metric"]["split"] == "test"
        assert (finished / "baselines" / entry["profile"]["metric"]["file"]).exists()


def test_model_and_random_state_are_left_alone(tmp_path: Path) -> None:
    model = toy().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(11)
    state = torch.get_rng_state()
    compress(model, toy_task(), Recipe(PruneWeights(keep=0.5)), tmp_path / "run", quick=True, baselines=False)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


class Stop(BaseException):
    """Not an Exception: nothing in pared may swallow it, as with Ctrl-C."""


def stop_at(number: int) -> tuple[list[str], Callable[[dict[str, Any]], None]]:
    seen: list[str] = []

    def report(event: dict[str, Any]) -> None:
        seen.append(event["event"])
        if len(seen) == number:
            raise Stop

    return seen, report


@pytest.mark.parametrize("moment", ["within the first epoch", "between epochs", "between stages", "while measuring"])
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(finished: Path, tmp_path: Path, moment: str) -> None:
    number = {
        "within the first epoch": 4,
        "between epochs": SEEN.index("epoch") + 2,
        "between stages": SEEN.index("stage", 15) + 2,
        "while measuring": SEEN.index("timed") + 3,
    }[moment]
    out = tmp_path / "run"
    # baselines come last, so only the last moment needs them
    options = {**FINISHED, "baselines": moment == "while measuring"}
    with pytest.raises(Stop):
        run(out, task=toy_task(report=stop_at(number)[1]), **options)
    assert not (out / "result.json").exists()
    seconds = [json.loads(path.read_text()) for path in sorted(out.rglob("seconds.json"))]
    again = run(out, resume=True, **options)
    assert measured(again.to_dict()) == measured(Result.read(finished).to_dict())
    assert [step.seconds for step in again.steps][: len(seconds)] == seconds
    for file in ("original.onnx", "small.onnx", "small.pared", "small.safetensors", "recipe.yaml"):
        assert (out / file).read_bytes() == (finished / file).read_bytes()
    if options["baselines"]:
        scratch = Path("baselines") / "scratch.onnx"
        assert (out / scratch).read_bytes() == (finished / scratch).read_bytes()


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_after(out: Path, events: int) -> None:
    """Start a run in a process of its own and kill it without warning once so many events are written down."""
    process = start(out)
    log, end = out / "events.jsonl", time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < end:
            if log.exists() and log.read_bytes().count(b"\n") >= events:
                break
            time.sleep(0.002)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_killed_process_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    run(tmp_path / "whole", recipe=main_recipe())
    kill_after(tmp_path / "killed", 6)
    with (tmp_path / "killed" / "events.jsonl").open("a") as file:
        file.write('{"event": "epo')  # as if the kill had come in the middle of a line
    (tmp_path / "killed" / ".small.onnx.abc.tmp").write_bytes(b"half")
    assert start(tmp_path / "killed").wait() == 0
    assert (tmp_path / "killed" / "small.onnx").read_bytes() == (tmp_path / "whole" / "small.onnx").read_bytes()
    whole, killed = Result.read(tmp_path / "whole").to_dict(), Result.read(tmp_path / "killed").to_dict()
    assert measured(killed) == measured(whole)
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    assert all(json.loads(line) for line in (tmp_path / "killed" / "events.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    run(tmp_path / "whole", recipe=main_recipe())
    generator = np.random.default_rng(5)
    for attempt in range(8):
        process = start(tmp_path / "killed")
        time.sleep(generator.uniform(2, 12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert attempt >= 0
    assert start(tmp_path / "killed").wait() == 0
    assert (tmp_path / "killed" / "small.onnx").read_bytes() == (tmp_path / "whole" / "small.onnx").read_bytes()


def main_recipe() -> Recipe:
    return Recipe(
        PruneWeights(keep=0.5, rounds=2, tune=Train(epochs=2)), PruneWeights(keep=0.25, tune=Train(epochs=2)), train=Train(epochs=3)
    )


def test_finished_run_is_read_and_says_so(finished: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    events: list[dict[str, Any]] = []
    again = run(finished, task=toy_task(report=events.append), resume=True, **FINISHED)
    assert again == Result.read(finished)
    assert events == [{"event": "finished", "directory": str(finished)}]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == written


def test_other_runs_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds a run already \(finished\). Go on with --resume"):
        run(finished, **FINISHED)
    for changes, difference in (
        ({"seed": 1}, "seed"),
        ({"model_name": "other"}, "model"),
        ({"budget": None}, "budget"),
        ({"recipe": Recipe(Halve(), train=RECIPE.train)}, "recipe"),
        ({"task": toy_task(name="others")}, "data"),
    ):
        with pytest.raises(RunError, match=rf"holds another run \({difference} differ\)"):
            run(finished, **{**FINISHED, "resume": True, **changes})
    with pytest.raises(RunError, match=r"\(weights differ\).*same seed"):
        compress(
            nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
            toy_task(),
            RECIPE,
            finished,
            model_name="mlp",
            resume=True,
            **FINISHED,
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        run(tmp_path / "mine", resume=True)
    with pytest.raises(RunError, match="is a file"):
        run(tmp_path / "mine" / "letter.txt")


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[: int(x.sum())]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"recipe": Recipe()}, SettingsError, "steps must be at least one"),
        ({"model": "nan"}, WeightsError, "NaN or infinity in 0.weight"),
        ({"model": nn.Linear(7, 3)}, ModelError, r"fails on inputs of shape \(2, 6\)"),
        ({"model": Nothing()}, ModelError, "Nothing"),
    ],
)
def test_nothing_is_left_behind_when_something_is_wrong(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = change.get("model", toy())
    if model == "nan":
        model = toy()
        model[0].weight.data[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(error, match=message):
        compress(model, toy_task(), change.get("recipe", RECIPE), tmp_path / "run", quick=True)
    assert not (tmp_path / "run").exists()


def test_wrong_labels_are_named(tmp_path: Path) -> None:
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 9]))]
    with pytest.raises(DataError, match="label 9"):
        run(tmp_path / "run", task=toy_task(train=batches))


def test_full_disk_leaves_a_run_that_resumes(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.replace, 0

    def full(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"the disk is full\. Free some space and run the same command again with --resume"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "small.onnx").read_bytes() == (finished / "small.onnx").read_bytes()


def test_full_disk_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    directory = RunDirectory(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"events\.jsonl: can't be written \(No space left on device\).*--resume"):
        directory.log({"event": "stage"})


def test_two_processes_keep_apart(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    with (
        directory.open({"seed": 0}, resume=False),
        pytest.raises(RunError, match="another process is working in it"),
        directory.open({"seed": 0}, resume=True),
    ):
        pass
    with directory.open({"seed": 0}, resume=True):
        assert json.loads((tmp_path / "run" / "run.json").read_text()) == {"seed": 0}


def test_other_weights_on_resuming_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "run", task=toy_task(report=stop_at(20)[1]))
    path = tmp_path / "run" / "checkpoints" / "00-train" / "weights.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": "0" * 64}))
    with pytest.raises(RunError, match="stage 00-train gave other weights than before"):
        run(tmp_path / "run", resume=True)


@dataclass(frozen=True)
class SquaredError:
    """A metric of which less is better."""

    name: str = "squared error"
    higher_is_better: bool = False

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - nn.functional.one_hot(targets, 3)).square().mean(1)


def test_drop_of_a_metric_that_should_be_low(tmp_path: Path) -> None:
    result = run(tmp_path / "run", recipe=Recipe(PruneWeights(keep=0.0)), task=toy_task(metric=SquaredError()))
    assert result.drop == pytest.approx(result.compressed.metric.value - result.original.metric.value)


@pytest.mark.parametrize(
    ("budget", "met"),
    [
        (Budget(size=Ratio(0.5)), {"size": True}),
        (Budget(size=Ratio(0.49)), {"size": False}),
        (Budget(size=Bytes(50)), {"size": True}),
        (Budget(size=Bytes(49)), {"size": False}),
        (Budget(latency=Ratio(0.25), drop=0.01), {"latency": True, "drop": True}),
        (Budget(drop=0.0), {"drop": False}),
    ],
)
def test_budget(budget: Budget, met: dict[str, bool]) -> None:
    assert budget.check((100, 50), (4.0, 1.0), 0.01) == met
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget


def test_budget_from_words() -> None:
    assert Budget.parse("1/10", "1/3", "1%") == Budget(Ratio(0.1), Ratio(1 / 3), 0.01)
    assert Budget.parse(size="250kB", drop="0") == Budget(size=Bytes(250_000), drop=0.0)
    with pytest.raises(SettingsError, match="--size: a ratio must be written like") as caught:
        Budget.parse(size="-3", latency="fast")
    assert len(caught.value.problems) == 2
    with pytest.raises(SettingsError, match="must be given"):
        Budget()
    with pytest.raises(SettingsError, match="drop must be a number at least 0"):
        Budget(drop=-1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    compress(toy(), dataclasses.replace(toy_task()), main_recipe(), sys.argv[1], model_name="mlp", quick=True, baselines=False, resume=True)
