"""The loop of pruning neurons: choose, cut, repair, tune, look whether it still holds, and again."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from pared.core.errors import SettingsError
from pared.core.layers import Layer
from pared.core.rules import WeightRule, find_rule
from pared.graph.analysis import Analysis, analyse
from pared.graph.counts import count
from pared.graph.cutting import Cut
from pared.graph.tracing import trace_or_capture
from pared.measure.deployed import Interleaved
from pared.prune.allocation import class_keys
from pared.prune.chooser import Chooser
from pared.prune.cost_table import CostTable
from pared.prune.least_squares import reconstruct
from pared.prune.repair import recalibrate
from pared.prune.targets import Cost, Counted, FileBytes, Reached, Trials, reach
from pared.prune.time_cost import Latency
from pared.training import Task, Train, evaluate

if TYPE_CHECKING:
    from pared.prune.neurons import Neurons

TEACHER_WEIGHT = 0.9
"""Of tuning by the original: the default of `distill.Teach`."""

UNITS: dict[str, Any] = {"neurons": "neuron", "macs": "macs", "latency": "macs", "parameters": "parameters", "bytes": "parameters"}
"""What a ranking over classes divides scores by, for each kind of target."""

_log = logging.getLogger(__name__)


def prune_in_rounds(settings: Neurons, model: nn.Module, task: Task) -> nn.Module:
    """Carry `settings` out on a copy of `model`.

    With a guard, the network before the first round that loses too much is returned. For a target of latency, a copy of the input is
    returned if the result isn't faster.

    Events: `{"event": "cut", "round", "rounds", "of", "macs", "original_macs"}` after every cut, with "target" and "reached" (shares of
    the original) where it had a target. With a guard, at the end of every round,
    `{"event": "guard", "round", "rounds", "metric", "value", "lost", "allowed", "holds"}`; the loop ends where it doesn't hold.
    """
    _check_rules(model)
    whole = copy.deepcopy(model).to(task.machine.device)
    example = task.example_inputs()
    chooser, left = _first_look(settings, whole, example, task)
    cost = cost_of(settings, whole, example, task)
    task = task if task.teacher is not None else dataclasses.replace(task, teacher=whole)
    before = evaluate(whole, task) if settings.guard is not None else 0.0
    macs = count(whole, example).macs
    result, own_class = whole, True
    for number in range(1, settings.rounds + 1):
        share = share_after(settings.keep, number / settings.rounds)
        trials = Trials(result, example, dataclasses.replace(chooser, keep=share), settings.leave if own_class else left)
        reached = _choose(trials, cost, share, task)
        place = {"round": number, "rounds": settings.rounds}
        target = {} if cost is None else {"target": share, "reached": reached.cost}
        now = count(reached.cut.model, example).macs
        task.report({"event": "cut", **place, "of": settings.of, "macs": now, "original_macs": macs, **target})
        if isinstance(cost, Latency) and number == settings.rounds and reached.cost >= 1:
            _log.warning("prune.neurons: no cut made the network faster (%.3g of its time), so it stays as it was.", reached.cost)
            return copy.deepcopy(model)
        small = _mended(settings, reached.cut, result, task)
        if settings.guard is not None:
            value = evaluate(small, task)
            lost = before - value if task.metric.higher_is_better else value - before
            holds = lost <= settings.guard  # never for NaN
            known = {"metric": task.metric.name, "value": value, "lost": lost, "allowed": settings.guard, "holds": holds}
            task.report({"event": "guard", **place, **known})
            if not holds:
                _log_guard(settings, task, number, lost)
                return result
        result, own_class = small, own_class and reached.cut.own_class
    return result


def _check_rules(model: nn.Module) -> None:
    """Say of layers whose weights are looked up in tables of shared values that no neuron can leave them."""
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, Layer)]
    held = [path for path, layer in layers if find_rule(layer, "weight", WeightRule) is not None and _is_table(layer)]
    if not held:
        return
    if len(held) == len(layers):
        raise SettingsError(
            "prune.neurons: the weights of all layers are clustered already, and no neuron can leave them. "
            "Prune before quantize.clusters, or take the clusters off first (pared.bake)."
        )
    _log.warning("prune.neurons: no neuron can leave %s, whose weights are clustered already.", ", ".join(held))


def _is_table(layer: Layer) -> bool:
    """Whether what lies behind the weight has another shape, so that it has no rows and columns to lose."""
    return layer.get_parameter("parametrizations.weight.original").shape != layer.weight.shape


def share_after(keep: float | Mapping[str, float], progress: float) -> float | Mapping[str, float]:
    """The share to keep when a part of the rounds is done, so that every round removes the same share of what is left.

    >>> share_after(0.25, 0.5)
    0.5
    """
    if isinstance(keep, Mapping):
        return {path: float(share) ** progress for path, share in keep.items()}
    return float(keep) ** progress


def cost_of(settings: Neurons, model: nn.Module, example: tuple[Any, ...], task: Task) -> Cost | None:
    """What the share is a share of, if it isn't neurons."""
    match settings.of:
        case "macs" | "parameters":
            return Counted(settings.of, model, example)
        case "bytes":
            return FileBytes(model, task)
        case "latency":
            measure = Interleaved(model, task)
            return Latency(measure, measure.alone(), CostTable())
        case "neurons":
            return None


