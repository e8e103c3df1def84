"""torch-pruning on the same networks, set up as its own examples do."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from pared.core.errors import ModelError
from pared.lab.coverage.models import Subject


def cut_by_torch_pruning(subject: Subject, keep: float) -> tuple[nn.Module, float]:
    """Prune `subject.model` in place with `MagnitudePruner`; the model, and the CPU seconds for the analysis and the cut.

    As in its examples: layers that compute the output stay (its classifier, the flow heads of RAFT), the number of heads is given where
    a module has `num_heads`, and is corrected afterwards.

    Raises:
        ModelError: if torch-pruning isn't installed.
    """
    try:
        import torch_pruning as tp
    except ImportError:
        raise ModelError("lab.coverage compares with torch-pruning, which isn't installed: pip install torch-pruning") from None
    model = subject.model
    inputs: Any = subject.inputs
    start = time.process_time()
    pruner = tp.pruner.MagnitudePruner(
        model,
        inputs if len(inputs) > 1 else inputs[0],
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=1 - keep,
        ignored_layers=_outputs(model),
        num_heads=_heads(model),
    )
    pruner.step()
    for module in model.modules():
        _correct_heads(module, pruner)
    return model, time.process_time() - start


def _outputs(model: nn.Module) -> list[nn.Module]:
    """Layers whose outputs are the model's; known by their width, or by torch-pruning's own tests for RAFT."""
    if hasattr(model, "update_block"):
        return [model.corr_block, model.update_block, *([model.mask_predictor] if model.mask_predictor is not None else [])]  # type: ignore[list-item]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    last = layers[-1]
    widths = {last.out_features if isinstance(last, nn.Linear) else last.out_channels, 1000, 400, 21}
    return [layer for layer in layers if (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels) in widths]


def _heads(model: nn.Module) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for module in model.modules():
        count = getattr(module, "num_heads", None)
        if isinstance(count, int) and not isinstance(module, nn.MultiheadAttention):
            for name in ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj"):
                if isinstance(getattr(module, name, None), nn.Linear):
                    found[getattr(module, name)] = count
    return found


def _correct_heads(module: Any, pruner: Any) -> None:
    qkv = getattr(module, "qkv", None)
    if isinstance(qkv, nn.Linear) and qkv in pruner.num_heads and isinstance(getattr(module, "num_heads", None), int):
        module.num_heads = pruner.num_heads[qkv]
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the fused kernel would scale by the new width of a head; this way it scales as before
        if isinstance(getattr(module, "head_dim", None), int):
            module.head_dim = qkv.out_features // (3 * module.num_heads)
        if isinstance(getattr(module, "attn_dim", None), int):
            module.attn_dim = qkv.out_features // 3
