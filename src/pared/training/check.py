"""Checks that turn a user's mistake into a sentence before it turns into a strange number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pared.core.errors import DataError, ModelError, WeightsError

IGNORED_LABEL = -100  # torch's cross entropy passes over it


def check_weights(model: nn.Module) -> None:
    """Refuse a model with NaN or infinity in a parameter or buffer.

    Raises:
        WeightsError: naming the first few such tensors.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise WeightsError(f"NaN or infinity in {', '.join(bad[:3])}{more}: load other weights, or train again with a lower learning rate.")


def split_batch(batch: Any, split: str) -> tuple[Tensor | tuple[Tensor, ...], Any]:
    """Take a batch apart into inputs (a tensor or a tuple of tensors) and targets.

    A tensor alone, or a tuple of one part, is a batch without labels: its targets are None.

    Raises:
        DataError: if it is neither that nor a pair, naming the split.

    >>> split_batch([torch.zeros(2, 3)], "train")[1] is None
    True
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = (batch[0], None)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(
            f"the {split} split must give pairs (inputs, targets), or inputs alone. Got {type(batch).__name__}{_length(batch)}."
        )
    inputs, targets = batch
    if isinstance(inputs, tuple | list):
        inputs = tuple(inputs)
    parts: Iterable[Any] = inputs if isinstance(inputs, tuple) else (inputs,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise DataError(f"the {split} split must give inputs that are tensors. Got {type(part).__name__}.")
    return inputs, targets


def need_labels(targets: Any, split: str, purpose: str) -> None:
    """Refuse a batch without labels where nothing can stand in for them.

    Raises:
        DataError: naming the split, and what needs the labels.
    """
    if targets is None:
        raise DataError(f"the {split} split has no labels, which {purpose} needs.")


def check_labels(outputs: Any, targets: Any, split: str) -> None:
    """Refuse class numbers that the model has no output for; anything that isn't classification passes.

    Args:
        outputs: shape (batch, classes) or (batch, classes, …).
        targets: whole numbers of shape (batch,) or (batch, …).
        split: named in the message.

    Raises:
        DataError: naming the label and the number of classes.
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or targets.is_floating_point() or targets.numel() == 0:
        return
    if outputs.dim() < 2 or targets.dim() != outputs.dim() - 1:
        return
    classes = outputs.shape[1]
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != IGNORED_LABEL)]
    if wrong.numel():
        raise DataError(
            f"label {int(wrong[0])} in the {split} split: the model has {classes} outputs, so labels must be 0 to {classes - 1}. "
            f"Correct the labels, or build the model with more classes."
        )


def run(model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    """Call the model; what torch says about shapes becomes a sentence that names the shapes.

    Raises:
        ModelError: if the model can't take these inputs.
    """
    try:
        return model(*inputs)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in inputs)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the model fails on inputs of shape {shapes}: {reason}") from error


def _length(batch: Any) -> str:
    return f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
