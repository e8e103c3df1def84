"""Trace a model by running it twice: a graph like the one of `torch.export`, mostly sooner, where nothing is hidden from it.

The forward runs on the example and on a batch of one more, and every ATen operator is noted before PyTorch takes it apart. Numbers that
differ between the two runs are multiples of the batch. What a graph made so could miss (branches on values, numbers read out of tensors,
regions under autocast, tensors that come from nowhere) is noticed, and left to `torch.export`.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import weakref
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.node import map_aggregate
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pared.graph.capture import (
    Captured,
    Inputs,
    as_inputs,
    batch_of_two,
    batch_size,
    buffers_put_back,
    capture,
    one_sample_more,
    quiet,
    training_mode,
)
from pared.graph.open_batch import NotTraced, open_batch
from pared.graph.record import abstract

_NUMBERS = (int, float, bool, complex)
_DATA: Any = torch.Tensor.data
_HIDING = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr, _DATA.__get__,
    torch._C._set_grad_enabled,
}  # fmt: skip
_LIBRARY = ("/torch/", "\\torch\\", "<", __file__)


def trace_or_capture(model: nn.Module, example_inputs: Tensor | Sequence[Any], *, train: bool = False) -> Captured:
    """What `capture` gives, from two runs of the model where these show all of it.

    Shapes are noted at the nodes as `Shape`, not as fake tensors; all else is alike.

    Args:
        model: any module; its training flags and its buffers are put back afterwards.
        example_inputs: a tensor or a tuple of positional inputs.
        train: the graph of training mode; random numbers are drawn.

    Raises:
        ModelError, CaptureError: as `capture`.

    >>> captured = trace_or_capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(1, 4))
    >>> captured.dynamic, captured.module(torch.zeros(5, 4)).shape
    (True, torch.Size([5, 2]))
    """
    inputs = batch_of_two(as_inputs(example_inputs))
    try:
        with training_mode(model, train), quiet(), buffers_put_back(model):
            return Captured(trace(model, inputs), inputs, dynamic=True)
    except NotTraced:
        return capture(model, inputs, train=train)


def trace(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The graph of a model in the mode that it is in, over its own parameters and for any batch size.

    Args:
        model: its buffers may change, as in any run.
        inputs: positional, with a batch of at least two.

    Raises:
        NotTraced: if the forward does something that a run can't show, or the batch comes in otherwise than as a factor.
    """
    size = batch_size(inputs)
    if size is None or not all(isinstance(x, Tensor) for x in inputs):
        raise NotTraced("inputs are more than tensors with a batch")
    owned = list(_tensors(model))
    (first, constants), (second, others) = (_run(model, batch, owned) for batch in (inputs, one_sample_more(inputs)))
    if len(constants) != len(others) or not all(map(_same, constants.values(), others.values())):
        raise NotTraced("a tensor comes from outside of the model")
    open_batch(first, second, size, next(number for number, x in enumerate(inputs) if x.dim() and len(x) == size))
    tensors = dict(owned) | constants
    return fx.GraphModule({str(node.target): tensors[str(node.target)] for node in first.nodes if node.op == "get_attr"}, first)


