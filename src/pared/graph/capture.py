"""Capture a model as a graph with `torch.export`, without touching the model."""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from pared.core.errors import CaptureError, ModelError, ParedError
from pared.graph.regions import inline_regions

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Captured:
    """A model as a graph of ATen operators, with the user's parameters under the user's names.

    Attributes:
        module: graph whose `get_attr` nodes read the very parameters and buffers of the model (same objects); `train()`, `eval()`,
            `deepcopy` and a further `capture` work, but the training flags of batch norm and dropout are literals of the graph.
        example_inputs: the inputs used, with a batch of at least two.
        dynamic: whether the graph accepts any batch size.
    """

    module: fx.GraphModule
    example_inputs: Inputs
    dynamic: bool


def capture(model: nn.Module, example_inputs: Tensor | Sequence[Any], *, train: bool = False) -> Captured:
    """Capture `model` in eval mode (or training mode), with a dynamic batch where the model allows one.

    The first axis of every input tensor that shares the first tensor's length is taken to be the batch. A batch of one is repeated,
    since `torch.export` makes a constant of it. Tried in this order: one batch dimension, `Dim.AUTO`, fixed shapes, strict tracing.

    Args:
        model: any module; its training flags are put back afterwards.
        example_inputs: a tensor or a tuple of positional inputs.
        train: capture the graph of training mode.

    Raises:
        ModelError: if the model can't run on the example inputs.
        CaptureError: if `torch.export` can't follow the forward; names the module's class and the source line.

    >>> captured = capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(1, 4))
    >>> captured.dynamic, captured.module(torch.zeros(5, 4)).shape
    (True, torch.Size([5, 2]))
    """
    inputs = batch_of_two(as_inputs(example_inputs))
    with training_mode(model, train), quiet():
        _try_running(model, inputs)
        error: Exception | None = None
        one_batch = torch.export.Dim("batch", min=2 if train else 1)  # batch norm in training mode refuses a batch of one
        batched, automatic = _first_axis(inputs, one_batch), _first_axis(inputs, torch.export.Dim.AUTO)
        for shapes, strict in ((batched, False), (automatic, False), (None, False), (None, True)):
            try:
                program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict)
            except ParedError:
                raise
            except Exception as failure:
                error = error or failure
                continue
            unlifted = program.module(check_guards=False)
            return Captured(_plain_graph_module(unlifted), inputs, dynamic=_is_dynamic(program))
    assert error is not None
    raise CaptureError(
        f"{type(model).__name__}: torch.export can't follow its forward. {explain(error)} "
        "Rewrite that line without branching on tensor values, or compress the part of the model that doesn't contain it."
    ) from error


def as_inputs(example_inputs: Tensor | Sequence[Any]) -> Inputs:
    """Positional inputs as a tuple: a single tensor becomes a tuple of one."""
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


def batch_of_two(inputs: Inputs) -> Inputs:
    """Repeat a batch of one, so that the batch can stay symbolic."""
    if batch_size(inputs) != 1:
        return inputs
    return tuple(torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x for x in inputs)


def one_sample_more(inputs: Inputs) -> Inputs:
    """The same inputs with the first sample of the batch once more at its end."""
    size = batch_size(inputs)
    return tuple(torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.dim() and len(x) == size else x for x in inputs)


@contextlib.contextmanager
def training_mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Put `model` in training or eval mode for a while; every module gets its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch.export's warnings, logs and printed graphs to itself: what matters comes back as an exception."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def explain(error: BaseException) -> str:
    """Say in one sentence what went wrong and on which line of the user's code (the last frame outside torch)."""
    summary = str(error).strip().split("\n")[0].strip() or type(error).__name__
    where = ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    if own:
        where = f"{own[-1].filename}:{own[-1].lineno} `{linecache.getline(own[-1].filename, own[-1].lineno or 0).strip()}`: "
    elif (text := str(error)).count('File "'):
        lines = [line.strip() for line in text.split("\n")]
        at = [i for i, line in enumerate(lines) if line.startswith('File "') and not _is_library(line.split('"')[1])]
        if at:
            code = lines[at[-1] + 1] if at[-1] + 1 < len(lines) else ""
            where = f"{lines[at[-1]].removeprefix('File ')} `{code}`: "
    return f"{where}{summary.rstrip('.')}."


def _is_library(filename: str) -> bool:
    return any(part in filename for part in ("/torch/", "/pared/graph/", "\\torch\\", "\\pared\\graph\\", "<", "/sympy/", "contextlib.py"))


def _try_running(model: nn.Module, inputs: Inputs) -> None:
    try:
        with torch.no_grad(), buffers_put_back(model):
            model(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
        raise ModelError(f"{type(model).__name__} can't run on inputs of shape {shapes}. {explain(error)}") from error


@contextlib.contextmanager
def buffers_put_back(model: nn.Module) -> Iterator[None]:
    """A forward may write to buffers (statistics in training mode, a cache, a step count): the model gets them back as they were."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.device.type != "meta"
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in kept:
            module._buffers[name] = buffer
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def batch_size(inputs: Inputs) -> int | None:
    """The length of the first axis of the first tensor that has one."""
    return next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim()), None)


def _first_axis(inputs: Inputs, size: Any) -> Any:
    """The batch axis of every input that has one, by tensor, so that it fits any signature (also one that takes *inputs)."""
    shapes, batch = torch.export.ShapesCollection(), batch_size(inputs)
    for x in inputs:
        if isinstance(x, Tensor) and x.dim() and len(x) == batch:
            shapes[x] = {0: size}
    return shapes


def _is_dynamic(program: torch.export.ExportedProgram) -> bool:
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape if isinstance(size, torch.SymInt)]
    return any(size.node.maybe_as_int() is None for size in sizes)  # a size that became a constant is a SymInt still


def _plain_graph_module(unlifted: nn.Module) -> fx.GraphModule:
    """Re-wrap the exported module: `ep.module()` refuses train() and eval(), and its tracer can't be pickled.

    Where inputs are plain positional tensors the graph's calling convention becomes fx's own, which copies without warnings.
    """
    assert isinstance(unlifted, fx.GraphModule)
    inline_regions(unlifted)
    graph = unlifted.graph
    convention = getattr(graph._codegen, "pytree_info", None)
    if convention is not None and _is_flat(convention.in_spec):
        output = next(node for node in graph.nodes if node.op == "output")
        leaves = output.args[0] if isinstance(output.args[0], list | tuple) else [output.args[0]]
        result = pytree.tree_unflatten(list(leaves), convention.out_spec)
        if isinstance(result, fx.Node) or type(result) in (tuple, list, dict, immutable_list, immutable_dict):
            output.args = (result,)
            graph.set_codegen(CodeGen())
    module = fx.GraphModule(unlifted, graph)
    module._tracer_cls = None  # type: ignore[assignment]
    module.graph._tracer_cls = None
    return module


def _is_flat(spec: pytree.TreeSpec) -> bool:
    """Whether a forward takes only positional leaves: a tuple (arguments, keywords) of (leaf, leaf, …) and {}."""
    arguments, keywords = spec.children()
    return keywords.num_children == 0 and all(child.is_leaf() for child in arguments.children())
