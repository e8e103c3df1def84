"""Which charts a report shows of which profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pared.report import words
from pared.report.charts import Axis, Bar, Kind, Point, bars, scatter
from pared.report.run import Layer, Profile, Run

MOST_LAYERS = 25


@dataclass(frozen=True)
class Network:
    """A network that a chart may show."""

    label: str
    profile: Profile
    kind: Kind


@dataclass(frozen=True)
class Chart:
    """An SVG, what stands above it and what stands below it."""

    caption: str
    svg: Markup
    note: str | None = None


@dataclass(frozen=True)
class Charts:
    """Charts that share a key, and the kinds of points that appear in them."""

    charts: tuple[Chart, ...]
    kinds: frozenset[Kind]


def networks_of(run: Run) -> list[Network]:
    """Original, steps, compressed and baselines of one run, in that order.

    The last step is left out if it measured the very network that is the compressed one.
    """
    steps = [Network(step.name, step.profile, "step") for step in run.steps]
    if steps and steps[-1].profile.file_bytes == run.compressed.file_bytes:
        steps.pop()
    rivals = [Network(baseline.name, baseline.profile, "baseline") for baseline in run.baselines]
    return [Network("original", run.original, "original"), *steps, Network("compressed", run.compressed, "compressed"), *rivals]


def quality_charts(networks: Sequence[Network]) -> Charts:
    """Quality against file size and against latency, as far as both were measured for at least two networks."""
    measures: tuple[tuple[str, str, Callable[[Profile], float | None], Callable[[float], str]], ...] = (
        ("file size", "size", lambda profile: profile.file_bytes, words.size),
        ("latency", "latency", lambda profile: profile.latency.median if profile.latency else None, words.milliseconds),
    )
    name = next((network.profile.metric.name for network in networks if network.profile.metric), "metric")
    share = all(network.profile.metric.is_share for network in networks if network.profile.metric)
    write = (lambda value: f"{100 * value:.4g} %") if share else (lambda value: f"{value:.4g}")
    charts, kinds = [], set()
    for title, key, read, unit in measures:
        points = [
            Point(network.label, x, network.profile.metric.value, network.kind)
            for network in networks
            if network.profile.metric is not None and network.profile.metric.name == name and (x := read(network.profile))
        ]
        if len(points) < 2:
            continue
        kinds |= {point.kind for point in points}
        told = "; ".join(f"{point.label}: {unit(point.x)}, {write(point.y)}" for point in points)
        svg = scatter(points, Axis(title, unit), Axis(name, write), f"{name.capitalize()} against {title}. {told}.", key)
        charts.append(Chart(f"{name.capitalize()} against {title}", svg))
    return Charts(tuple(charts), frozenset(kinds))


def notes_on(networks: Iterable[Network]) -> list[str]:
    """What a reader must know so as not to compare points that can't be compared."""
    networks = list(networks)
    final = {network.profile.metric.where for network in networks if network.kind != "step" and network.profile.metric}
    between = {network.profile.metric.where for network in networks if network.kind == "step" and network.profile.metric}
    notes = []
    if between - final and all(final | between):
        splits = f"the {_joined(between)} split, the other networks on {_joined(final)}"
        notes.append(f"Steps are measured on {splits}; heights differ for that reason too.")
    return notes


def _joined(splits: set[str]) -> str:
    return " and ".join(sorted(splits))


def layer_charts(layers: tuple[Sequence[Layer], Sequence[Layer]]) -> list[Chart]:
    """Parameters and multiply-accumulates by layer; of many layers the largest `MOST_LAYERS` are shown, in the network's order."""
    before, after = ({layer.path: layer for layer in side} for side in layers)
    paths = [*before, *(path for path in after if path not in before)]
    charts = []
    for name, key, read in (
        ("Parameters", "layer-params", lambda layer: layer.params if layer else 0),
        ("MACs", "layer-macs", lambda layer: layer.macs if layer else 0),
    ):
        rows = [Bar(path or "(the model itself)", read(before.get(path)), read(after.get(path))) for path in paths]
        rows = [row for row in rows if row.before or row.after]
        if not rows:
            continue
        largest = sorted(range(len(rows)), key=lambda index: (-max(rows[index].before, rows[index].after), index))[:MOST_LAYERS]
        shown = [rows[index] for index in sorted(largest)]
        told = f"{name} by layer, original and compressed. " + "; ".join(
            f"{row.label}: {words.count(row.before)} to {words.count(row.after)}" for row in shown
        )
        hidden = len(rows) - len(shown)
        note = f"The {MOST_LAYERS} largest are shown; {hidden} more {'layer is' if hidden == 1 else 'layers are'} not." if hidden else None
        charts.append(Chart(f"{name} by layer", bars(shown, words.count, told, key), note))
    return charts
