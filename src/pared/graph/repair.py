"""Attributes that state a width, set right after a cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Edits = dict[fx.Node, dict[int | str, Any]]


def repair_leaves(model: nn.Module, edits: Edits) -> None:
    """Set in_channels, num_features and the like of torch's own layers (and their subclasses) from the tensors they hold now."""
    groups = {_path(node): changes[6] for node, changes in edits.items() if 6 in changes and "conv" in str(node.target)}
    shares = {_path(node): changes[1] for node, changes in edits.items() if 1 in changes and "group_norm" in str(node.target)}
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            _repair_recurrent(module)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, _ConvNd):
            module.groups = groups.get(path, module.groups)
            first, second = weight.shape[0], weight.shape[1] * module.groups
            module.in_channels, module.out_channels = (first, second) if isinstance(module, _ConvTransposeNd) else (second, first)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, _NormBase):
            module.num_features = weight.shape[0]
        elif isinstance(module, nn.GroupNorm):
            module.num_channels, module.num_groups = weight.shape[0], shares.get(path, module.num_groups)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = weight.shape[1]
        elif isinstance(module, nn.PReLU):
            module.num_parameters = weight.numel()


def _repair_recurrent(module: nn.RNNBase | nn.RNNCellBase) -> None:
    """Sizes, and the flat list of weights by which torch calls its recurrent kernels."""
    suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
    gates = 4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3 if isinstance(module, nn.GRU | nn.GRUCell) else 1
    rows, module.input_size = getattr(module, f"weight_ih{suffix}").shape
    module.hidden_size = rows // gates
    if isinstance(module, nn.RNNBase):
        module.proj_size = getattr(module, "weight_hr_l0").shape[0] if module.proj_size else 0  # noqa: B009
        module._init_flat_weights()


def repair_integers(model: nn.Module, edits: Edits) -> Callable[[], None]:
    """Try: where a changed operator stands in a module of the user's, integers of that module equal to an old literal become the new one.

    Returns:
        A function that puts the old values back.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    for node, changes in edits.items():
        pairs = _changed_numbers(node, changes)
        for path in _stack(node):
            try:
                module = model.get_submodule(path) if path else model
            except AttributeError:
                continue
            for name, value in list(vars(module).items()):
                new = _replaced(value, pairs)
                if not name.startswith("_") and name != "training" and new != value:
                    before.append((module, name, value))
                    setattr(module, name, new)

    def undo() -> None:
        for module, name, value in reversed(before):
            setattr(module, name, value)

    return undo


def _changed_numbers(node: fx.Node, changes: dict[int | str, Any]) -> dict[int, int]:
    pairs: dict[int, int] = {}
    for name, value in changes.items():
        old = node.args[name] if isinstance(name, int) and name < len(node.args) else None
        olds, news = (entry if isinstance(entry, list | tuple) else [entry] for entry in (old, value))
        if len(olds) == len(news):
            pairs |= {a: b for a, b in zip(olds, news, strict=True) if isinstance(a, int) and isinstance(b, int) and a != b and b >= 0}
    return pairs


def _replaced(value: Any, pairs: dict[int, int]) -> Any:
    if type(value) is int:
        return pairs.get(value, value)
    if isinstance(value, list | tuple) and value and all(type(entry) is int for entry in value):
        return type(value)(pairs.get(entry, entry) for entry in value)
    return value


def _path(node: fx.Node) -> str:
    paths = _stack(node)
    return paths[-1] if paths else ""


def _stack(node: fx.Node) -> list[str]:
    """Module paths from the outermost in whose forward the node was made."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path).split("@")[0] for path, _ in stack.values()]
    return [path for path in paths if not path.startswith("_empty")]
