"""Dense convolutions of a trained network rewritten as depthwise separable ones, wherever these are faster."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pared.architecture.factors import kernels_by_input
from pared.architecture.replacing import replace, replaceable
from pared.core.errors import WeightsError
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.measure import latency
from pared.runtime import export
from pared.training import Task, Train, evaluating
from pared.training.layer_inputs import execution_order
from pared.training.samples import Inputs, first_inputs

_WHERE = "architecture.separable"
_FASTER = 0.95  # of the layer's time: two measurements of one file differ by 2 %
_RIDGE = 1e-4  # of the mean square of what the 1x1 convolution sees

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Separable:
    """Rewrite dense convolutions as a depthwise and a 1x1 convolution, begun from the trained weights (lecture: k²·I·O to k²·I + I·O).

    Layers are rewritten in the order in which they run. The depthwise kernels are the best ones of rank one for every input channel (or
    of `multiplier` kernels each); the 1x1 weights and the bias are then what makes the outputs nearest to those of the original network,
    by least squares, for what reaches the layer in the network that is rewritten so far: so each mends what those before it lost. Nothing
    stands between the two, as in Xception (Chollet 2017, 1610.02357, section 4.7). What is left of the loss is for `tune` to mend.

    Args:
        multiplier: depthwise kernels for each input channel. 1 is the lecture's; with as many as the kernel has places nothing is lost, and
            nothing is saved.
        measured: rewrite a layer only if the chain takes less time than it in ONNX Runtime, alone, at its size, one sample on one thread.
            False rewrites wherever there are fewer multiply-adds.
        samples: training samples that outputs are compared on.
        leave: paths of modules that stay as they are, with all that is inside them. The first convolution has few inputs, and little to
            save.
        tune: training afterwards; `Train(teach=0.9)` lets the original teach.

    Raises:
        SettingsError: for a wrong setting, or a path in `leave` that the model doesn't have.
        WeightsError: if a weight is NaN or infinite.
        ModelError: if the model reads the weight of a replaced layer itself.

    >>> batches = [(torch.randn(8, 4, 6, 6), torch.zeros(8, dtype=torch.long))]
    >>> model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    >>> small = Separable(measured=False)(model, Task(batches, batches, batches))
    >>> [tuple(part.weight.shape) for part in small[0]]
    [(4, 1, 3, 3), (16, 4, 1, 1)]
    """

    multiplier: int = 1
    measured: bool = True
    samples: int = 128
    leave: tuple[str, ...] = ()
    tune: Train | None = None

    def __post_init__(self) -> None:
        problems = Problems(_WHERE)
        problems.number("multiplier", self.multiplier, low=1, integer=True)
        problems.check(isinstance(self.measured, bool), "measured", "true or false", self.measured)
        problems.number("samples", self.samples, low=1, integer=True)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with separable convolutions in place of those that it pays for.

        Events for `task.report`: `{"event": "rewritten", "layer", "done", "of", "ms", "was_ms"}` for every layer (times None where they
        weren't measured or the layer stays).
        """
        original = bake(copy.deepcopy(model)).to(task.machine.device).eval()
        small = copy.deepcopy(original)
        batches = first_inputs(task, self.samples, "outputs of layers are compared on them")
        found = replaceable(small, [nn.Conv2d], self.leave, _WHERE)
        layers = {path: layer for path, layer in found.items() if isinstance(layer, nn.Conv2d) and self._saves(layer)}
        order = execution_order(small, layers, batches[0])
        for number, path in enumerate(order, 1):
            layer = layers[path]
            if not bool(torch.isfinite(layer.weight).all()):
                raise WeightsError(f"{path}.weight contains NaN or infinity, so it can't be decomposed. Train or load the model again.")
            chain = separable_convolution(layer, self.multiplier)
            times = _times(layer, chain, _input_of(small, path, batches)) if self.measured else None
            pays = times is None or times[1] <= _FASTER * times[0]
            event = {"event": "rewritten", "layer": path, "done": number, "of": len(order)}
            if pays:
                small = replace(small, {path: chain}, task, _WHERE)
                fit_outputs(chain, list(_pairs(original, small, path, batches)))
            task.report(event | {"was_ms": times[0] if times and pays else None, "ms": times[1] if times and pays else None})
        small.train(model.training)
        if self.tune is not None:
            task.tune(small, self.tune)
        return small

    def _saves(self, layer: nn.Conv2d) -> bool:
        """Whether the chain has fewer multiply-adds: k²·m·I + m·I·O against k²·I·O, all at the positions of the output."""
        kernel = layer.weight[0, 0].numel()
        return layer.groups == 1 and self.multiplier * (kernel + layer.out_channels) < kernel * layer.out_channels