def _first_look(settings: Neurons, model: nn.Module, example: tuple[Any, ...], task: Task) -> tuple[Chooser, tuple[str, ...]]:
    """A chooser that refers to the present sizes, and the layers whose outputs `leave` keeps.

    A rewritten network has no modules but those with parameters. So that what is left stays in later rounds too, a module without any
    (an activation) is then stood for by the layers that compute what it reads.
    """
    captured = trace_or_capture(model, example)
    analysis = analyse(captured, settings.leave)
    sizes = {key: len(found.neurons) for key, found in zip(class_keys(analysis.classes), analysis.classes, strict=True)}
    round_to = 1 if settings.of == "latency" else settings.round_to  # for latency counts follow the measured curves
    chooser = Chooser(
        settings.keep,
        settings.importance,
        scope=settings.scope,
        floor=settings.floor,
        cap=settings.cap,
        only=settings.only,
        per=UNITS[settings.of],
        norms=settings.norms,
        round_to=round_to,
        task=task,
        sizes=sizes,
    )
    least = min(settings.keep.values(), default=1.0) if isinstance(settings.keep, Mapping) else settings.keep
    if settings.of == "neurons" and least < settings.floor:
        _log.warning("prune.neurons: keep is below floor, so classes keep %.3g of their neurons.", settings.floor)
    return chooser, _left_layers(analysis, analyse(captured), settings.leave)


def _left_layers(analysis: Analysis, free: Analysis, leave: tuple[str, ...]) -> tuple[str, ...]:
    if not leave:
        return ()
    stays = analysis.frozen & ~free.frozen
    producers = [producer for producer in analysis.producers if stays[analysis.root[producer.atoms]].any()]
    return tuple(dict.fromkeys(path for producer in producers if (path := producer.parameter.rpartition(".")[0])))


def _choose(trials: Trials, cost: Cost | None, share: float | Mapping[str, float], task: Task) -> Reached:
    """The cut of one round."""
    if cost is None or isinstance(share, Mapping):
        counts = trials.chooser.counts(trials.analysis)
        return Reached(trials.cut(counts), counts, 0.0)
    if not isinstance(cost, Latency) or task.journal is None:
        return reach(trials, cost, share)
    # a measurement doesn't repeat, so its outcome is kept beside the trainings, and a resumed run makes the same cut
    record = task.journal.fit()
    identity = {"latency": share, "classes": [f"{key}: {len(found.neurons)}" for key, found in _keyed(trials.analysis)]}
    state = record.load(identity)
    if state is not None:
        return Reached(trials.cut(state["counts"]), state["counts"], state["cost"])
    reached = reach(trials, cost, share)
    record.save(identity, {"counts": reached.counts, "cost": reached.cost})
    return reached


def _keyed(analysis: Analysis) -> list[tuple[str, Any]]:
    return list(zip(class_keys(analysis.classes), analysis.classes, strict=True))


def _mended(settings: Neurons, cut: Cut, original: nn.Module, task: Task) -> nn.Module:
    """The cut network, repaired and tuned."""
    if settings.repair == "batch-norm":
        recalibrate(cut.model, task)
    elif settings.repair == "least-squares":
        reconstruct(cut, original, task)
    if isinstance(settings.tune, Train):
        taught = settings.teacher and not settings.tune.teach
        task.tune(cut.model, dataclasses.replace(settings.tune, teach=TEACHER_WEIGHT) if taught else settings.tune)
    return cut.model


def _log_guard(settings: Neurons, task: Task, number: int, lost: float) -> None:
    _log.warning(
        "prune.neurons: round %d of %d loses %.3g of the %s, guard allows %.3g; the network before it is returned.",
        number, settings.rounds, lost, task.metric.name, settings.guard,
    )  # fmt: skip
