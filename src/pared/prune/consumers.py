"""The layers of a cut network that lost inputs, beside the same layers of the network that was cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.graph.analysis_pass import attribute
from pared.graph.capture import Captured
from pared.graph.equations import LAYERS, Equations
from pared.graph.fold import TRANSPOSED, arguments, packet, readers
from pared.graph.record import record

LARGEST = 2**25  # entries of a layer's Gram matrices; two of them in double precision take half a gigabyte


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that lost inputs.

    Attributes:
        layer: its path, or the name of its weight if it has none.
        node: its operator in the graph of the cut network.
        twin: the same in the original.
        bias: where it reads a bias of its own.
        norm: the batch norm that alone reads the layer, where there is one; without a bias, its running mean stands for one.
        total: where the outputs are compared: the sum to which the layer adds its outputs (behind the norm) as the last branch
            of a residual block, else the layer itself.
        twin_total: the same in the original.
        equations: how its outputs come from its inputs.
        outputs: the outputs of the original that were kept, in the order of the cut layer's.
        why: why it can't be solved for; "" if it can.
    """

    layer: str
    node: fx.Node
    twin: fx.Node
    bias: fx.Node | None
    norm: fx.Node | None
    total: fx.Node
    twin_total: fx.Node
    equations: Equations
    outputs: tuple[int, ...]
    why: str = ""

    @property
    def weight(self) -> fx.Node:
        """Where it reads its weight."""
        return arguments(self.node)["weight"]

    @property
    def shift(self) -> fx.Node | None:
        """Where the outputs can be shifted: a bias, or the running mean of the norm, which is taken away from them."""
        return self.bias if self.bias is not None or self.norm is None else arguments(self.norm)["running_mean"]

    def scale(self) -> Tensor | None:
        """What the outputs are multiplied by where they are compared, shape (outputs,); None if by nothing."""
        if self.norm is None or self.total is self.node:
            return None
        given = arguments(self.norm)
        root = (attribute(given["running_var"]).double() + given["eps"]).rsqrt()
        return root if given["weight"] is None else root * attribute(given["weight"]).detach().double()


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
        norm = _norm(cut, node)
        total, twin_total = _sum(node, norm, after), _sum(twin, _norm(original, twin), before)
        if total is None or twin_total is None:
            total, twin_total = node, twin
        found.append(Consumer(name.rpartition(".")[0] or name, node, twin, bias, norm, total, twin_total, equations, outputs, why))
    return found


def _norm(captured: Captured, node: fx.Node) -> fx.Node | None:
    """The batch norm in eval form that is all that reads a layer, if nothing else reads its statistics."""
    norm = next(iter(node.users)) if len(node.users) == 1 else None
    if norm is None or packet(norm) is not torch.ops.aten.batch_norm:
        return None
    given = arguments(norm)
    held = [given[name] for name in ("running_mean", "running_var")]
    own = all(isinstance(each, fx.Node) and each.op == "get_attr" and len(readers(captured.module, attribute(each))) == 1 for each in held)
    return norm if own and given["input"] is node and not given["training"] else None


def _sum(node: fx.Node, norm: fx.Node | None, shapes: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The sum of a residual block whose last layer a node is: what it adds to was computed before it, from what it reads."""
    last = norm or node
    while len(last.users) == 1 and packet(user := next(iter(last.users))) is torch.ops.aten.dropout and not arguments(user)["train"]:
        last = user
    total = next(iter(last.users)) if len(last.users) == 1 else None
    if total is None or packet(total) not in (torch.ops.aten.add, torch.ops.aten.add_) or arguments(total)["alpha"] != 1:
        return None
    terms = [arguments(total)["self"], arguments(total)["other"]]
    other = terms[terms[0] is last]
    alike = isinstance(other, fx.Node) and shapes[other] == shapes[last] and last in terms
    return total if alike and other in ancestors(node) else None


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All that a node is computed from.

    >>> from torch import fx, nn
    >>> *_, last = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Tanh())).graph.nodes
    >>> sorted(each.name for each in ancestors(last))
    ['_0', '_1', 'input_1']
    """
    found: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending += source.all_input_nodes
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


__all__ = ["Consumer", "ancestors", "consumers"]
