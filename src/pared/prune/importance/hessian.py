"""The diagonal of the Hessian of the loss, by Hutchinson's estimate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pared.prune.importance.gradients import checked, differentiating, own_buffers, unique_parameters, with_all_names
from pared.prune.importance.protocol import Normalize, Score, WeightImportance, check_choice, check_samples, removal_or_guard
from pared.prune.importance.samples import Mean, training_samples
from pared.training import Task


def hutchinson(loss: Tensor, parameters: list[Tensor], draws: int, generator: torch.Generator) -> list[Tensor]:
    """The mean of z ⊙ Hz over random signs z: an unbiased estimate of the Hessian's diagonal, exact where it is diagonal.

    Args:
        loss: a scalar that can be differentiated twice.
        parameters: tensors that it depends on.
        draws: how many vectors of signs to average over.
        generator: of the signs, on the CPU.

    Returns:
        A tensor for each parameter, of its shape (Bekas et al. 2007; Yao et al., 2006.00719, section 3.1).

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> [part.tolist() for part in hutchinson((x**3).sum(), [x], 1, torch.Generator())]
    [[6.0, 12.0]]
    """
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    curved = [gradient for gradient in first if gradient.requires_grad]  # the others are constant: their second derivative is 0
    for _ in range(draws if curved else 0):
        signs = [(torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p) for p in parameters]
        along = torch.stack([(gradient * sign).sum() for gradient, sign in zip(first, signs, strict=True)]).sum()
        products = torch.autograd.grad(along, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for total, sign, product in zip(sums, signs, products, strict=True):
            total += sign * product
    return [total / draws for total in sums]


@dataclass(frozen=True)
class HessianDiagonal(WeightImportance):
    """½ · h · weight² with the diagonal h of the loss's Hessian: Optimal Brain Damage (LeCun et al. 1989), h by Hutchinson's estimate.

    Negative estimates (a saddle, or the noise of the estimate) count as 0.

    Args:
        samples: training samples to average over.
        draws: vectors of random signs for each batch. 8 by default: with several batches the noise is then below that of the samples.
        score: "removal" is ½ · h · weight²; "guard" is h alone.
        seed: of the signs.
        normalize: "none" by default: rises of the loss compare over layers.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task, or if its training split is empty.

    >>> task = Task(*[[(torch.eye(2), torch.tensor([0, 1]))]] * 3)
    >>> HessianDiagonal(samples=2).weights(nn.Linear(2, 2), task)["weight"].shape
    torch.Size([2, 2])
    """

    samples: int = 512
    draws: int = 8
    score: Score = "removal"
    seed: int = 0
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = check_samples("importance.hessian_diagonal", self.samples, self.normalize)
        problems.number("draws", self.draws, low=1, integer=True)
        check_choice(problems, "score", self.score, "removal", "guard")
        problems.number("seed", self.seed, low=0, integer=True)
        problems.raise_if_any()

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """The score of every weight."""
        batches = training_samples(task, self.samples, model, "importance.hessian_diagonal")
        assert task is not None  # training_samples refused that
        generator = torch.Generator().manual_seed(self.seed)
        leaves = {name: value.clone().requires_grad_() for name, value in unique_parameters(model).items()}
        mean = Mean(leaves)
        for inputs, targets in checked(model, task, batches):
            with differentiating(model):
                loss = task.loss(functional_call(model, {**leaves, **own_buffers(model)}, inputs), targets)
                found = hutchinson(loss, list(leaves.values()), self.draws, generator)
            count = len(inputs[0])
            mean.add({name: value * count for name, value in zip(leaves, found, strict=True)}, count)
        diagonal = {name: value.clamp(min=0) for name, value in mean.result("importance.hessian_diagonal").items()}
        return removal_or_guard(with_all_names(model, diagonal), model, self.score, 0.5)
