"""A teacher's answers: given anew for each batch, or kept, where the same samples come again."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import io
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.core.digests import digest
from pared.core.files import write_atomic
from pared.training.check import run
from pared.training.processes import rank_and_world

if TYPE_CHECKING:
    from pared.training.plan import Train
    from pared.training.task import Task

Key = tuple[int, int]

_LARGEST = 2**30  # bytes of answers; a set that needs more is answered anew
_CHECKSUM = 32  # bytes of SHA-256 in front of a file's content
_log = logging.getLogger(__name__)


@runtime_checkable
class Softens(Protocol):
    """A network whose answer depends on the temperature that it will be softened by, such as the mean of several networks."""

    def soften(self, temperature: float) -> None:
        """From now on answer with scores that, divided by `temperature`, are logits of the distribution that is meant."""
        ...


class Teacher:
    """A copy of a network that answers batches: in eval mode, without gradients, the original untouched.

    Where no sample changes from epoch to epoch (a plan of several epochs without augmentation), each sample's answer is kept under a hash
    of the sample as it was prepared, so order and batches may change. Data sets that augment by themselves are noticed after two epochs,
    and nothing is kept any more. Answers are kept in memory, and at the end of an epoch in the folder `task.answers` or that of the
    journal: one file for each teacher, replaced as a whole; a damaged one is passed over.

    Args:
        network: answers; each sample on its own, as networks in eval mode do.
        task: gives the device, the precision and the folder.
        temperature: of the loss, for networks that `soften`.
        train: the plan of the training. None: nothing is kept.
    """

    def __init__(self, network: nn.Module, task: Task, temperature: float = 1.0, train: Train | None = None) -> None:
        self.network = copy.deepcopy(network).to(task.machine.device).eval().requires_grad_(False)
        if isinstance(self.network, Softens):
            self.network.soften(temperature)
        self.task, self.temperature, self.train = task, temperature, train
        self.kept: KeptAnswers | None = None
        self.is_new = True

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        """What the network says to prepared inputs."""
        if self.is_new:  # not before: processes are started by the fit
            self.kept, self.is_new = self._keep(), False
        if self.kept is None:
            return self.ask(inputs)
        keys = sample_keys(inputs)
        answer = self.kept.get(keys)
        if answer is None:
            answer = self.ask(inputs)
            self.kept.add(keys, answer)
        if not self.kept.close_batch():
            self.kept = None
        return answer

    def _keep(self) -> KeptAnswers | None:
        """A place for answers, if the same samples come again."""
        task, train, batches = self.task, self.train, _length(self.task)
        if train is None or not batches or train.epochs < 2 or (train.augment and task.augment is not None):
            return None
        folder = task.answers if task.answers is not None or task.journal is None else task.journal.directory / "answers"
        words = f"{task.machine.precision} {task.machine.device.type} {self.temperature if isinstance(self.network, Softens) else ''}"
        path = None if folder is None else Path(folder) / f"{signature(self.network, words)}.pt"
        return KeptAnswers(batches, task.machine.device, path)

    def ask(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run the network, whatever is kept."""
        with torch.no_grad():
            return run(self.network, inputs)


