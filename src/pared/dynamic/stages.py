"""Split a captured network into consecutive parts that train and run like the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pared.dynamic.places import Place, batch_size, depends_on_data, fetch, is_batch_size, writes
from pared.graph import Captured
from pared.graph.record import module_path

aten = torch.ops.aten

# layers whose forward is exactly one operator; where the network called one of them, the part calls the very same module
_LAYERS: dict[Any, tuple[type[nn.Module], ...]] = {
    aten.conv1d: (nn.Conv1d,),
    aten.conv2d: (nn.Conv2d,),
    aten.conv3d: (nn.Conv3d,),
    aten.linear: (nn.Linear,),
    aten.batch_norm: (_BatchNorm,),
    aten.dropout: (nn.Dropout,),
    aten.dropout_: (nn.Dropout,),
}
# where else an operator takes the training flag, as a literal of the captured graph
_DROPOUTS = (aten.dropout, aten.dropout_, aten.feature_dropout, aten.feature_dropout_, aten.alpha_dropout, aten.alpha_dropout_)
_TRAINING_FLAGS: dict[Any, int] = {aten.batch_norm: 5, **dict.fromkeys(_DROPOUTS, 2)}


def split(model: nn.Module, captured: Captured, places: Sequence[Place]) -> list[fx.GraphModule]:
    """Split the network at `places` into one part more than there are places; in turn they compute what the network computes.

    The captured graph is that of eval mode, yet the parts can be trained: a convolution, linear layer, batch norm or dropout is called
    as the user's own module (so it keeps its class, its masks and its training mode), and in what remains of `batch_norm` and `dropout`
    the literal False gives way to the part's own attribute `training`, which `train()` and `eval()` set. What eval mode leaves out of
    the graph altogether (stochastic depth, dropout inside fused attention, auxiliary outputs) is lost.

    Args:
        model: the very module that was captured; the parts share its layers and parameters.
        captured: its graph.
        places: in order, from `find_places(captured)`.

    >>> from pared.graph import capture
    >>> from pared.dynamic.places import find_places
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> captured = capture(model, torch.zeros(2, 4))
    >>> first, second = split(model, captured, find_places(captured)[-1:])
    >>> x = torch.ones(5, 4)
    >>> torch.equal(second(first(x)), model(x))
    True
    """
    nodes = list(captured.module.graph.nodes)
    ends = [place.index for place in places] + [len(nodes) - 1]
    values: list[fx.Node | None] = [place.node for place in places]
    parts, start = [], 0
    for end, given, wanted in zip(ends, [None, *values], [*values, None], strict=True):
        parts.append(_Part(model, captured, nodes, given).build(nodes[start : end + 1], wanted))
        start = end + 1
    return parts


class _Part:
    """The graph of one part while it is built."""

    def __init__(self, model: nn.Module, captured: Captured, nodes: list[fx.Node], given: fx.Node | None) -> None:
        self.captured = captured
        self.paths = dict(model.named_modules(remove_duplicate=False))
        self.batch = batch_size(captured)
        self.data = depends_on_data(nodes, self.batch)
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        inputs = [node for node in nodes if node.op == "placeholder"] if given is None else [given]
        for node in inputs:
            self.copies[node] = self.graph.placeholder(node.name if given is None else "activation")
        self.first_input = self.copies[inputs[0]]

    def build(self, nodes: list[fx.Node], wanted: fx.Node | None) -> fx.GraphModule:
        for node in nodes:
            if node.op == "output":
                wanted = node.args[0] if isinstance(node.args[0], fx.Node) else None
            elif node in self.data:
                self.copy(node)
        assert wanted is not None
        self.graph.output(self.copies[wanted])
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or writes(node))
        targets = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        return fx.GraphModule({target: self.root[target] for target in targets}, self.graph, class_name="Stage")

    def copy(self, node: fx.Node) -> fx.Node:
        """Copy a node, and before it what it needs; parameters and batch sizes are taken anew in each part."""
        if node in self.copies:
            return self.copies[node]
        if is_batch_size(node, self.batch):
            made = self.graph.call_function(aten.sym_size.int, (self.first_input, 0))
        elif node.op == "get_attr":
            self.root[str(node.target)] = fetch(self.captured.module, str(node.target))
            made = self.graph.get_attr(str(node.target))
        elif (path := self._layer(node)) is not None:
            self.root[path] = self.paths[path]
            made = self.graph.call_module(path, (self.copy(node.all_input_nodes[0]),))
        else:
            made = self.graph.node_copy(node, self.copy)
            self._follow_training_mode(made)
        made.meta = {}  # shapes and paths are those of the whole network
        self.copies[node] = made
        return made

    def _layer(self, node: fx.Node) -> str | None:
        """The path of the user's layer whose forward is this one operator."""
        kinds = _LAYERS.get(getattr(node.target, "overloadpacket", None), ())
        path = module_path(node)
        layer = self.paths.get(path)
        for kind in kinds:
            plain = (
                layer is not None and isinstance(layer, kind) and type(layer).forward is kind.forward
            )  # a subclass may compute more than one operator
            if plain and getattr(layer, "padding_mode", "zeros") == "zeros" and isinstance(node.args[0], fx.Node):
                return path
        return None

    def _follow_training_mode(self, node: fx.Node) -> None:
        position = _TRAINING_FLAGS.get(getattr(node.target, "overloadpacket", None))
        if position is None or len(node.args) <= position:
            return
        with self.graph.inserting_before(node):
            self.root["training"] = True
            flag = self.graph.get_attr("training")
        node.update_arg(position, flag)
