"""Repair after a cut, without labels: batch norm's statistics, measured again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pared.core.errors import ModelError
from pared.core.problems import Problems
from pared.graph.analysis_pass import attribute
from pared.graph.capture import capture
from pared.graph.fold import arguments, packet
from pared.prune.observe import fitting, isolated, levels
from pared.prune.stepwise import Stepwise
from pared.training import Task
from pared.training.samples import first_inputs


@dataclass(frozen=True)
class Moments:
    """How many values of each channel were seen, their mean, and the sum of their squared distances from it.

    >>> both = Moments.of(torch.tensor([[1.0], [3.0]])).joined(Moments.of(torch.tensor([[8.0]])))
    >>> both.mean.tolist(), both.variance.tolist()
    ([4.0], [8.666666666666666])
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """The moments of values of shape (batch, channels, …), or (channels,)."""
        channels = values.detach().movedim(1 if values.dim() > 1 else 0, 0).flatten(1) if values.dim() > 1 else values.detach()[:, None]
        variance, mean = torch.var_mean(channels.float(), dim=1, correction=0)
        count = channels.shape[1]
        return cls(count, mean.cpu().double(), variance.cpu().double() * count)

    def joined(self, other: Moments) -> Moments:
        """The moments of both sets of values together (Chan, Golub & LeVeque 1979: nothing large is subtracted)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        squares = self.squares + other.squares + shift**2 * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), squares)

    @property
    def variance(self) -> Tensor:
        """The variance of the population: divided by the count."""
        return self.squares / self.count


def recalibrate(model: nn.Module, task: Task, samples: int = 1024) -> None:
    """Measure the running means and variances of all batch norms again, in place; nothing else changes.

    After a cut, a batch norm still normalises by what the uncut network gave it. Here its statistics become the mean and the variance (of
    the population) of what it really reads in eval mode on training inputs without augmentation. Norms are set in the order in which
    they are computed, each in a pass over the samples with all earlier ones already set; norms that don't depend on each other share a
    pass. So afterwards every norm reads exactly the distribution that it states. Averages of batch statistics in training mode (the usual
    re-estimation, as in Yu & Huang 1903.05134, section 3.3) don't have this property: there, every layer is fed by batches that were each
    normalised by themselves. A norm that is used in several places gets the moments of all of them together.

    The graph of the model is captured and run, so a module of one's own class and the rewritten graph that a cut may give are treated
    alike. The model is moved to the task's device; modes are as before.

    Args:
        model: any module that `capture` accepts.
        task: gives inputs; labels aren't looked at.
        samples: from the training split. With 1024 a mean is known to 3 % of the standard deviation even where a channel has one
            value for each sample.

    Raises:
        SettingsError: if `samples` is not a whole number of at least 2.
        DataError: if the training split is empty.
        ModelError, CaptureError: if the model can't be run or captured, or values aren't finite.

    >>> inputs = torch.tensor([[1.0], [3.0]])
    >>> task = Task(*[[(inputs, torch.tensor([0, 0]))]] * 3)
    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2))
    >>> recalibrate(model, task)
    >>> model[0].running_mean, model[0].running_var
    (tensor([2.]), tensor([1.]))
    """
    problems = Problems("prune.recalibrate")
    problems.number("samples", samples, low=2, integer=True)
    problems.raise_if_any()
    batches = first_inputs(task, samples, "batch norm's statistics are measured on them")
    captured = capture(model.to(task.machine.device), batches[0])
    batches = fitting(captured, batches)
    held = [
        _buffer(node, name) for node in captured.module.graph.nodes if _has_statistics(node) for name in ("running_mean", "running_var")
    ]
    module = isolated(captured, *held).module
    norms = {node: str(arguments(node)["running_mean"].target) for node in module.graph.nodes if _has_statistics(node)}
    ordered = [[node for node, name in norms.items() if name in level] for level in levels(module.graph, norms)]
    network = Stepwise(module, batches, ordered)
    for number, here in enumerate(ordered):
        found: dict[str, Moments] = {}
        for seen in network.look(number, dict.fromkeys(here, lambda given, _: Moments.of(given))):
            for node, moments in seen.items():
                before = found.get(norms[node])
                found[norms[node]] = moments if before is None else before.joined(moments)
        for node in here:
            _set(node, found[norms[node]])


def _has_statistics(node: fx.Node) -> bool:
    """Whether a node is a batch norm that normalises by statistics which the model holds."""
    if packet(node) is not torch.ops.aten.batch_norm:
        return False
    given = arguments(node)
    held = all(isinstance(given[name], fx.Node) and given[name].op == "get_attr" for name in ("running_mean", "running_var"))
    return held and not given["training"]


def _buffer(node: fx.Node, name: str) -> Tensor:
    return attribute(arguments(node)[name])


def _set(node: fx.Node, moments: Moments) -> None:
    if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.squares).all()):
        name = str(arguments(node)["running_mean"].target).rpartition(".")[0]
        raise ModelError(f"{name}: reads values that aren't finite, so they have no statistics. Check the inputs and weights.")
    _buffer(node, "running_mean").copy_(moments.mean)
    _buffer(node, "running_var").copy_(moments.variance)
