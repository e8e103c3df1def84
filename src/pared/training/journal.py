"""Checkpoints of the trainings within one step of a recipe, from which a killed step resumes exactly."""

from __future__ import annotations

import dataclasses
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pared.core.errors import RunError
from pared.core.files import write_atomic

if TYPE_CHECKING:
    from pared.training.plan import Train


class Journal:
    """Where the trainings of one step keep their checkpoints: `directory/fit-1`, `fit-2`, … in the order of the calls.

    A step that is run again, with a new Journal on the same directory, asks for its trainings in the same order and so finds each
    one's last checkpoint.

    >>> Journal("step-1").fit().path.as_posix()
    'step-1/fit-1/checkpoint.pt'
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.fits = 0

    def fit(self) -> FitRecord:
        """The record of the next training."""
        self.fits += 1
        return FitRecord(self.directory / f"fit-{self.fits}" / "checkpoint.pt")


@dataclass(frozen=True)
class FitRecord:
    """The one checkpoint of a training; a newer one replaces it as a whole."""

    path: Path

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The last state that was saved, on the CPU, or None if there is none.

        Raises:
            RunError: if the checkpoint is damaged or belongs to a training with another `identity`.
        """
        for leftover in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            saved = state["identity"]
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise RunError(f"{self.path}: can't be read as a checkpoint. Delete it to train again from the start.") from error
        if saved != identity:
            different = [key for key in identity if saved.get(key) != identity[key]]
            raise RunError(
                f"{self.path}: is the checkpoint of another run ({', '.join(different) or 'settings'} differ). "
                "Choose another output directory, or delete this one."
            )
        return state

    def save(self, identity: dict[str, Any], state: dict[str, Any]) -> None:
        """Replace the checkpoint; a kill at any moment leaves the old or the new one.

        Raises:
            RunError: if the disk is full or the place can't be written.
        """
        content = io.BytesIO()  # torch's own writer hides why a file can't be written
        torch.save({**state, "identity": identity}, content)
        write_atomic(self.path, content.getbuffer())


def identify(model: nn.Module, train: Train, batches: int | None = None) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: the plan, the tensors' names and shapes, the batches of an epoch."""
    tensors = [f"{name} {tuple(tensor.shape)}" for name, tensor in weights(model).items()]
    plan = {f"train.{key}": value for key, value in dataclasses.asdict(train).items()}
    return {**plan, "model": tensors, "batches of an epoch": batches}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those included that `state_dict` leaves out (non-persistent buffers)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in weights(model).items()}


def restore_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Write a copy back, in place: optimizers and tied modules keep their tensors."""
    with torch.no_grad():
        for name, tensor in weights(model).items():
            tensor.copy_(saved[name])
