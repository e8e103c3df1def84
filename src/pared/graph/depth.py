"""Depth: residual blocks in a captured graph, and networks without some of them.

A block is an addition of a value and of a branch that starts from it, x + f(x). Without the block the sum is x.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pared.core.errors import ModelError
from pared.graph.analysis_pass import attribute
from pared.graph.capture import Captured, as_inputs, capture
from pared.graph.cutting import agree, match_training, parts_of
from pared.graph.layers import rewritten_with_layers
from pared.graph.record import Shape, record
from pared.graph.rewritten import Rewritten
from pared.graph.training_graph import switched_to_training


@dataclass(frozen=True)
class Block:
    """A residual block: `end` = `start` + branch.

    Attributes:
        name: the module that holds the branch, or the modules in it where blocks share one.
        modules: the modules whose parameters the branch reads, in order.
        start: the value that goes into the block.
        end: the sum.
        replaced: what becomes `start` when the block goes: the sum, or the ReLUs that read it where `start` is rectified already.
        branch: the nodes on the way from `start` to the sum.
        channel_axis: the axis of features: 1 where the branch convolves, else the last.
    """

    name: str
    modules: tuple[str, ...]
    start: fx.Node = field(repr=False)
    end: fx.Node = field(repr=False)
    replaced: tuple[fx.Node, ...] = field(repr=False)
    branch: frozenset[fx.Node] = field(repr=False)
    channel_axis: int = -1

    @property
    def out(self) -> fx.Node:
        """The value that comes out of the block."""
        return self.replaced[0]

    def inside(self, other: Block) -> bool:
        """Whether this block is a part of another one's branch."""
        return self.end in other.branch


Choice = Callable[[Captured, tuple[Block, ...]], Sequence[Block]]


@dataclass(frozen=True)
class Shortened:
    """A network without some of its blocks.

    Attributes:
        model: a module of the user's class if `own_class`, else a `Rewritten` graph.
        own_class: whether the user's own forward could be kept, with `nn.Identity` or `nn.ReLU` in the place of the blocks' modules.
        removed: the names of the blocks that are gone, in the order of the network.
    """

    model: nn.Module
    own_class: bool
    removed: tuple[str, ...]


def find_blocks(captured: Captured) -> tuple[Block, ...]:
    """The residual blocks of a captured graph that could be removed, in the order of the network.

    An addition is one if both operands have the shape of the sum, one of them (the branch) is computed from the other, all that the
    branch reads besides comes from parameters or from inputs alone (masks, positions), it has a parameter, and nothing else reads what
    is computed on the way.

    Args:
        captured: from `capture`; a capture of training mode has the same blocks.

    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + self.layer(x)
    >>> [block.name for block in find_blocks(capture(nn.Sequential(Residual(), Residual()), torch.zeros(1, 4)))]
    ['0.layer', '1.layer']
    """
    graph = captured.module.graph
    seen = record(captured)
    ancestors: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        above = [parent for parent in node.all_input_nodes if _is_value(seen.get(parent))]
        ancestors[node] = frozenset(above).union(*(ancestors[parent] for parent in above))
    blocks = []
    for node in graph.nodes:
        if (operands := _operands(node, seen)) is None:
            continue
        for start, other in (operands, operands[::-1]):
            if start in ancestors[other] and start.op != "get_attr" and (found := _block(node, start, other, ancestors)) is not None:
                blocks.append(found)
    return _named(blocks)


def _is_value(seen: Any) -> bool:
    """Tensors carry data from block to block; numbers (sizes) don't."""
    return isinstance(seen, Shape | list)


def _operands(node: fx.Node, seen: dict[fx.Node, Any]) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of an addition without broadcasting."""
    if _packet(node) not in ("add", "add_") or node.kwargs.get("alpha", 1) != 1 or len(node.args) < 2:
        return None
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    same = isinstance(seen[node], Shape) and seen[left] == seen[node] == seen[right]
    return (left, right) if same else None


def _packet(node: Any) -> str:
    return getattr(getattr(getattr(node, "target", None), "overloadpacket", None), "__name__", "")


def _block(end: fx.Node, start: fx.Node, other: fx.Node, ancestors: dict[fx.Node, frozenset[fx.Node]]) -> Block | None:
    branch = frozenset(node for node in (*ancestors[other], other) if start in ancestors[node])
    beside = {parent for node in branch for parent in node.all_input_nodes if parent in ancestors} - branch - {start}
    if any(_learned(node, ancestors) for node in beside):
        return None
    if any(user not in branch and user is not end and _packet(user) not in _SIZES for node in branch for user in node.users):
        return None
    if any(_viewed(written) is start for node in branch if (written := _written(node)) is not None):
        return None
    behind = {side: [node for node in (side, *ancestors[side]) if _is_parameter(node)] for side in beside}
    weights = [weight for node in end.graph.nodes if node in branch for side in node.all_input_nodes for weight in behind.get(side, ())]
    if not weights:
        return None
    modules = tuple(dict.fromkeys(_owner(str(weight.target)) for weight in weights))
    rectified = _packet(start) in _RECTIFIERS and bool(end.users) and all(_packet(user) in _RECTIFIERS for user in end.users)
    convolves = any(_packet(node).startswith("conv") for node in branch)
    return Block("", modules, start, end, tuple(end.users) if rectified else (end,), branch, 1 if convolves else -1)


_SIZES = ("sym_size", "_assert_tensor_metadata")
_RECTIFIERS = ("relu", "relu_")
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(attribute(node), nn.Parameter)


def _learned(node: fx.Node, ancestors: dict[fx.Node, frozenset[fx.Node]]) -> bool:
    """Whether a value is computed by parameters from the model's inputs (a mask or a table of positions is not)."""
    above = ancestors[node]
    return any(parent.op == "placeholder" for parent in above) and any(map(_is_parameter, above))