class KeptAnswers:
    """Answers by the hash of their sample.

    Args:
        batches: of an epoch.
        device: where answers are wanted.
        path: of the file; None keeps them in memory only.
    """

    def __init__(self, batches: int, device: torch.device, path: Path | None = None) -> None:
        self.batches, self.device, self.path = batches, device, path
        self.rows: dict[Key, int] = {}
        self.tables: list[Tensor] = []
        self.spec: pytree.TreeSpec | None = None
        self.usable = True
        self.seen = self.found = self.saved = 0
        if path is not None and path.exists():
            self._load(path)
            self.saved = len(self.rows)

    def get(self, keys: list[Key]) -> Any:
        """The answers to all samples, or None if one isn't there."""
        rows = [self.rows.get(key, -1) for key in keys]
        if self.spec is None or min(rows, default=-1) < 0:
            return None
        self.found += 1
        where = torch.tensor(rows, device=self.device)
        return pytree.tree_unflatten([table.index_select(0, where) for table in self.tables], self.spec)

    def add(self, keys: list[Key], answer: Any) -> None:
        """Keep the answers to a batch: tensors whose first axis is that of the samples; others can't be kept."""
        leaves, spec = pytree.tree_flatten(answer)
        fits = bool(leaves) and all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == len(keys) for leaf in leaves)
        fresh = {key: at for at, key in enumerate(keys) if key not in self.rows}
        size = sum(leaf.nbytes for leaf in leaves) / max(1, len(keys)) * (len(self.rows) + len(fresh)) if fits else 0
        same = not self.tables or (spec == self.spec and [leaf.shape[1:] for leaf in leaves] == [part.shape[1:] for part in self.tables])
        if not fits or not same or size > _LARGEST:
            self.usable = False
            return
        if self.spec is None:
            self.spec, self.path = spec, self.path if _is_plain(spec) else None
        begin, end = len(self.rows), len(self.rows) + len(fresh)
        if not self.tables:
            self.tables = [leaf.new_empty(0, *leaf.shape[1:]) for leaf in leaves]
        if end > len(self.tables[0]):  # twice as much, so that growing costs no more than filling
            grown = [table.new_empty(2 * end, *table.shape[1:]) for table in self.tables]
            for new, old in zip(grown, self.tables, strict=True):
                new[:begin] = old[:begin]
            self.tables = grown
        chosen = torch.tensor(list(fresh.values()), dtype=torch.int64, device=leaves[0].device)
        for table, leaf in zip(self.tables, leaves, strict=True):
            table[begin:end] = leaf.detach()[chosen]
        self.rows |= {key: begin + number for number, key in enumerate(fresh)}

    def close_batch(self) -> bool:
        """Count a batch, save at the end of an epoch, and say whether keeping goes on being worth it."""
        self.seen += 1
        if not self.usable:
            return False
        if self.seen % self.batches == 0:
            if self.path is not None and len(self.rows) > self.saved and rank_and_world()[0] == 0:
                self._save(self.path)
            if self.seen >= 2 * self.batches and 2 * self.found < self.seen - self.batches:  # the samples change by themselves
                return False
        return True

    def _save(self, path: Path) -> None:
        assert self.spec is not None
        content = io.BytesIO()
        keys = torch.tensor(list(self.rows), dtype=torch.int64)
        tables = [table[: len(keys)].cpu().clone() for table in self.tables]
        torch.save({"keys": keys, "tables": tables, "spec": pytree.treespec_dumps(self.spec)}, content)
        packed = content.getvalue()
        write_atomic(path, hashlib.sha256(packed).digest() + packed)
        self.saved = len(self.rows)

    def _load(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            if hashlib.sha256(content[_CHECKSUM:]).digest() != content[:_CHECKSUM]:
                raise ValueError("the checksum differs")
            state = torch.load(io.BytesIO(content[_CHECKSUM:]), map_location="cpu", weights_only=True)
            spec = pytree.treespec_loads(state["spec"])
            rows = {(first, second): row for row, (first, second) in enumerate(state["keys"].tolist())}
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            _log.warning("%s: can't be read as a teacher's answers (%s). They are computed again.", path, error)
            return
        self.rows, self.spec = rows, spec
        self.tables = [table.to(self.device) for table in state["tables"]]


def sample_keys(inputs: tuple[Tensor, ...]) -> list[Key]:
    """A hash of 128 bits of each sample: of the bits of its numbers and their places, its shape and type; the same on all machines.

    Two sums of the 32-bit words times odd-looking constants, modulo 2^64: on a processor an eighth of the time that SHA-256 takes. Against
    mistakes, not against attacks.

    Args:
        inputs: tensors whose first axis is that of the samples.

    >>> first, second, third = sample_keys((torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]),))
    >>> first == second, first == third
    (False, True)
    """
    total = torch.zeros(2, len(inputs[0]), dtype=torch.int64)
    begin = 0
    for part in inputs:
        words = _words(part)
        kind = hashlib.sha256(f"{part.dtype} {tuple(part.shape[1:])}".encode()).digest()
        total += torch.from_numpy(np.frombuffer(kind, dtype="<i8")[:2].astype(np.int64))[:, None]
        for at in range(2):
            factors = _factors(2 * begin + at * words.shape[1], words.shape[1], words.device)
            if words.device.type == "cpu":  # without a copy of 64 bits
                total[at] += torch.from_numpy(np.einsum("ij,j->i", words.numpy(), factors.numpy()))
            else:
                total[at] += (words.to(torch.int64) * factors).sum(1).cpu()
        begin += words.shape[1]
    return list(zip(total[0].tolist(), total[1].tolist(), strict=True))


def signature(network: nn.Module, words: str = "") -> str:
    """A hash of a network: its weights, its structure with all settings that it shows, and the source of its classes.

    Args:
        network: any.
        words: of anything else that matters.
    """
    found = hashlib.sha256(f"{digest(network)} {network!r} {words} {getattr(network, '_sources', '')}".encode())
    for kind in sorted({type(module) for module in network.modules()}, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"):
        if not kind.__module__.startswith("torch."):
            with contextlib.suppress(OSError, TypeError):  # of a class from a prompt there is no source
                found.update(inspect.getsource(kind).encode())
    return found.hexdigest()[:32]


def _words(part: Tensor) -> Tensor:
    """The bits of each sample: shape (samples, words) of int32, or of bytes where they don't fill such words."""
    rows = part.detach().reshape(len(part), -1).contiguous()
    if rows.dtype == torch.bool:
        return rows.view(torch.uint8)
    return rows.view(torch.int32 if rows.shape[1] * rows.element_size() % 4 == 0 and rows.element_size() >= 4 else torch.uint8)


@functools.lru_cache(maxsize=16)
def _factors(begin: int, count: int, device: torch.device) -> Tensor:
    """Numbers of 64 bits that look random: `begin`, `begin` + 1, … stirred (the finaliser of SplitMix64)."""
    x = torch.arange(begin + 1, begin + count + 1, dtype=torch.int64) * -7046029254386353131
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return (x ^ ((x >> 31) & (2**33 - 1))).to(device)


def _length(task: Task) -> int:
    """Batches of an epoch in this process; 0 where the split doesn't say."""
    try:
        return len(task.train) // rank_and_world()[1]  # type: ignore[arg-type]
    except TypeError:
        return 0


def _is_plain(spec: pytree.TreeSpec) -> bool:
    """Whether a structure can be written down: tensors, tuples, lists, dicts; torch raises one of these for a class that it can't name."""
    try:
        return pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    except (NotImplementedError, TypeError, ValueError, KeyError):
        return False
