"""Everything a user can cause, as one tree of exceptions.

    ParedError
    ├── SettingsError     a method, recipe or command was given a value it can't take (several are shown together)
    ├── ModelError        a model can't be found, built or run
    │   ├── CaptureError  torch.export can't follow the model's forward
    │   └── WeightsError  weights don't fit the model, or aren't finite
    ├── DataError         a data set is missing, damaged, empty or has labels out of range
    ├── TrainingError     training broke down (loss not finite)
    ├── FileError         a .pared, .onnx or .safetensors file is damaged, cut off, forged or of another version
    └── RunError          a run directory or file can't be used (other run, full disk, nothing to resume)

The command line prints the message of a `ParedError` and exits with status 2; any other exception is a bug in pared.
"""

from __future__ import annotations

from collections.abc import Sequence


class ParedError(Exception):
    """Base of all errors that a user can cause and can mend."""


class SettingsError(ParedError):
    """One or more settings are wrong; `problems` holds one sentence each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ModelError(ParedError):
    """A model can't be found, built or run."""


class CaptureError(ModelError):
    """`torch.export` can't follow the model's forward; the message names the module and the source line."""


class WeightsError(ModelError):
    """Weights don't fit the model they are loaded into, or contain NaN or infinity."""


class DataError(ParedError):
    """A data set is missing, damaged, empty, or has labels out of range."""


class TrainingError(ParedError):
    """Training broke down, for example because the loss is not finite."""


class FileError(ParedError):
    """A .pared, .onnx or .safetensors file is damaged, cut off, forged or of a version that this pared doesn't know."""


class RunError(ParedError):
    """A run directory or an output file can't be used."""
