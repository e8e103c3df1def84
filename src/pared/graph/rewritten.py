"""A network that is its own rewritten graph: code for eval and for training over one tree of parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from pared.graph.regions import MARKS

Forward = Callable[..., Any]


class Rewritten(nn.Module):
    """A module whose forward is generated from captured graphs, one for eval and one for training mode.

    Parameters and buffers stand under the names that they had in the user's model, so a state_dict goes back and forth. It is an
    ordinary module otherwise: it trains, copies, pickles, exports and can be captured again.
    """

    def __init__(self, parts: dict[str, Tensor | nn.Module], evaluation: fx.Graph, training: fx.Graph, saved: set[str]) -> None:
        super().__init__()
        for name, part in parts.items():
            _place(self, name, part, persistent=name in saved)
        self._sources = (source_of(evaluation), source_of(training))
        convention = getattr(evaluation._codegen, "pytree_info", None)
        if convention is not None:
            self._in_spec, self._out_spec = convention.in_spec, convention.out_spec

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the graph of the present mode; same arguments and results as the model that was captured."""
        return compiled(self._sources[self.training])(self, *inputs, **named)


def source_of(graph: fx.Graph) -> str:
    """The Python source of a graph's forward."""
    return graph.python_code(root_module="self").src


@functools.lru_cache(maxsize=256)
def compiled(source: str) -> Forward:
    """Compile a forward; kept by its text, so that copies of a module share it."""
    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": float("inf"), "nan": float("nan"), "NoneType": type(None)}
    names |= {"fx_pytree": fx_pytree, "pytree": pytree}
    names |= {f"torch_amp_autocast_mode_{mark.__name__}": mark for mark in MARKS}
    exec(compile(source, "<rewritten graph>", "exec"), names)
    return names["forward"]


def _place(root: nn.Module, name: str, part: Tensor | nn.Module, persistent: bool = True) -> None:
    """Put a parameter, a buffer or a subgraph at a dotted path of bare modules."""
    *path, leaf = name.split(".")
    for step in path:
        if not isinstance(root._modules.get(step), nn.Module):
            root.add_module(step, nn.Module())
        root = root._modules[step]  # type: ignore[assignment]
    if isinstance(part, nn.Module):
        root.add_module(leaf, part)
    elif isinstance(part, nn.Parameter):
        root.register_parameter(leaf, part)
    else:
        root.register_buffer(leaf, part, persistent=persistent)
