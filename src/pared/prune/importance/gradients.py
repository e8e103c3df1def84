"""Gradients of single samples: by `torch.func.vmap` where that goes, sample by sample where it doesn't."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from pared.graph.capture import training_mode
from pared.prune.importance.protocol import all_names
from pared.prune.importance.samples import fixed_batch, repeated, training_samples
from pared.training import Task
from pared.training.check import check_labels, need_labels, run
from pared.training.samples import Batch, slice_batch

Gradients = dict[str, Tensor]
OutputLoss = Callable[[Any, Any], Tensor]

# entries of the gradients that are held at a time: 128 MiB in float32
AT_A_TIME = 2**25


@contextlib.contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """Eval mode, gradients on, and attention from parts that can be batched and differentiated twice."""
    with training_mode(model, False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap's words on speed
        yield


def unique_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters, each once, detached."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers, for a forward that writes to them."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def with_all_names(model: nn.Module, scores: Gradients) -> Gradients:
    """Give the scores of `unique_parameters` under every name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: scores[first[id(parameter)]] for name, parameter in all_names(model).items()}


def loss_gradients(model: nn.Module, task: Task | None, samples: int, where: str) -> Iterator[Gradients]:
    """`per_sample_gradients` of the task's own loss on its first training samples.

    Raises:
        DataError: if there is no task, or a label has no output.
        ModelError: if the model can't take the inputs.
    """
    batches = training_samples(task, samples, model, where)
    assert task is not None  # training_samples refused that
    return per_sample_gradients(model, checked(model, task, batches), task.loss)


def answers(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The outputs in eval mode, without gradients, and without a trace in the model.

    Raises:
        ModelError: if the model can't take the inputs.
    """
    with training_mode(model, False), torch.no_grad():
        return run(lambda *given: functional_call(model, own_buffers(model), given), inputs)


def checked(model: nn.Module, task: Task, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, the first of which was run to see that shapes and labels fit."""
    for number, batch in enumerate(batches):
        if number == 0:
            need_labels(batch[1], "train", "an importance by gradients of the loss")
            outputs = answers(model, batch[0])
            if task.classifies:
                check_labels(outputs, batch[1], "train")
        yield batch


def per_sample_gradients(model: nn.Module, batches: Iterable[Batch], loss: OutputLoss) -> Iterator[Gradients]:
    """The gradients of the loss of each sample by itself, in eval mode, also of parameters that are frozen.

    Args:
        model: any module, or a captured graph.
        batches: pairs (inputs, targets).
        loss: (outputs, targets) -> scalar, of a batch of one (of equal samples, where a graph has a fixed batch).

    Yields:
        For some samples at a time, a tensor (samples, *shape of the parameter) by name; shared parameters once.

    >>> linear = nn.Linear(2, 1, bias=False)
    >>> batch = ((torch.tensor([[1.0, 2.0], [3.0, 4.0]]),), torch.zeros(2))
    >>> [part["weight"].tolist() for part in per_sample_gradients(linear, [batch], lambda outputs, _: outputs.sum())]
    [[[[1.0, 2.0]], [[3.0, 4.0]]]]
    """
    parameters = unique_parameters(model)
    samples = max(1, AT_A_TIME // max(1, sum(parameter.numel() for parameter in parameters.values())))
    size = fixed_batch(model) or 1

    buffers = own_buffers(model)

    def of_one(values: Gradients, sample: Batch) -> Tensor:
        inputs, targets = pytree.tree_map(lambda leaf: repeated(leaf[None], size) if isinstance(leaf, Tensor) else leaf, sample)
        return loss(functional_call(model, {**values, **buffers}, inputs), targets)

    together = True
    for batch in batches:
        for start in range(0, len(batch[0][0]), samples):
            part = slice_batch(batch, slice(start, start + samples))
            with differentiating(model):
                if together:
                    try:
                        axes = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, part)
                        found = vmap(grad(of_one), in_dims=(None, axes))(parameters, part)
                    except Exception:  # an operator without a batching rule, a branch on a value: each sample by itself
                        together = False
                if not together:
                    found = _one_by_one(of_one, parameters, part)
            yield {name: value.detach() for name, value in found.items()}  # pyright: ignore[reportPossiblyUnbound]


def _one_by_one(of_one: Callable[[Gradients, Batch], Tensor], parameters: Gradients, batch: Batch) -> Gradients:
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    found: list[tuple[Tensor, ...]] = []
    for at in range(len(batch[0][0])):
        sample = pytree.tree_map(lambda leaf, at=at: leaf[at] if isinstance(leaf, Tensor) else leaf, batch)
        found.append(torch.autograd.grad(of_one(leaves, sample), list(leaves.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(values) for name, values in zip(leaves, zip(*found, strict=True), strict=True)}
