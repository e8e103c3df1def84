"""Where training runs, in the words of Lightning Fabric."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from pared.core.errors import SettingsError
from pared.core.problems import Problems

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]


@dataclass(frozen=True)
class Machine:
    """The processors that training and evaluation use; the words are those of Lightning Fabric.

    Args:
        accelerator: "cpu", "cuda", "mps" …; "auto" takes a GPU where there is one.
        devices: how many, or "auto" for all of them. More than one: every process sees its share of the batches.
        precision: weights stay in 32 bits in all of them; the mixed ones compute in 16.
        strategy: "auto", "ddp" or "ddp_find_unused_parameters_true" (strategies that split the weights are not supported).

    Raises:
        SettingsError: for a value that Fabric or this machine doesn't have.

    >>> Machine(accelerator="cpu").device
    device(type='cpu')
    """

    accelerator: str = "auto"
    devices: int | str = 1
    precision: Precision = "32-true"
    strategy: str = "auto"

    def __post_init__(self) -> None:
        problems = Problems("machine")
        problems.check(isinstance(self.accelerator, str), "accelerator", "a name such as cpu, cuda or auto", self.accelerator)
        whole = isinstance(self.devices, int) and not isinstance(self.devices, bool) and self.devices >= 1
        problems.check(whole or self.devices == "auto", "devices", "a whole number of at least 1, or auto", self.devices)
        precisions = ("32-true", "16-mixed", "bf16-mixed")
        problems.check(self.precision in precisions, "precision", f"one of {', '.join(precisions)}", self.precision)
        allowed = isinstance(self.strategy, str) and (self.strategy == "auto" or self.strategy.startswith("ddp"))
        problems.check(allowed, "strategy", "auto or one of the ddp strategies", self.strategy)
        problems.raise_if_any()

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return _device(self, os.environ.get("LOCAL_RANK"))

    def fabric(self) -> Fabric:
        """A new Fabric that is not launched yet.

        Raises:
            SettingsError: if Fabric refuses the settings, for example a GPU that isn't there.
        """
        from lightning_fabric import Fabric  # here, because its import takes seconds

        try:
            return Fabric(accelerator=self.accelerator, devices=self.devices, strategy=self.strategy, precision=self.precision)
        except (ValueError, RuntimeError, TypeError) as error:
            raise SettingsError(f"machine: {error}") from error


@functools.lru_cache(maxsize=32)
def _device(machine: Machine, local_rank: str | None) -> torch.device:
    del local_rank  # only part of the cache's key: Fabric reads it from the environment
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if machine.accelerator == "cpu" or (machine.accelerator == "auto" and not has_gpu):
        return torch.device("cpu")
    return machine.fabric().device
