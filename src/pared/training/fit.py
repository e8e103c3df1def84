"""The training loop: Lightning Fabric for devices and precision, checkpoints after every epoch, exact resuming."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pared.core.errors import DataError, SettingsError, TrainingError
from pared.core.seeds import rng_state, set_rng_state
from pared.graph.staged import Staged
from pared.training.check import check_labels, check_weights, run, split_batch
from pared.training.evaluate import evaluate
from pared.training.journal import FitRecord, copy_weights, identify, restore_weights
from pared.training.plan import Train, learning_rate_factor, make_optimizer
from pared.training.reference import reference
from pared.training.teaching import lesson_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from pared.training.task import Task

Objective = Callable[[nn.Module, tuple[Tensor, ...], Any], Tensor]


def fit(model: nn.Module, task: Task, train: Train, objective: Objective | None = None) -> None:
    """Train `model` in place; it is left in eval mode on the task's device.

    Frozen parameters are not touched. Where the task has a journal, a checkpoint is written after every epoch; a training that
    was through is not done again, one that was killed goes on after its last epoch, both with the result and the random state of
    an undisturbed run (to the bit, on a CPU).

    Events for `task.report`: `{"event": "batch", "epoch", "epochs", "done", "total", "loss"}` after every batch,
    `{"event": "epoch", "epoch", "epochs", "loss", "learning_rate", "metric", "value", "seconds"}` after every epoch (value is
    that of the validation split), `{"event": "resume", "epoch", "epochs"}` where a checkpoint is taken up; epochs count from 1.

    Args:
        model: any module; parametrized weights are trained through their parametrizations.
        task: data, loss, augmentation, machine.
        train: the plan.
        objective: the loss of one batch, `objective(model, inputs, targets)`, with inputs that are augmented and prepared, as a
            tuple. None: `task.loss(model(*inputs), targets)`, or what the plan makes of it (smoothed labels, a teacher).

    Raises:
        WeightsError: if the model holds NaN or infinity before the first step.
        DataError: if there are no batches, or a label has no output.
        TrainingError: if a loss is not finite, naming epoch and batch, or if every parameter is frozen.
        RunError: if a checkpoint belongs to another run or can't be written.

    >>> from pared.training import Task
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> model = nn.Linear(2, 2)
    >>> fit(model, Task(batches, batches, batches), Train(epochs=20, learning_rate=0.1))
    >>> model(torch.eye(2)).argmax(1)
    tensor([0, 1])
    """
    check_weights(model)
    for name in ("label_smoothing", "teach"):
        if objective is not None and (value := getattr(train, name)):
            raise SettingsError(f"train: {name} must be 0 where a method brings its own loss. Got {value!r}.")
    loss = _Loss(model, objective or default_objective(task, train))
    record = task.journal.fit() if task.journal is not None else None
    if train.epochs > 0:
        _train(loss, task, train, record)
    model.eval()


def _train(loss: _Loss, task: Task, train: Train, record: FitRecord | None) -> None:
    model = loss.model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("nothing to train: every parameter of the model is frozen (requires_grad is False).")
    fabric = task.machine.fabric()
    fabric.launch()
    model.to(fabric.device)
    batches = _share(task.train, fabric)
    total = _count(batches)
    state = _State(model, make_optimizer(model, train), batches)
    forward, optimizer = fabric.setup(loss, state.optimizer)
    identity = identify(model, train, total)
    if record is not None and state.load(record, identity):
        task.report({"event": "resume", "epoch": state.epoch, "epochs": train.epochs})
    while not state.is_finished(train):
        began = time.perf_counter()
        model.train()
        mean_loss, learning_rate = _Epoch(task, train, fabric, state.epoch, total).train(forward, optimizer, batches)
        value = evaluate(model, task, "valid")
        state.close_epoch(value, task.metric.higher_is_better, keep_best=train.early_stop is not None)
        if record is not None and fabric.is_global_zero:
            state.save(record, identity, finished=state.is_finished(train))
        task.report({
            "event": "epoch", "epoch": state.epoch, "epochs": train.epochs, "loss": mean_loss, "learning_rate": learning_rate,
            "metric": task.metric.name, "value": value, "seconds": time.perf_counter() - began,
        })  # fmt: skip
    if state.best is not None:
        restore_weights(model, state.best)
    optimizer.zero_grad()


def default_objective(task: Task, train: Train) -> Objective:
    """The task's loss of the model's outputs, with the plan's label smoothing, or mixed with what the teacher says.

    Batches without labels are taught by the task's teacher alone.

    Raises:
        SettingsError: if label smoothing is asked for and the loss isn't torch's cross entropy, or a teacher and there is none.
    """
    loss_of = output_loss(task, train)
    calls = itertools.count()

    def objective(model: nn.Module, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        loss = loss_of(inputs, targets)
        outputs = run(model, inputs)
        by_labels = targets is not None and not train.teach
        if by_labels and isinstance(model, Staged) and isinstance(outputs, list):
            # the lecture's loss of a network with exits: the sum over all
            return torch.stack([loss(logits) for logits in outputs]).sum()
        # on a GPU looking at the labels waits for the device, so only the first batches are looked at
        if by_labels and task.classifies and (task.machine.device.type == "cpu" or next(calls) < 8):
            check_labels(outputs, targets, "train")
        return loss(outputs)

    return objective


def output_loss(task: Task, train: Train) -> Callable[[tuple[Tensor, ...], Any], Callable[[Any], Tensor]]:
    """The loss of outputs for a batch: `output_loss(task, train)(inputs, targets)(outputs)`, for methods with several outputs to judge.

    Raises:
        SettingsError: as `default_objective`.
    """
    if train.teach:
        if task.teacher is None:
            raise SettingsError(
                f"train: teach must be 0 where there is no teacher. Got {train.teach!r}. Train in a recipe after its own training, or "
                "give the task one, Task(…, teacher=…)."
            )
        return lesson_of(task.teacher, task, train.temperature, train.teach, train=train)
    smoothing: dict[str, float] = {"label_smoothing": train.label_smoothing} if train.label_smoothing else {}
    if smoothing and not task.classifies:
        raise SettingsError(f"train: label_smoothing must be 0 where the task has a loss of its own. Got {train.label_smoothing!r}.")

    @functools.cache
    def without_labels() -> Callable[[tuple[Tensor, ...], Any], Callable[[Any], Tensor]]:
        teacher = reference(task, "the train split has no labels")
        return lesson_of(teacher, task, train.temperature, 1.0, train=train)

    def loss_of(inputs: tuple[Tensor, ...], targets: Any) -> Callable[[Any], Tensor]:
        if targets is None:
            return without_labels()(inputs, None)
        return lambda outputs: task.loss(outputs, targets, **smoothing)

    return loss_of


class _Loss(nn.Module):
    """The objective as a module, so that Fabric's strategy and precision see one forward; the model inside stays as it is."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        return self.objective(self.model, inputs, targets)