def _owner(name: str) -> str:
    """The path of the module that a parameter belongs to."""
    path, parametrized, _ = f".{name}".partition(".parametrizations.")
    return path[1:] if parametrized else name.rpartition(".")[0]


def _written(node: fx.Node) -> fx.Node | None:
    """The argument that an operator changes in place, if any."""
    for argument, given in zip(_arguments(node), node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, fx.Node):
            return given
    return None


def _viewed(node: Any) -> Any:
    """The value that a chain of views looks at."""
    while _is_view(node):
        node = node.args[0]
    return node


def _is_view(node: Any) -> bool:
    arguments = _arguments(node)
    return bool(arguments) and bool(node.args) and arguments[0].alias_info is not None and not arguments[0].alias_info.is_write


def _arguments(node: Any) -> Sequence[Any]:
    return getattr(getattr(getattr(node, "target", None), "_schema", None), "arguments", ())


def _named(blocks: list[Block]) -> tuple[Block, ...]:
    """Every block by the module that holds its branch; where that holds others too, or is the model itself, by the modules in it."""
    homes = {block: _common(block.modules) for block in blocks}
    again: Counter[str] = Counter()
    named = []
    for block, home in homes.items():
        others = [homes[other] for other in blocks if other is not block and not other.inside(block)]
        if not home or any(other == home or other.startswith(f"{home}.") for other in others):
            depth = len(home.split(".")) + 1 if home else 1
            home = ", ".join(dict.fromkeys(".".join(path.split(".")[:depth]) for path in block.modules))
        again[home] += 1
        named.append(replace(block, name=home if again[home] == 1 else f"{home} ({again[home]})"))
    return tuple(named)


def _common(paths: Sequence[str]) -> str:
    """The longest path that all paths lie under."""
    parts = [path.split(".") for path in paths]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in same)


def shorten(model: nn.Module, example_inputs: Tensor | Sequence[Any], choose: Choice) -> Shortened:
    """Remove the blocks that `choose` picks from a copy of `model`: each becomes what goes into it.

    Args:
        model: any module that `capture` accepts; unchanged.
        example_inputs: a tensor or a tuple.
        choose: gets the captured graph and its blocks, and returns those that go.

    Returns:
        A module of the user's class where every removed block is all that a module of the user's does, and the network's own forward
        with `nn.Identity` (or `nn.ReLU`) in its place computes the same; else the rewritten graph as a module. Parameters that
        nothing reads any longer are gone.

    Raises:
        ModelError, CaptureError: as `capture`.
    """
    own = copy.deepcopy(model)
    captured = capture(own, as_inputs(example_inputs))
    blocks = find_blocks(captured)
    picked = choose(captured, blocks)
    places = [place for place, block in enumerate(blocks) if block in picked]
    if not places:
        return Shortened(own, True, ())
    chosen = [blocks[place] for place in places]
    evaluation, gone = _without(captured.module, chosen)
    pair = _training_graph(model, captured, blocks, places)
    graphs = (evaluation, switched_to_training(evaluation) if pair is None else pair[1])
    before = [captured.module.graph] if pair is None else [captured.module.graph, pair[0]]
    parts, saved = _left(own, captured, before, graphs), set(own.state_dict())
    rewritten = Rewritten(parts, *graphs, saved)
    result = _own_class(own, rewritten, captured, chosen, gone)
    if result is None:
        result = rewritten_with_layers(own, parts, graphs, saved, {})
        if not agree(result, rewritten, captured):
            result = rewritten
    match_training(result, model)
    return Shortened(result, result is own, tuple(block.name for block in chosen))


def without(captured: Captured, blocks: Sequence[Block]) -> fx.GraphModule:
    """The captured graph, in its mode, without some of its blocks: over the same tensors, to look at what a removal does."""
    order = {node: place for place, node in enumerate(captured.module.graph.nodes)}
    return fx.GraphModule(captured.module, _without(captured.module, sorted(blocks, key=lambda block: order[block.end]))[0])


