"""The first-order Taylor estimate: by how much the loss changes when a weight, or a neuron, is set to zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.func import vmap

from pared.graph.analysis import Analysis
from pared.prune.importance.gradients import loss_gradients, unique_parameters, with_all_names
from pared.prune.importance.protocol import Normalize, Scores, WeightImportance, add_rows, check_choice, check_samples
from pared.prune.importance.samples import Mean
from pared.training import Task


def saliency(gradients: Tensor, weight: Tensor, absolute: Literal["sample", "mean"]) -> Tensor:
    """Absolute values of gradient times weight: of each sample, or left signed until the mean is taken.

    Args:
        gradients: of shape (samples, *weight.shape).
        weight: any shape.
        absolute: "sample" takes the absolute value here; "mean" leaves the sign, for the caller to take it of the mean.

    >>> import torch
    >>> saliency(torch.tensor([[1.0], [-3.0]]), torch.tensor([2.0]), "sample").mean(0).item()
    4.0
    """
    products = gradients * weight
    return products.abs() if absolute == "sample" else products


@dataclass(frozen=True)
class Taylor(WeightImportance):
    """|gradient · weight|, the change of the loss to first order; for a neuron, |sum of gradient · weight over its row|.

    The sign stays within a row, since a neuron's weights go together; tied layers are added as absolute values. That is the criterion of
    Molchanov et al. (1906.10771, section 3.1), who square where this takes the absolute value, so that scores are changes of the loss.

    Args:
        samples: training samples to average over. 512 by default: rankings hardly change beyond that.
        absolute: "sample" (mean over samples of the absolute value) sees a weight that pulls samples both ways; "mean" (absolute value of
            the mean) is the change of the mean loss, which is near 0 everywhere once training has converged.
        normalize: "none" by default: changes of the loss compare over layers.

    Raises:
        SettingsError: if a setting is out of range.
        DataError: without a task, or if its training split is empty.

    >>> import torch
    >>> task = Task(*[[(torch.eye(2), torch.tensor([0, 1]))]] * 3)
    >>> Taylor(samples=2).weights(nn.Linear(2, 2), task)["weight"].shape
    torch.Size([2, 2])
    """

    samples: int = 512
    absolute: Literal["sample", "mean"] = "sample"
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        problems = check_samples("importance.taylor", self.samples, self.normalize)
        check_choice(problems, "absolute", self.absolute, "sample", "mean")
        problems.raise_if_any()

    def weights(self, model: nn.Module, task: Task | None = None) -> dict[str, Tensor]:
        """The score of every weight by itself."""
        values = unique_parameters(model)

        def products(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: saliency(gradients[name], values[name], self.absolute) for name in values}

        return with_all_names(model, self._mean(model, task, values, products))

    def __call__(self, analysis: Analysis, task: Task | None = None) -> Scores:
        """The score of every neuron: its row is summed before the absolute value is taken."""
        model = analysis.captured.module
        values = with_all_names(model, unique_parameters(model))
        views = {str(at): producer for at, producer in enumerate(analysis.producers)}
        like = {at: producer.view(values[producer.parameter])[:, 0] for at, producer in views.items()}

        def products(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
            every = with_all_names(model, gradients)
            rows = {at: vmap(producer.view)(every[producer.parameter] * values[producer.parameter]) for at, producer in views.items()}
            return {at: saliency(row.sum(dim=2), like[at].new_ones(()), self.absolute) for at, row in rows.items()}

        means = self._mean(model, task, like, products)
        return add_rows(analysis, [means[at] for at in views], self.normalize)

    def _mean(
        self, model: nn.Module, task: Task | None, like: dict[str, Tensor], products: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        mean = Mean(like)
        for gradients in loss_gradients(model, task, self.samples, "importance.taylor"):
            found = products(gradients)
            mean.add({name: value.sum(dim=0) for name, value in found.items()}, len(next(iter(gradients.values()))))
        result = mean.result("importance.taylor")
        return result if self.absolute == "sample" else {name: value.abs() for name, value in result.items()}
