"""Shrinking weights after every step of an optimiser, in whatever loop the steps are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pared.core.errors import TrainingError
from pared.training import Task, Train


def soft_threshold_factors(norms: Tensor, amount: float | Tensor) -> Tensor:
    """What group soft-thresholding multiplies groups of these norms by: 1 - amount / norm, exactly 0 where the norm is at most `amount`.

    >>> soft_threshold_factors(torch.tensor([4.0, 1.0, 0.0]), 1.0).tolist()
    [0.75, 0.0, 0.0]
    """
    alive = norms > amount
    return torch.where(alive, 1 - amount / torch.where(alive, norms, 1), 0.0)


def group_soft_threshold(rows: Tensor, amount: float) -> Tensor:
    """Shorten every row by `amount`; a row that isn't longer becomes exactly zero.

    It is the proximal operator of `amount` · sum over rows of their L2 norms: what a step of group lasso does exactly, where a step along
    the gradient of the norm would only hover around zero (Yuan & Lin 2006; for networks Wen et al. 2016, 1608.03665).

    Args:
        rows: of shape (groups, members), in any unit.
        amount: the length taken off, at least 0, in the unit of the rows.

    Returns:
        A new tensor of the shape of `rows`.

    >>> group_soft_threshold(torch.tensor([[3.0, 4.0], [0.6, 0.8]]), 1.0).tolist()
    [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]]
    """
    return rows * soft_threshold_factors(torch.linalg.vector_norm(rows, dim=1), amount)[:, None]


def step_size(settings: dict[str, Any]) -> float:
    """How far a steady gradient of 1 moves a weight in one step of an optimiser's parameter group.

    The learning rate; with momentum m and dampening d, learning rate · (1 - d) / (1 - m), as a steady gradient adds up to that. So the
    penalty is that of the objective "loss + strength · norms" for plain SGD and for SGD with momentum. Adam divides every gradient by
    its own size, so there is no such number: there it is the learning rate, as in the decoupled weight decay of AdamW, and the strength
    is weighed against signs of gradients instead of gradients.

    >>> step_size({"lr": 0.5}), step_size({"lr": 0.5, "momentum": 0.5, "dampening": 0})
    (0.5, 1.0)
    """
    rate = float(settings["lr"])
    momentum = float(settings.get("momentum", 0.0))
    if not 0 < momentum < 1:
        return rate
    return rate * (1 - float(settings.get("dampening", 0.0))) / (1 - momentum)


@dataclass(frozen=True)
class Shrinkage:
    """Something to be done to weights after every step.

    Attributes:
        lead: it is done when an optimiser that holds this parameter has taken a step, with the step size of its parameter group.
        shrink: gets the step size and changes weights in place, without gradients.
    """

    lead: nn.Parameter
    shrink: Callable[[float], None]


@contextlib.contextmanager
def after_steps(shrinkages: Sequence[Shrinkage]) -> Iterator[list[int]]:
    """Carry out `shrinkages`, in their order, after every step of any optimiser that holds their parameters.

    It needs no word from the training loop: the hook is on all of PyTorch's optimisers for as long as the context lasts, and gone after
    it. A step that is left out (a mixed-precision overflow) isn't followed by anything. Nothing is remembered from step to step.

    Yields:
        A list with one number for every step that was followed: how many shrinkages it had.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.data.fill_(1.0); layer.weight.grad = torch.zeros(1, 1)
    tensor([[1.]])
    >>> with after_steps([Shrinkage(layer.weight, lambda step: layer.weight.data.mul_(1 - step))]) as steps:
    ...     torch.optim.SGD(layer.parameters(), lr=0.25).step()
    >>> layer.weight.item(), steps
    (0.75, [1])
    """
    followed: list[int] = []

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        sizes = {id(parameter): step_size(group) for group in optimizer.param_groups for parameter in group["params"]}
        due = [shrinkage for shrinkage in shrinkages if id(shrinkage.lead) in sizes]
        with torch.no_grad():
            for shrinkage in due:
                shrinkage.shrink(sizes[id(shrinkage.lead)])
        if due:
            followed.append(len(due))

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield followed
    finally:
        handle.remove()


def require_steps(where: str, followed: Sequence[int], train: Train, task: Task) -> None:
    """Refuse a training that `after_steps` saw nothing of.

    Raises:
        TrainingError: naming the method, unless the plan has no epochs or the training may have come finished out of the journal.
    """
    if not followed and train.epochs > 0 and task.journal is None:
        raise TrainingError(
            f"{where}: the training took no step with a torch.optim.Optimizer that holds the model's own parameters, so nothing was "
            "shrunk. Let your loop train the model that it is given, in place."
        )
