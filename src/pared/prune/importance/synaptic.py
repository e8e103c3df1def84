"""Synaptic intelligence: how much of the fall of the loss along a training each weight brought about."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pared.core.errors import DataError, ModelError
from pared.core.problems import Problems
from pared.prune.importance.gradients import with_all_names
from pared.prune.importance.protocol import Normalize, Score, WeightImportance, check_choice, removal_or_guard
from pared.prune.importance.samples import fixed_batch
from pared.training import Task, Train, sum_over_processes


def synaptic_importance(omega: Tensor, moved: Tensor, damping: float) -> Tensor:
    """ω / (moved² + damping), where negative ω count as 0 (Zenke et al., 1703.04200, equation 5).

    Args:
        omega: the sum of −gradient · step along the training, of any shape.
        moved: how far each weight is from where it began.
        damping: the paper's ξ: keeps weights that hardly moved from infinity.

    >>> synaptic_importance(torch.tensor([0.6, -1.0]), torch.tensor([0.5, 1.0]), 0.05).tolist()
    [2.0, 0.0]
    """
    return omega.clamp(min=0) / (moved.square() + damping)


class PathIntegral:
    """Sums −gradient · step for every weight of a model while it is trained, by any loop with any optimiser of torch.

    Within the `with` block each step of an optimiser is seen by a hook that is removed at the end. Gradients are those that the loss
    left, before the optimiser adds weight decay or momentum; a penalty in the loss itself counts. Optimisers that evaluate the loss
    within a step (LBFGS) aren't followed.

    Args:
        model: the network; its parameters must stay the same objects.

    Attributes:
        omega: the sums, by name of parameter (shared parameters once).

    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> with PathIntegral(model) as path:
    ...     for _ in range(10):
    ...         optimizer.zero_grad()
    ...         (model.weight - 1).square().sum().backward()
    ...         optimizer.step()
    >>> path.importance(damping=0.1)["weight"].item() > 0
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parameters = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
        self._start = {name: value.detach().clone() for name, value in self._parameters.items()}
        self.omega = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self._start.items()}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> PathIntegral:
        self._handles = [register_optimizer_step_pre_hook(self._look), register_optimizer_step_post_hook(self._add)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._before = {}

    def importance(self, damping: float = 0.1) -> dict[str, Tensor]:
        """`synaptic_importance` of every weight by each of its names, averaged over processes."""
        found: dict[str, Tensor] = {}
        for name, value in self._parameters.items():
            omega = self.omega[name].to(value.device)
            shared = sum_over_processes(omega) / sum_over_processes(torch.ones((), device=value.device))
            found[name] = synaptic_importance(shared, (value.detach() - self._start[name].to(value.device)).double(), damping)
        return with_all_names(self.model, found)

    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stepped = {id(value) for group in optimizer.param_groups for value in group["params"]}
        for name, value in self._parameters.items():
            if id(value) in stepped and value.grad is not None:
                self._before[name] = (value.grad.detach().clone(), value.detach().clone())

    def _add(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for name, (gradient, before) in self._before.items():
            step = (self._parameters[name].detach() - before).double()
            self.omega[name] = self.omega[name].to(step.device) - gradient.double() * step
        self._before = {}


@dataclass(frozen=True)
class SynapticIntelligence(WeightImportance):
    """What each weight did for the loss along a training of a copy (Zenke et al., 1703.04200): Ω = ω / (moved² + damping).

    The paper watches the training that makes the network. To do so, train within a `PathIntegral` and hand its `importance()` to
    `Given`; this class, for recipes, watches a further training of a copy through the task's own fit.

    Args:
        train: the training that is watched ("1ep" or a plan). One epoch by default.
        damping: the paper's ξ, 0.1 by default as there for permuted MNIST.
        score: "removal" is Ω · weight², the paper's penalty at zero; "guard" is Ω alone, which says what must not move.
        normalize: "none" by default: shares of the loss compare over layers.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task.

    >>> task = Task(*[[(torch.eye(2), torch.tensor([0, 1]))]] * 3)
    >>> SynapticIntelligence(train="2ep").weights(nn.Linear(2, 2), task)["weight"].shape
    torch.Size([2, 2])
    """

    train: Train = field(default_factory=lambda: Train(epochs=1))
    damping: float = 0.1
    score: Score = "removal"
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = Problems("importance.synaptic_intelligence")
        problems.number("damping", self.damping, above=0)
        check_choice(problems, "score", self.score, "removal", "guard")
        check_choice(problems, "normalize", self.normalize, "layer", "none")
        problems.raise_if_any()
        object.__setattr__(self, "train", Train.parse(self.train))

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """Train a copy, and score every weight of `model`, which stays as it is."""
        if task is None:
            raise DataError("importance.synaptic_intelligence: needs data to train on. Give a task, or use Magnitude().")
        if fixed_batch(model) is not None:
            raise ModelError("importance.synaptic_intelligence: the model's batch size is fixed, so its graph can't be trained.")
        trained = copy.deepcopy(model)
        for parameter in trained.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        # a training that a journal had taken up from its end would take no steps to watch
        with PathIntegral(trained) as path:
            dataclasses.replace(task, journal=None).tune(trained, self.train)
        return removal_or_guard(path.importance(self.damping), model, self.score)