def _run(model: nn.Module, inputs: Inputs, owned: list[tuple[str, Tensor]]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """One run, operator by operator; and tensors that it met which neither the model (`owned`) nor an operator made."""
    recorder = _Recorder(model, inputs, owned)
    try:
        with _fast_paths_off(), torch.no_grad(), recorder.modules_noted(), enable_python_dispatcher(), recorder, _Watch():
            outputs = model(*inputs)
    except NotTraced:
        raise
    except Exception as error:
        raise NotTraced(f"can't be run: {error}") from error
    recorder.finish(outputs)
    return recorder.graph, recorder.constants


@contextlib.contextmanager
def _fast_paths_off() -> Iterator[None]:
    """Attention as its separate operators, as in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Watch(TorchFunctionMode):
    """Notices what operators don't show: values that leave their tensors, and regions with other rules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HIDING:
            raise NotTraced(f"{getattr(func, '__name__', func)} can't be seen in a run")
        return func(*args, **(kwargs or {}))


class _Recorder(ProxyTorchDispatchMode):
    """Notes every operator before autograd and decompositions see it; the same place in the dispatcher that `torch.export` records at."""

    def __init__(self, model: nn.Module, inputs: Inputs, owned: list[tuple[str, Tensor]]) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.graph = fx.Graph()
        self.known: dict[int, tuple[weakref.ref[Tensor], fx.Node, int | None]] = {}
        self.constants: dict[str, Tensor] = {}
        self.owned = [tensor for _, tensor in owned]
        self.names = {id(tensor): name for name, tensor in owned}
        self.paths = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.stack: dict[str, tuple[str, str]] = {}
        self.regions = _autocast_regions()
        for number, tensor in enumerate(inputs):
            node = self.graph.placeholder(f"input_{number}")
            node.meta["val"] = abstract(tensor)
            self._remember(tensor, node)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it imports the compiler

    def __enter__(self) -> _Recorder:
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places, named = map_aggregate(args, self._node), map_aggregate(kwargs, self._node)
        with no_python_dispatcher():  # the kernel itself, not PyTorch's decompositions of it
            result = func(*args, **kwargs)
        if isinstance(result, _NUMBERS):
            raise NotTraced(f"{func} reads a number out of a tensor")
        if _autocast_regions() != self.regions:
            raise NotTraced("a region has an autocast of its own")
        node = self.graph.call_function(func, places, named)  # type: ignore[arg-type]
        node.meta.update(val=abstract(result), nn_module_stack=self.stack, stack_trace=_where(sys._getframe(1)))
        if isinstance(result, Tensor):
            self._remember(result, node)
        elif isinstance(result, list | tuple):
            for number, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._remember(part, node, number)
        return result

    def _remember(self, tensor: Tensor, node: fx.Node, number: int | None = None) -> None:
        self.known[id(tensor)] = weakref.ref(tensor), node, number

    def _node(self, value: Any) -> Any:
        """What stands for a tensor in the graph; other arguments stand for themselves."""
        if not isinstance(value, Tensor):
            return value
        reference, node, number = self.known.get(id(value), (None, None, None))
        if reference is None or node is None or reference() is not value:  # an id can come again
            node = self.graph.get_attr(self.names.get(id(value)) or self._constant(value))
            node.meta["val"] = abstract(value)
        elif number is not None:
            whole, node = node, self.graph.call_function(operator.getitem, (node, number))
            node.meta = {**whole.meta, "val": abstract(value)}
        self._remember(value, node)
        return node

    def _constant(self, value: Tensor) -> str:
        """Keep a tensor that comes from nowhere; a view of what the model computes doesn't."""
        storage = value.untyped_storage().data_ptr()
        alive = [tensor for reference, *_ in self.known.values() if (tensor := reference()) is not None]
        if value.requires_grad or any(tensor.untyped_storage().data_ptr() == storage for tensor in (*alive, *self.owned)):
            raise NotTraced("a tensor is taken past the operators")
        name = f"_tensor_constant{len(self.constants)}"
        self.constants[name] = value.detach().clone()
        return name

    @contextlib.contextmanager
    def modules_noted(self) -> Iterator[None]:
        """Every operator knows the modules in whose forward it stands."""

        def enter(module: nn.Module, _: Any) -> None:
            before.append(self.stack)
            path = self.paths.get(id(module))
            if path is not None:
                calls[path] = number = calls.get(path, -1) + 1
                place = f"{path}@{number}" if number else path  # as torch.export tells one call from the next
                self.stack = {**self.stack, place: (place, f"{type(module).__module__}.{type(module).__qualname__}")}

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            self.stack = before.pop()

        before: list[dict[str, tuple[str, str]]] = []
        calls: dict[str, int] = {}
        handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, outputs: Any) -> None:
        """The output node; nested tuples, lists and dicts are kept."""
        plain = (tuple, list, dict)
        leaves, spec = pytree.tree_flatten(outputs)
        if not all(isinstance(leaf, Tensor) for leaf in leaves) or not _only(outputs, plain):
            raise NotTraced("outputs are more than tensors")
        self.graph.output(pytree.tree_unflatten([self._node(leaf) for leaf in leaves], spec))


def _autocast_regions() -> int:
    """How many regions of autocast, on or off, are open; nothing else tells one that is off."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model by name, the first name of each last."""
    found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        found += [(prefix + name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
    yield from reversed(found)


def _only(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a nested value is made of these very types, and leaves."""
    if isinstance(value, dict):
        return type(value) in kinds and all(_only(entry, kinds) for entry in value.values())
    if isinstance(value, list | tuple):
        return type(value) in kinds and all(_only(entry, kinds) for entry in value)
    return True


def _where(frame: FrameType | None) -> str:
    """The innermost line outside of torch, written as in a traceback."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not any(part in name for part in _LIBRARY):
            return f'  File "{name}", line {frame.f_lineno}, in {frame.f_code.co_name}'
        frame = frame.f_back
    return ""