def _without(module: fx.GraphModule, blocks: Sequence[Block]) -> tuple[fx.Graph, frozenset[fx.Node]]:
    """The graph without some blocks (in the order of the network), and the nodes of the old graph that are gone."""
    graph = fx.Graph()
    graph.set_codegen(module.graph._codegen)
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    now, doomed = dict(copies), set()
    for block in blocks:
        doomed |= {copies[node] for node in (*block.branch, block.end, *block.replaced)}
        for node in block.replaced:
            old, new = copies[node], now[block.start]
            if _is_changed(old):  # what goes into the block may have other readers
                with graph.inserting_before(old):
                    new = graph.call_function(torch.ops.aten.clone.default, (new,))
            old.replace_all_uses_with(new)
            now[node] = new
        now[block.end] = now[block.replaced[0]]
    erased = _erase(graph, lambda node: node in doomed or _written(node) is None)
    read = {_owner(str(node.target)) for node in graph.nodes if node.op == "get_attr" and any(user.users for user in node.users)}
    lost = {path for block in blocks for path in block.modules} - read
    erased |= _erase(graph, lambda node: _written(node) is None or _counts_for(node, lost))
    graph.lint()
    return graph, frozenset(node for node, twin in copies.items() if twin in erased)


def _is_changed(node: fx.Node) -> bool:
    """Whether a reader changes the value in place, itself or through a view."""
    return any(_written(user) is node or (_is_view(user) and user.args[0] is node and _is_changed(user)) for user in node.users)


def _erase(graph: fx.Graph, may_go: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Take out nodes that nothing reads."""
    erased = set()
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and may_go(node):
            graph.erase_node(node)
            erased.add(node)
    return erased


def _counts_for(node: fx.Node, lost: set[str]) -> bool:
    """Whether a node only keeps a buffer of a lost module up to date (batches counted by a batch norm)."""
    return all(source.op == "get_attr" and _owner(str(source.target)) in lost for source in node.all_input_nodes)


def _training_graph(
    model: nn.Module, captured: Captured, blocks: Sequence[Block], places: Sequence[int]
) -> tuple[fx.Graph, fx.Graph] | None:
    """The graph of training mode, whole and without the blocks at `places`; None where it can't be had or has other blocks."""
    twin = copy.deepcopy(model)
    try:
        with torch.random.fork_rng():
            training = capture(twin, captured.example_inputs, train=True)
            found = find_blocks(training)
    except (ModelError, RuntimeError):
        return None
    if training.dynamic != captured.dynamic or [block.name for block in found] != [block.name for block in blocks]:
        return None
    return training.module.graph, _without(training.module, [found[place] for place in places])[0]


def _left(own: nn.Module, captured: Captured, before: Iterable[fx.Graph], after: Iterable[fx.Graph]) -> dict[str, Tensor | nn.Module]:
    """All tensors but those that only the removed blocks read."""
    parts = parts_of(own, captured, {})
    was, still = ({str(node.target) for graph in graphs for node in graph.nodes if node.op == "get_attr" and node.users}
                  for graphs in (before, after))  # fmt: skip
    kept = {id(parts[name]) for name in still if name in parts}
    lost = {id(parts[name]) for name in was if name in parts} - kept
    modules = {_owner(name) for name, part in parts.items() if id(part) in lost} - {_owner(name) for name in still}
    return {name: part for name, part in parts.items() if id(part) in kept or (id(part) not in lost and _owner(name) not in modules)}


def _own_class(
    own: nn.Module, rewritten: nn.Module, captured: Captured, chosen: Sequence[Block], gone: frozenset[fx.Node]
) -> nn.Module | None:
    """The user's module with nothing in the place of modules that only made the removed blocks, if it computes the same; else None."""
    scopes: dict[str, list[fx.Node]] = {}
    for node in captured.module.graph.nodes:
        if node.op == "call_function" and not isinstance(
            node.meta.get("val"), _NUMBERS
        ):  # a size may be read far from where it was asked for
            for path in dict.fromkeys(str(path).split("@")[0] for path, _ in (node.meta.get("nn_module_stack") or {}).values()):
                scopes.setdefault(path, []).append(node)
    pending, instead = {block.end for block in chosen}, {}
    for path, _ in own.named_modules():
        nodes = scopes.get(path, [])
        left = [node for node in nodes if node not in gone]
        if path and pending.intersection(nodes) and (not left or [_packet(node) in _RECTIFIERS for node in left] == [True]):
            instead[path] = nn.ReLU() if left else nn.Identity()
            pending.difference_update(nodes)
    if pending:
        return None
    before = {path: own.get_submodule(path) for path in instead}
    for modules in (instead, before):
        for path, module in modules.items():
            parent, _, leaf = path.rpartition(".")
            own.get_submodule(parent)._modules[leaf] = module
        if modules is instead and agree(own, rewritten, captured):
            return own
    return None
