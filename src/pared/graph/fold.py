"""Fold batch norm into the convolution or linear layer before it: exact, and one operator fewer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

CONVOLUTIONS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d})
TRANSPOSED = frozenset({aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d})
_GROUPS_OF_TRANSPOSED = 6  # the position of `groups` among the arguments


def fold_batch_norm(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `graph_module` in which batch norms in eval form are part of the layer before them.

    w' = w * gamma / sqrt(var + eps) and b' = (b - mean) * gamma / sqrt(var + eps) + beta for each output channel (Jacob et al. 2018,
    1712.05877, section 3.2). A batch norm is folded if nothing else reads the output of its layer, and nothing else reads the
    layer's weight and bias; others stay. The layer's parameters keep their names, a missing bias becomes `bias` beside the weight,
    and what nothing reads any more (the statistics) is dropped.

    Args:
        graph_module: a captured graph (`capture(...).module`).

    >>> from pared.graph.capture import capture
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> sorted(fold_batch_norm(capture(model, torch.zeros(2, 3, 5, 5)).module).state_dict())
    ['0.bias', '0.weight']
    """
    module = copy.deepcopy(graph_module)
    for node in list(module.graph.nodes):
        if packet(node) is aten.batch_norm and can_fold(module, node):
            _fold(module, node)
    return rebuilt(module)


def packet(node: fx.Node) -> Any:
    """The operator that a node calls, without its overload: `torch.ops.aten.conv2d`; None if it calls none."""
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None


def rebuilt(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph in a module that holds only the parameters and buffers that it reads."""
    for node in reversed(list(module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.graph.lint()
    training = module.training
    result = fx.GraphModule(module, module.graph)
    result._tracer_cls = None  # type: ignore[assignment]  # torch.export's tracer can't be pickled
    result.graph._tracer_cls = None
    result.meta.update(module.meta)
    return result.train(training)


def read(module: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def place(module: nn.Module, path: str, value: Tensor) -> None:
    """Put a parameter or buffer at a dotted path, in place of what is there; containers that are missing are made."""
    *parents, name = path.split(".")
    holder = module
    for part in parents:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    if hasattr(holder, name):
        delattr(holder, name)
    if isinstance(value, nn.Parameter):
        holder.register_parameter(name, value)
    else:
        holder.register_buffer(name, value)


def readers(module: fx.GraphModule, tensor: Tensor) -> list[fx.Node]:
    """Nodes that read a parameter or buffer, under whatever name (tied weights have several)."""
    sources = [n for n in module.graph.nodes if n.op == "get_attr" and read(module, str(n.target)) is tensor]
    return [user for source in sources for user in source.users]


def argument(node: fx.Node, index: int, default: Any = None) -> Any:
    """A positional argument of a node, or its default where the call leaves it out."""
    return node.args[index] if len(node.args) > index else default


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen operator by the names of its schema, defaults included; empty for anything else."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return {}
    found = {entry.name: entry.default_value for entry in schema.arguments}
    found.update(zip(found, node.args, strict=False))
    found.update(node.kwargs)
    return found


def can_fold(module: fx.GraphModule, norm: fx.Node) -> bool:
    """Whether a batch norm can become part of the layer before it, see `fold_batch_norm`."""
    layer = argument(norm, 0)
    if not isinstance(layer, fx.Node) or argument(norm, 5) is not False or len(layer.users) != 1:
        return False
    if not all(entry is None or _is_constant(entry) for entry in norm.args[1:5]) or argument(norm, 3) is None:
        return False
    if packet(layer) not in (*CONVOLUTIONS, *TRANSPOSED, aten.linear) or layer.kwargs:
        return False
    value = layer.meta.get("val")
    if packet(layer) is aten.linear and (value is None or value.dim() != 2):
        return False  # behind more axes the norm's channels aren't the layer's outputs
    weight, bias = argument(layer, 1), argument(layer, 2)
    if not _is_constant(weight) or not (bias is None or _is_constant(bias)):
        return False
    return all(len(readers(module, read(module, str(entry.target)))) == 1 for entry in (weight, bias) if entry is not None)


def _is_constant(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _read_argument(module: fx.GraphModule, node: fx.Node, index: int) -> Tensor | None:
    source = argument(node, index)
    return None if source is None else read(module, source.target)


def _fold(module: fx.GraphModule, norm: fx.Node) -> None:
    layer = argument(norm, 0)
    source, bias_source = argument(layer, 1), argument(layer, 2)
    gamma, beta, mean, var = (_read_argument(module, norm, index) for index in range(1, 5))
    weight, bias = read(module, source.target), None if bias_source is None else read(module, bias_source.target)
    groups = argument(layer, _GROUPS_OF_TRANSPOSED, 1) if packet(layer) in TRANSPOSED else None
    assert mean is not None
    assert var is not None
    with torch.no_grad():
        new_weight, new_bias = folded(weight, bias, (gamma, beta, mean, var), argument(norm, 7), groups)
    place(module, source.target, nn.Parameter(new_weight, weight.requires_grad))
    trainable = weight.requires_grad if bias is None else bias.requires_grad
    if bias_source is None:
        parent = source.target.rpartition(".")[0]
        path = f"{parent}.bias" if parent else "bias"
        path = path if not _taken(module, path) else f"{source.target}_bias"
        place(module, path, nn.Parameter(new_bias, trainable))
        with module.graph.inserting_before(layer):
            bias_source = module.graph.get_attr(path)
        layer.args = (*layer.args[:2], bias_source, *layer.args[3:])
    else:
        place(module, bias_source.target, nn.Parameter(new_bias, trainable))
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)


def _taken(module: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name, None) is not None


def folded(
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    eps: float,
    groups_of_transposed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the batch norm that follows it folded in.

    Args:
        weight: (outputs, …), or for a transposed convolution (inputs, outputs / groups, …).
        bias: (outputs,) or None.
        norm: gamma, beta, running mean, running variance, each (outputs,) or, for the first two, None.
        eps: of the batch norm.
        groups_of_transposed: the groups of a transposed convolution; None for other layers.

    Returns:
        The new weight, in its own shape and type, and the new bias.

    >>> folded(torch.ones(1, 1), None, (None, torch.ones(1), torch.ones(1), torch.full((1,), 4.0)), 0.0)
    (tensor([[0.5000]]), tensor([0.5000]))
    """
    gamma, beta, mean, var = norm
    # in double precision, so that the only rounding is that of the result
    scale = 1.0 / torch.sqrt(var.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    if groups_of_transposed is None:
        shaped = scale.reshape(-1, *[1] * (weight.dim() - 1))
        new_weight = weight.double() * shaped
    else:
        grouped = weight.double().unflatten(0, (groups_of_transposed, -1))
        shaped = scale.reshape(groups_of_transposed, 1, -1, *[1] * (weight.dim() - 2))
        new_weight = (grouped * shaped).flatten(0, 1)
    new_bias = ((0.0 if bias is None else bias.double()) - mean.double()) * scale
    if beta is not None:
        new_bias = new_bias + beta.double()
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype)
