"""Rate-aware training: the bits that weights and biases cost in the packed file are part of the loss."""

from __future__ import annotations

import copy
import dataclasses
import logging
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import nn

from pared.codec.packing import pack
from pared.core.layers import compressible, stored
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.core.units import Bytes
from pared.quantize.rate_charge import Charge, Pricing, coded_bytes
from pared.quantize.rate_finish import without_dead, without_norms
from pared.quantize.rate_grid import RateGrid, rate_grids, set_grid
from pared.runtime import export
from pared.training import Task, Train, check_weights, taught_by
from pared.training.fit import default_objective

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rate:
    """Train weights and biases on a learned grid, with a price on every bit that they cost in the packed file.

    Every weight and bias of convolutions and linear layers is step · k with a whole number k. The loss is the task's plus `price` times the
    bits of the adaptive coding (FORMAT.md, section 8): which entries are zero, given their row, column and neighbours, signs and
    magnitudes. What an entry would cost is found anew every 40 steps, so weights settle where they are cheap: rows and columns empty
    themselves, others fill up. Dead neurons are removed in the end without a change of the outputs, and batch norms are folded, as
    the deployed file does anyway. It is the idea of entropy-penalised reparametrisation (Oktay et al. 2020, 1906.06624), with the
    adaptive contexts of DeepCABAC (Wiedemann et al. 2019, 1905.08318) as the model of probability.

    The grids hold through all later steps; `bake` leaves ordinary tensors. On a network that has such grids already it goes on with them,
    and the price rises from where it was: several of these one after the other, each with a higher price, give a whole curve of sizes.

    Patience pays: weights that a high price has driven to zero don't come back when it falls, so train long at a low price
    that rises slowly. In the lab (`rate_aware`) a LeNet-300-100 for Fashion-MNIST has 8.4 kB of weights after 80 epochs at half the default
    price and 50 at the default, and answers as the dense network does. Entries that never matter cost nothing if they see nothing but
    zeros: leave the background of pictures at 0, without subtracting a mean.

    Args:
        price: loss for each bit: at the default a file of 100,000 bits adds 0.3 to the loss. It is where to begin with small image
            classifiers and tens of thousands of training steps; with fewer steps it has to be higher. In the lab (`rate_aware`) each
            doubling, trained on from the one before, took off a fifth to a third of the weights' bytes.
        bytes: what the packed file (`pared pack`, of the whole exported network) is to have, such as "10kB"; the price is found while
            training: it begins with `price` and follows the size. A log message says so if the file is larger in the end. None: the
            price decides.
        ramp: the share of the training in which the price rises evenly. By default half, so that the other half settles what it did.
        step: what the grids begin with, as a part of the root mean square of a tensor's entries. 1: most weights begin at 0 and ±1, and
            training makes the step smaller where finer values are needed.
        contexts: False charges every entry alike, as a coder without contexts would. For comparisons.
        teach: share of the teacher's answers in the loss, where the task has a teacher (a recipe sets it): the rest is the labels'.
        temperature: of the teacher's answers, see `distill.Teach`.
        train: the training. What the learning rate means doesn't depend on the size of weights: at Adam's 0.001 each moves by about a
            hundredth of its grid's step at a time.
        leave: paths of modules that stay as they are.

    Raises:
        SettingsError: for a wrong setting, a path in `leave` that isn't there, a model without convolutions and linear layers, or a
            weight that is computed from other parameters.
        WeightsError: if a weight isn't finite.

    >>> import torch
    >>> batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    >>> small = Rate(price=0.01, train="1ep")(nn.Linear(4, 2), Task(batches, batches, batches))
    >>> step = small.parametrizations.weight[0].scale().item()
    >>> bool(((small.weight / step).round() * step == small.weight).all())
    True
    """

    price: float = 3e-6
    bytes: int | str | None = None
    ramp: float = 0.5
    step: float = 1.0
    contexts: bool = True
    teach: float = 0.7
    temperature: float = 2.0
    train: Train = field(default_factory=partial(Train, epochs=30))
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("quantize.rate")
        problems.number("price", self.price, low=0, high=1)
        wanted = None if self.bytes is None else Bytes.parse(self.bytes).count
        problems.check(wanted != 0, "bytes", "a size greater than 0", self.bytes)
        problems.check(wanted is None or self.price > 0, "price", "greater than 0 where bytes is given, to begin with", self.price)
        problems.number("ramp", self.ramp, low=0, high=1)
        problems.number("step", self.step, above=0, high=1e3)
        problems.check(isinstance(self.contexts, bool), "contexts", "true or false", self.contexts)
        problems.number("teach", self.teach, low=0, high=1)
        problems.number("temperature", self.temperature, above=0, high=1e3)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        train = Train.parse(self.train)
        problems.check(train.early_stop is None, "train", "a plan without early_stop", train)
        problems.raise_if_any()
        object.__setattr__(self, "bytes", wanted)
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` on rate grids, trained, without dead neurons."""
        model = self.prepare(model, task)
        task.tune(model, self.train, self.objective(model, task))
        model = self.finish(model, task)
        if self.bytes is not None and (found := _packed_bytes(model, task)) > Bytes.parse(self.bytes).count:
            _log.warning("quantize.rate: the packed file was to have %s bytes, it has %d. Train longer.", self.bytes, found)
        return model

    def prepare(self, model: nn.Module, task: Task) -> nn.Module:
        """A copy of `model` with grids on weights and biases; what has one keeps it."""
        check_weights(model)
        model = copy.deepcopy(model).to(task.machine.device)
        for layer in compressible(model, self.leave, "quantize.rate", _behind).values():
            for name in ("weight", "bias"):
                if stored(layer, name) is not None:
                    set_grid(model, layer, name, self.step)
        return model

    def objective(self, model: nn.Module, task: Task) -> Charge:
        """The loss with the price of all bits, for a loop of your own; `model` is what `prepare` returned."""
        if task.teacher is not None and self.teach > 0:
            base = taught_by(task.teacher, task, self.temperature, self.teach, train=self.train)
        else:
            base = default_objective(task, self.train)
        size = None
        if self.bytes is not None:
            others = _packed_bytes(model, task) - sum(coded_bytes(each) for each in rate_grids(model))
            size = max(1.0, Bytes.parse(self.bytes).count - others)
        return Charge(model, task, self.train.epochs, Pricing(self.price, self.ramp, size, self.contexts), base)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        """Fold batch norms and remove dead neurons; the outputs stay, and what is on a grid stays on one."""
        inputs = task.example_inputs(8)
        return without_dead(without_norms(model, inputs), inputs, self.leave)


def _behind(module: nn.Module, name: str) -> nn.Parameter | None:
    return stored(module, name, RateGrid)


def _packed_bytes(model: nn.Module, task: Task) -> int:
    """Bytes of the whole file, as `pared pack` makes it of the exported network."""
    raw = dataclasses.replace(task, normalize=None).example_inputs()
    normalize = None if task.normalize is None else copy.deepcopy(task.normalize).cpu()
    with tempfile.TemporaryDirectory() as folder:
        plain = bake(copy.deepcopy(model)).cpu().eval()
        source = export(plain, tuple(x.cpu() for x in raw), Path(folder) / "small.onnx", normalize=normalize)
        target = source.with_suffix(".pared")
        pack(source, target, "smallest")
        return target.stat().st_size