def separable_convolution(layer: nn.Conv2d, multiplier: int = 1) -> nn.Sequential:
    """A depthwise and a 1x1 convolution in place of a dense one, by the best approximation of its weight.

    Stride, padding and dilation stay with the depthwise one, only the 1x1 has a bias.

    Args:
        layer: without groups.
        multiplier: kernels for each input channel, from 1 to the places of the kernel or the outputs, what is fewer.

    >>> layer = nn.Conv2d(2, 4, 3, padding=1)
    >>> exact = separable_convolution(layer, 4)
    >>> x = torch.randn(1, 2, 5, 5)
    >>> torch.allclose(exact(x), layer(x), atol=1e-5)
    True
    """
    multiplier = min(multiplier, layer.weight[0, 0].numel(), layer.out_channels)
    depthwise, pointwise = kernels_by_input(layer.weight, multiplier)
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    middle = multiplier * layer.in_channels
    first: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d, layer.in_channels, middle, layer.kernel_size, stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
        groups=layer.in_channels, bias=False, padding_mode=layer.padding_mode, **place,
    )  # fmt: skip  # pyright: ignore[reportAssignmentType]
    second: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, middle, layer.out_channels, 1, bias=True, **place)  # pyright: ignore
    with torch.no_grad():
        first.weight.copy_(depthwise.reshape(first.weight.shape))
        second.weight.copy_(pointwise.reshape(second.weight.shape))
        if second.bias is not None:
            second.bias.copy_(torch.zeros_like(second.bias) if layer.bias is None else layer.bias)
    for part in (first, second):
        part.requires_grad_(layer.weight.requires_grad)
    return nn.Sequential(first, second).train(layer.training)


def fit_outputs(chain: nn.Sequential, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Give the last, 1x1, convolution of a chain the weight and bias that bring its outputs nearest to those wanted, by least squares.

    Args:
        chain: a depthwise and a 1x1 convolution.
        pairs: what the chain gets, and what it should answer.
    """
    first, last = chain
    assert isinstance(last, nn.Conv2d)
    size = last.in_channels + 1
    gram = torch.zeros(size, size, dtype=torch.float64, device=last.weight.device)
    cross = torch.zeros(size, last.out_channels, dtype=torch.float64, device=last.weight.device)
    with torch.no_grad():
        for given, wanted in pairs:
            seen = first(given).movedim(1, -1).flatten(0, -2).double()
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            gram += seen.T @ seen
            cross += seen.T @ wanted.movedim(1, -1).flatten(0, -2).double()
        # what the samples don't show stays near what the weights said
        old = torch.cat([last.weight.flatten(1).double().T, last.bias.double()[None]]) if last.bias is not None else cross * 0
        ridge = _RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
        found = torch.linalg.solve(gram + ridge * torch.eye(size, dtype=gram.dtype, device=gram.device), cross + ridge * old)
        last.weight.copy_(found[:-1].T.reshape(last.weight.shape))
        if last.bias is not None:
            last.bias.copy_(found[-1])


def _input_of(model: nn.Module, path: str, batches: Inputs) -> Tensor:
    """One sample of what reaches a layer."""
    return next(_seen(model, path, batches[:1]))[0][:1]


def _pairs(original: nn.Module, small: nn.Module, path: str, batches: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    """What reaches a layer in the small network, and what the original's answers there."""
    for given, wanted in zip(_seen(small, path, batches), _seen(original, path, batches), strict=True):
        yield given[0], wanted[1]


def _seen(model: nn.Module, path: str, batches: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], out: Tensor) -> None:
        calls.append(((given[0] if given else named["input"]).detach(), out.detach()))

    for batch in batches:
        calls.clear()
        _forward(model, [batch], [model.get_submodule(path).register_forward_hook(note, with_kwargs=True)])
        yield from calls


def _forward(model: nn.Module, batches: Inputs, handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model):
            for batch in batches:
                model(*batch)
    finally:
        for handle in handles:
            handle.remove()


def _times(layer: nn.Module, chain: nn.Module, given: Tensor) -> tuple[float, float]:
    """Milliseconds of both in the engine, in turn."""
    given = given.cpu()
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: export(copy.deepcopy(each).cpu().eval(), (given,), Path(folder) / f"{name}.onnx")
            for name, each in (("layer", layer), ("chain", chain))
        }
        found = latency(files, given, quick=True)
    return found["layer"].median, found["chain"].median