class _State:
    """Everything that goes on from one epoch to the next."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> None:
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.epoch = 0
        self.best: dict[str, Tensor] | None = None
        self.best_value: float | None = None
        self.stale = 0

    def is_finished(self, train: Train) -> bool:
        stopped = train.early_stop is not None and self.stale >= train.early_stop
        return stopped or self.epoch >= train.epochs

    def close_epoch(self, value: float, higher_is_better: bool, *, keep_best: bool) -> None:
        self.epoch += 1
        if not keep_best:
            return
        better = self.best_value is None or (value > self.best_value if higher_is_better else value < self.best_value)
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best, self.best_value = copy_weights(self.model), value

    def save(self, record: FitRecord, identity: dict[str, Any], *, finished: bool) -> None:
        progress = {"epoch": self.epoch, "stale": self.stale, "best_value": self.best_value}
        random = {"random": rng_state(), "generators": [generator.get_state() for generator in _generators(self.batches)]}
        if finished:  # only the result is wanted from now on: a third of the size
            record.save(identity, {**progress, **random, "weights": self.best or copy_weights(self.model), "best": None, "optimizer": None})
            return
        tensors = {"weights": copy_weights(self.model), "best": self.best, "optimizer": self.optimizer.state_dict()}
        record.save(identity, {**progress, **random, **tensors})

    def load(self, record: FitRecord, identity: dict[str, Any]) -> bool:
        saved = record.load(identity)
        if saved is None:
            return False
        restore_weights(self.model, saved["weights"])
        self.epoch, self.stale, self.best_value, self.best = saved["epoch"], saved["stale"], saved["best_value"], saved["best"]
        if saved["optimizer"] is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        _set_epoch(self.batches, self.epoch - 1)
        set_rng_state(saved["random"])
        for generator, state in zip(_generators(self.batches), saved["generators"], strict=True):
            generator.set_state(state)
        return True


@dataclass(frozen=True)
class _Epoch:
    """One pass over the training batches."""

    task: Task
    plan: Train
    fabric: Fabric
    number: int
    total: int

    def train(self, forward: Callable[..., Tensor], optimizer: Any, batches: Iterable[Any]) -> tuple[float, float]:
        """Step through all batches; returns the mean loss and the last learning rate."""
        warmup = round(self.plan.warmup * self.total)
        loss_sum, done, learning_rate = 0.0, 0, 0.0
        for inputs, targets in self._prepared(batches):
            step = self.number * self.total + done
            factor = learning_rate_factor(step, self.plan.epochs * self.total, warmup, self.plan.schedule)
            learning_rate = self.plan.learning_rate * factor
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.zero_grad()
            loss = self._loss(forward, inputs, targets, done)
            self.fabric.backward(loss)
            optimizer.step()
            loss_sum += loss.item()
            done += 1
            self.task.report({
                "event": "batch", "epoch": self.number + 1, "epochs": self.plan.epochs, "done": done, "total": self.total,
                "loss": loss_sum / done,
            })  # fmt: skip
        if done != self.total:
            raise DataError(f"the train split gave {done} batches in epoch {self.number + 1}, but its length is {self.total}.")
        return loss_sum / done, learning_rate

    def _prepared(self, batches: Iterable[Any]) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        _set_epoch(batches, self.number)
        generator = torch.Generator(self.fabric.device)
        # one number from the global generator: augmentation then depends on nothing but the state at the epoch's beginning
        generator.manual_seed(int(torch.randint(2**48, ())) + self.fabric.global_rank)
        for batch in batches:
            inputs, targets = split_batch(batch, "train")
            inputs = self.task.to_device(inputs)
            if self.plan.augment and self.task.augment is not None:
                inputs = self.task.augment(inputs, generator)
            yield self.task.prepare(inputs), self.task.to_device(targets)

    def _loss(self, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], targets: Any, done: int) -> Tensor:
        where = f"epoch {self.number + 1}, batch {done + 1}"
        try:
            loss = forward(inputs, targets)
        except IndexError as error:
            if "out of bounds" in str(error):  # torch's words for a label without an output, in an objective of a method
                raise DataError(f"{where} of the train split: {error} Labels must be smaller than the number of outputs.") from error
            raise
        if loss.numel() != 1:
            raise TrainingError(f"{where}: the loss must be one number. Got a tensor of shape {tuple(loss.shape)}.")
        if not math.isfinite(loss.item()):
            advice = f"Lower the learning rate (now {self.plan.learning_rate:g}) or add warmup."
            raise TrainingError(f"{where}: the loss is {loss.item()}. {advice}")
        return loss


class _EveryNth:
    """This process's share of something that isn't a DataLoader: every n-th batch, equally many for all."""

    def __init__(self, batches: Iterable[Any], rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world
        self.length = _count(batches) // world
        if self.length == 0:
            raise DataError(f"the train split has fewer batches than there are processes ({world}). Use smaller batches or fewer devices.")

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.batches, self.rank, self.length * self.world, self.world)

    def set_epoch(self, epoch: int) -> None:
        _set_epoch(self.batches, epoch)


def _share(batches: Iterable[Any], fabric: Fabric) -> Iterable[Any]:
    if fabric.world_size == 1:
        return batches
    if isinstance(batches, DataLoader):
        return fabric.setup_dataloaders(batches, move_to_device=False)
    return _EveryNth(batches, fabric.global_rank, fabric.world_size)


def _count(batches: Iterable[Any]) -> int:
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:  # no length: the schedule needs one, so it is counted
        count = sum(1 for _ in batches)
    if count == 0:
        raise DataError("the train split is empty.")
    return count


def _set_epoch(batches: Iterable[Any], epoch: int) -> None:
    """Tell what shuffles by epoch (pared's Batches, torch's DistributedSampler) which one it is."""
    for shuffler in (batches, getattr(batches, "sampler", None)):
        if hasattr(shuffler, "set_epoch"):
            shuffler.set_epoch(epoch)  # type: ignore[union-attr]


def _generators(batches: Iterable[Any]) -> list[torch.Generator]:
    """The random generators of its own that a DataLoader draws from."""
    owners = [batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)]
    found = {id(each): each for owner in owners if isinstance(each := getattr(owner, "generator", None), torch.Generator)}
    return list(found.values())
