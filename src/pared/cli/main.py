"""The command `pared`: what can be said on the command line, and nothing else; each command's work is imported when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="pared",
    help="Cuts a trained PyTorch network down to fit a device, and measures the file that it hands back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_MODEL_HELP = "A reference network such as lenet5, timm:NAME, hf:NAME, package.module:callable or path/file.py:callable."
_DATA_HELP = "digits, fashion-mnist, mnist-10k, cifar10, a folder of images, or package.module:callable that returns a Task."
Model = Annotated[str, typer.Argument(help=_MODEL_HELP)]
Data = Annotated[str, typer.Option("--data", metavar="DATA", help=_DATA_HELP)]
Weights = Annotated[Path | None, typer.Option("--weights", metavar="FILE", help="Weights of MODEL, .safetensors or .pt.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads for training; by default all cores.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where to put the runs and the page.")] = Path("pared-demo"),
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    # networks this small gain nothing from a second thread
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads for training.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a demonstration that was stopped.")] = False,
) -> None:
    """Take one small network through the five families.

    On handwritten digits, in under two minutes on two cores; leaves a table and a page.
    """

    def work() -> int:
        from pared.cli.demo import demo

        return demo(out, seed=seed, json=json, quiet=quiet, threads=threads, resume=resume)

    _carry_out(work, hint="--resume")


@app.command()
def compress(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The run directory.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="A recipe in YAML.")] = None,
    size: Annotated[str | None, typer.Option(help="Limit of the file's size: 1/10 of the original's, or 250kB.")] = None,
    latency: Annotated[str | None, typer.Option(help="Limit of the latency: 1/3 of the original's.")] = None,
    drop: Annotated[str | None, typer.Option(help="Limit of the loss of accuracy: 1% is one point.")] = None,
    weights: Weights = None,
    trained: Annotated[bool, typer.Option("--trained", help="MODEL comes with trained weights of its own.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR.")] = False,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Also train from scratch and prune at random.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Measure latency for a short time only.")] = False,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
    devices: Annotated[str, typer.Option(help="How many devices, or auto for all.")] = "1",
    precision: Annotated[str, typer.Option(help="32-true, 16-mixed or bf16-mixed.")] = "32-true",
) -> None:
    """Compress MODEL by a recipe, or down to limits.

    Measures the deployed file beside the original, and ends with status 1 if a limit is not met.
    """

    def work() -> int:
        from pared.cli.compress import Request, compress

        request = Request(
            model=model, data=data, out=out, recipe=recipe, limits=(size, latency, drop), weights=weights, trained=trained, resume=resume,
            baselines=baselines, quick=quick, seed=seed, json=json, quiet=quiet, threads=threads, machine=(device, devices, precision),
        )  # fmt: skip
        return compress(request)

    _carry_out(work, hint="--resume")


@app.command()
def profile(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help=_DATA_HELP)] = None,
    weights: Weights = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show parameters, MACs, bytes and time by layer.

    And size and latency of the whole file.
    """

    def work() -> int:
        from pared.cli.network import show_profile

        return show_profile(model, data, weights, seed=seed, json=json)

    _carry_out(work)


