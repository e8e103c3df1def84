"""The layers of a cut network that lost inputs, beside the same layers of the network that was cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from pared.graph.analysis_pass import attribute
from pared.graph.capture import Captured
from pared.graph.fold import TRANSPOSED, packet, readers
from pared.graph.record import record
from pared.prune.layer_equations import LAYERS, Equations
from pared.prune.observe import arguments

LARGEST = 2**26  # entries of a layer's Gram matrices; in double precision half a gigabyte


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that lost inputs.

    Attributes:
        layer: its path, or the name of its weight if it has none.
        node: its operator in the graph of the cut network.
        twin: the same in the original.
        bias: where it reads a bias of its own.
        equations: how its outputs come from its inputs.
        outputs: the outputs of the original that were kept, in the order of the cut layer's.
        why: why it can't be solved for; "" if it can.
    """

    layer: str
    node: fx.Node
    twin: fx.Node
    bias: fx.Node | None
    equations: Equations
    outputs: tuple[int, ...]
    why: str = ""

    @property
    def weight(self) -> fx.Node:
        """Where it reads its weight."""
        return arguments(self.node)["weight"]


def consumers(original: Captured, cut: Captured, kept: dict[str, dict[int, tuple[int, ...]]]) -> list[Consumer]:
    """All linear layers and convolutions that lost inputs, in the order in which they are computed.

    Args:
        original: the network that was cut.
        cut: what the cut gave.
        kept: `Cut.kept`.
    """
    twins = {name: node for node, name, _ in _layers(original)}
    before, after = record(original), record(cut)
    found = []
    for node, name, weight in _layers(cut):
        twin = twins.get(name)
        if twin is None or name not in kept:
            continue
        transposed = packet(node) in TRANSPOSED
        old, new = before[arguments(twin)["weight"]], after[arguments(node)["weight"]]
        if old[0 if transposed else 1] == new[0 if transposed else 1]:
            continue
        outputs = kept[name].get(1 if transposed else 0, tuple(range(old[1 if transposed else 0])))
        source = arguments(node)["bias"]
        bias = source if isinstance(source, fx.Node) and source.op == "get_attr" and _is_own(cut, attribute(source)) else None
        equations = Equations.of(node, tuple(new[2:]))
        why = _why_not(cut, node, weight, equations) or _why_apart(node, before[twin], after[node])
        found.append(Consumer(name.rpartition(".")[0] or name, node, twin, bias, equations, outputs, why))
    return found


def _layers(captured: Captured) -> Iterator[tuple[fx.Node, str, Tensor]]:
    """Every linear layer and convolution with the parameter that its weight is, or is computed from shape for shape."""
    for node in captured.module.graph.nodes:
        if packet(node) in LAYERS:
            pending, done = [arguments(node)["weight"]], set[fx.Node]()
            while pending:
                source = pending.pop(0)
                if source.op == "get_attr" and isinstance(value := attribute(source), Tensor) and value.dim() >= 2:
                    yield node, str(source.target), value
                    break
                done.add(source)
                pending += [parent for parent in source.all_input_nodes if parent not in done]


def _is_own(captured: Captured, value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) and len(readers(captured.module, value)) == 1


def _why_not(captured: Captured, node: fx.Node, weight: Tensor, equations: Equations) -> str:
    """Why a layer can't be solved for by itself."""
    if arguments(node)["weight"].op != "get_attr":
        return "its weight is computed from other parameters"
    if not isinstance(weight, nn.Parameter) or not _is_own(captured, weight):
        return "its weight is shared" if isinstance(weight, nn.Parameter) else "its weight isn't a parameter"
    if equations.transposed and equations.groups > 1:
        return "it is a grouped transposed convolution"
    size = equations.matrix(weight).shape
    if size[0] * (size[1] + 1) ** 2 > LARGEST:
        return f"it has {size[1]} inputs to each output, too many to solve for"
    return ""


def _why_apart(node: fx.Node, before: Any, after: Any) -> str:
    """Why the outputs of a layer can't be compared with those of the original."""
    axis = -1 if packet(node) in LAYERS and not arguments(node).get("stride") else 1
    left, right = list(before), list(after)
    del left[axis], right[axis]
    return "" if left == right else "its outputs lie at other positions than those of the original"


__all__ = ["Consumer", "consumers"]
