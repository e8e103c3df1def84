"""Add exits to a network, so that easy samples leave early."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.dynamic.early_exit import EarlyExit
from pared.dynamic.heads import has_channels_last, make_head
from pared.dynamic.places import Place, find_places, path_of
from pared.dynamic.stages import split
from pared.dynamic.thresholds import choose_thresholds
from pared.graph import Captured, Staged, capture
from pared.training import Objective, Task, Train, evaluating, split_batch
from pared.training.fit import output_loss
from pared.training.reference import targets_or_answers


@dataclass(frozen=True)
class Exits:
    """Add classifiers after intermediate layers; a sample that one of them is sure of leaves there (BranchyNet, 1709.01686).

    Works on any network of one output that `torch.export` accepts with a free batch size: it is cut at places where a single activation
    is all that the rest needs. Everything is trained together on the sum of the losses of all exits (lecture: L = e1 + e2 + … + eL).
    Confidence is the highest softmax output (MSDNet, 1703.09844); how much of it is enough is chosen on the validation split.
    The result is an `EarlyExit`.

    Args:
        after: paths of modules to leave after, in any order. None: `count` places at equal shares of the MACs.
        count: exits to add, where `after` is None.
        confidence: threshold of all exits. None: the thresholds of least MACs that keep validation within `max_drop`.
        max_drop: what the metric on the validation split may lose against using the last exit alone, in the metric's unit (0.01 is a
            point of accuracy). 0 by default: what is saved costs nothing.
        weights: of the losses, one for each exit and the last one; None: all 1. BranchyNet gains by weighting early exits more.
        width: hidden units of each new classifier; None: one linear layer after global pooling.
        train: the training plan; 0 epochs only trains nothing, so the new classifiers would guess.

    Raises:
        SettingsError: for a wrong setting, a path that isn't such a place, or more exits than places.
        ModelError, CaptureError: if the network can't be cut (several outputs, fixed batch size, branches on values).

    >>> batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> network = Exits(count=2, train="1ep")(model, Task(batches, batches, batches))
    >>> len(network.stages), network(torch.zeros(5, 4)).shape
    (3, torch.Size([5, 3]))
    """

    after: tuple[str, ...] | None = None
    count: int = 2
    confidence: float | None = None
    max_drop: float = 0.0
    weights: tuple[float, ...] | None = None
    width: int | None = None
    train: Train = field(default_factory=partial(Train, epochs=5))

    def __post_init__(self) -> None:
        problems = Problems("dynamic.exits")
        paths = self.after is None or (not isinstance(self.after, str) and len(self.after) > 0 and len(set(self.after)) == len(self.after))
        problems.check(paths, "after", "a list of different module paths", self.after)
        problems.number("count", self.count, low=1, integer=True)
        if self.confidence is not None:
            problems.number("confidence", self.confidence, low=0, high=1)
        problems.number("max_drop", self.max_drop, low=0)
        if self.weights is not None:
            exits = (len(self.after) if self.after is not None and paths else self.count) + 1
            positive = len(self.weights) == exits and all(isinstance(weight, int | float) and weight >= 0 for weight in self.weights)
            problems.check(positive, "weights", f"one number of at least 0 for each of the {exits} exits", self.weights)
        if self.width is not None:
            problems.number("width", self.width, low=1, integer=True)
        problems.raise_if_any()
        object.__setattr__(self, "train", Train.parse(self.train))
        object.__setattr__(self, "after", None if self.after is None else tuple(self.after))
        object.__setattr__(self, "weights", None if self.weights is None else tuple(self.weights))

    def __call__(self, model: nn.Module, task: Task) -> EarlyExit:
        """Return a copy of `model` with trained exits and thresholds."""
        if isinstance(model, Staged):
            raise SettingsError("dynamic.exits: the network has exits already. Use this step once in a recipe.")
        model = copy.deepcopy(model).to(task.machine.device)
        network = self._build(model, task)
        plan = dataclasses.replace(self.train, label_smoothing=0.0, teach=0.0)  # the objective does both by itself
        task.tune(network, plan, self._objective(task))
        if self.confidence is not None:
            network.thresholds.fill_(self.confidence)
        else:
            confidence, quality = _judge(network, task)
            cost = np.array(network.exit_macs(*task.example_inputs()), dtype=np.float64)
            network.thresholds.copy_(torch.from_numpy(choose_thresholds(confidence, quality, cost, self.max_drop)))
        return network

    def _build(self, model: nn.Module, task: Task) -> EarlyExit:
        captured = capture(model, task.example_inputs())
        places = find_places(captured)
        chosen = evenly(places, self.count) if self.after is None else _named(model, captured, places, self.after)
        stages = split(model, captured, chosen)
        output = next(node for node in captured.module.graph.nodes if node.op == "output").args[0]
        classes = output.meta["val"].shape[1]
        heads = [make_head(place.shape, classes, self.width, channels_last=has_channels_last(place.node)) for place in chosen]
        return EarlyExit(stages, [*heads, nn.Identity()]).to(task.machine.device)

    def _objective(self, task: Task) -> Objective:
        loss_of = output_loss(task, self.train)

        def objective(network: nn.Module, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
            loss = loss_of(inputs, targets)
            losses = torch.stack([loss(logits) for logits in network(*inputs)])
            return losses.sum() if self.weights is None else losses @ losses.new_tensor(self.weights)

        return objective


def evenly(places: Sequence[Place], count: int) -> list[Place]:
    """Choose `count` places whose shares of the MACs are nearest to equal ones: 1/3 and 2/3 for two.

    Of places between the same two multiplying layers the last is taken, after norm, activation and pooling.

    Raises:
        SettingsError: if there are fewer places than that.
    """
    last = list({place.share: place for place in places}.values())
    if len(last) < count:
        raise SettingsError(f"dynamic.exits: count must be at most {len(last)}, as many places this network can be left at. Got {count}.")
    chosen, start = [], 0
    for number in range(count):
        window = range(start, len(last) - (count - number - 1))
        nearest = min(window, key=lambda index: abs(last[index].share - (number + 1) / (count + 1)))
        chosen.append(last[nearest])
        start = nearest + 1
    return chosen


def _named(model: nn.Module, captured: Captured, places: Sequence[Place], after: Sequence[str]) -> list[Place]:
    """The places right after the modules that the user named, in the network's order."""
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)} - {""}
    by_index = {place.index: place for place in places}
    made_by = [path_of(node) if node.op == "call_function" else "" for node in captured.module.graph.nodes]
    possible = ", ".join(dict.fromkeys(place.path for place in places if place.path)) or "none"
    chosen, problems = [], Problems("dynamic.exits")
    for path in after:
        place = by_index.get(max((index for index, maker in enumerate(made_by) if f"{maker}.".startswith(f"{path}.")), default=-1))
        rule = f"a place where one activation is all that the rest needs (such are: {possible})"
        problems.check(path in paths and place is not None, "after", rule if path in paths else "the path of a module of the model", path)
        if place is not None:
            chosen.append(place)
    problems.raise_if_any()
    return sorted(chosen, key=lambda place: place.index)


def _judge(network: EarlyExit, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of the early exits (exits - 1, samples) and quality of all (exits, samples) on the validation split."""
    confidence, quality = [], []
    sign = 1 if task.metric.higher_is_better else -1
    with evaluating(network):
        for batch in task.valid:
            inputs, targets = split_batch(batch, "valid")
            inputs = task.prepare(inputs)
            logits = network.all_logits(*inputs)
            targets = targets_or_answers(task, inputs, task.to_device(targets), "valid")
            confidence.append(torch.stack([each.softmax(1).amax(1) for each in logits[:-1]]).cpu())
            quality.append(torch.stack([sign * task.metric(each, targets) for each in logits]).cpu())
    return torch.cat(confidence, 1).double().numpy(), torch.cat(quality, 1).double().numpy()