@app.command()
def plan(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help=_DATA_HELP)] = None,
    weights: Annotated[Path | None, typer.Option("--weights", metavar="FILE", help="Of --sensitivity: weights of MODEL.")] = None,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Cut one class at a time and measure what is lost.")] = False,
    shares: Annotated[str | None, typer.Option(help="Of --sensitivity: what to keep of a class, such as 0.75,0.5,0.25.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Of --sensitivity: draw it, .svg or .png.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show what can be cut, what can't, and why.

    Nothing is changed. With --sensitivity: what each class of neurons matters to the validation metric.
    """

    def work() -> int:
        if sensitivity:
            from pared.cli.plan_sensitivity import Request, show_sensitivity

            return show_sensitivity(Request(model, data, weights, shares, picture, seed, json))
        from pared.cli.network import show_plan
        from pared.cli.plan_sensitivity import refuse_alone

        refuse_alone({"--weights": weights, "--shares": shares, "--picture": picture})
        return show_plan(model, data, seed=seed, json=json)

    _carry_out(work)


@app.command()
def bench(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help="Where inputs come from; by default the run's data.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the engine.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Measure for a short time only.")] = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Time original and small of a run, interleaved.

    On the engine that the run was measured with.
    """

    def work() -> int:
        from pared.cli.bench import bench

        return bench(directory, data, threads=threads, quick=quick, seed=seed, json=json)

    _carry_out(work)


Source = Annotated[Path, typer.Argument(help="A .pared file.")]
Target = Annotated[Path, typer.Option("-o", "--out", metavar="DST", help="Where to write.")]
Workers = Annotated[int, typer.Option("--threads", min=1, help="Threads that work on tensors at once.")]


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="An .onnx or .safetensors file, of pared or not.")],
    target: Target,
    prefer: Annotated[str, typer.Option(help="Codings that may be chosen: auto, smallest, static, huffman or raw.")] = "auto",
    threads: Workers = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pack SOURCE into a small .pared file.

    Without losing a bit of it; the file is read back and compared before it appears.
    """

    def work() -> int:
        from pared.cli.packing import pack

        return pack(source, target, prefer, threads=threads, json=json, quiet=quiet)

    _carry_out(work)


@app.command()
def unpack(source: Source, target: Target, threads: Workers = 1, json: Json = False, quiet: Quiet = False) -> None:
    """Unpack a .pared file.

    To the .onnx or .safetensors file that it was made from.
    """

    def work() -> int:
        from pared.cli.packing import unpack

        return unpack(source, target, threads=threads, json=json, quiet=quiet)

    _carry_out(work)


@app.command()
def inspect(
    source: Source,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw it, .svg or .png.")] = None,
    json: Json = False,
) -> None:
    """Show where the bytes of a .pared file go.

    Tensor by tensor: coding, bytes and bits; all of the file is checked on the way.
    """

    def work() -> int:
        from pared.cli.packing import inspect

        return inspect(source, picture, json=json)

    _carry_out(work)


lab = typer.Typer(help="The experiments: claims, and what came out.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lab, name="lab")


@lab.command("list")
def lab_list(json: Json = False) -> None:
    """List the experiments with claim and outcome."""

    def work() -> int:
        from pared.cli.lab import list_experiments

        return list_experiments(json)

    _carry_out(work)


@lab.command("run")
def lab_run(
    name: Annotated[str, typer.Argument(help="One of `pared lab list`.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the result goes, row by row.")],
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting; repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR.")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Put the result into the experiment's folder and card.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment; a stopped one goes on with --resume."""

    def work() -> int:
        from pared.cli.lab import run_experiment

        return run_experiment(name, out, changes or (), resume=resume, commit=commit, json=json, quiet=quiet)

    _carry_out(work, hint="--resume")


@lab.command("report")
def lab_report(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; by default all.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write a Markdown page.")] = None,
    json: Json = False,
) -> None:
    """Print the committed results, or write them as one page."""

    def work() -> int:
        from pared.cli.lab import report

        return report(names or (), out, json)

    _carry_out(work)


def _show_version(wanted: bool) -> None:
    if wanted:
        from pared import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Cut a trained PyTorch network down to fit a device, and measure the file that is handed back."""


def main() -> None:
    """Entry point of the command `pared`."""
    # read when torch is imported: idle threads that spin steal time from the engine's threads, and from each other on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app(prog_name="pared")


def _carry_out(work: Callable[[], Any], hint: str | None = None) -> None:
    """Call `work` and leave with its exit status; a user's mistake is a message with status 2, Ctrl-C is 130."""
    from pared.core.errors import ParedError

    try:
        status = work()
    except ParedError as error:
        typer.echo(f"pared: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        again = f" Go on with: {' '.join(_quoted(sys.argv))}" if hint else ""
        again += f" {hint}" if hint and hint not in sys.argv else ""
        typer.echo(f"pared: stopped.{again}", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(status or 0)


def _quoted(arguments: list[str]) -> list[str]:
    import shlex

    return ["pared", *(shlex.quote(argument) for argument in arguments[1:])]
