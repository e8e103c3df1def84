"""Low-rank layers: one wide product becomes two narrow ones, by singular value decomposition."""

from __future__ import annotations

import copy
import decimal
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pared.core.errors import ModelError, WeightsError
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.training import Task, Train, evaluating

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS: tuple[type[Convolution], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BLOCK = 8  # engines compute the channels of a convolution in blocks of 8: a rank of 5 takes as long as one of 8
_MANY = 32  # output channels from which a few channels more or less don't matter


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The smallest rank whose squared singular values sum up to the share `energy` of all of them; at least 1.

    Args:
        singular_values: shape (n,), in descending order.
        energy: in [0, 1].

    >>> rank_for_energy(torch.tensor([3.0, 1.0, 0.0]), 0.9), rank_for_energy(torch.tensor([3.0, 1.0, 0.0]), 1.0)
    (1, 2)
    """
    sums = singular_values.double().square().cumsum(0)
    return min(int((sums < energy * sums[-1]).sum()) + 1, len(singular_values))


def svd_linear(layer: nn.Linear, rank: int) -> nn.Sequential:
    """Two linear layers, inputs → rank → outputs, whose product is the best approximation of the layer's weight.

    The error in Frobenius norm is the root of the sum of the squared singular values left out (Eckart & Young 1936).
    Each factor gets the roots of the singular values, so that both train at the same pace; only the second has the bias.

    Args:
        layer: weight of shape (outputs, inputs).
        rank: from 1 to min(outputs, inputs); at the upper end the two layers compute exactly what the one did.

    >>> svd_linear(nn.Linear(6, 4), 2)
    Sequential(
      (0): Linear(in_features=6, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=4, bias=True)
    )
    """
    outward, inward = _factors(layer.weight, rank)
    device, dtype = layer.weight.device, layer.weight.dtype
    first = nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False, device=device, dtype=dtype)
    second = nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=layer.bias is not None, device=device, dtype=dtype)
    return _fill(first, inward, second, outward, layer)


def svd_convolution(layer: Convolution, rank: int) -> nn.Sequential:
    """A convolution to `rank` channels only, and a 1×1 convolution from there to the outputs (Denton et al. 2014, 1404.0736).

    Stride, padding and dilation stay with the first, which sees the image; only the second has the bias. The weight is decomposed as a
    matrix of shape (outputs, inputs · kernel), so the error is that of `svd_linear`.

    Args:
        layer: a convolution without groups.
        rank: from 1 to min(outputs, inputs · kernel).

    >>> svd_convolution(nn.Conv2d(16, 32, 3, stride=2, padding=1), 8)
    Sequential(
      (0): Conv2d(16, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
      (1): Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    outward, inward = _factors(layer.weight.flatten(1), rank)
    kind = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "padding_mode": layer.padding_mode}
    first = nn.utils.skip_init(kind, layer.in_channels, rank, layer.kernel_size, bias=False, **shape, **place)
    second = nn.utils.skip_init(kind, rank, layer.out_channels, 1, bias=layer.bias is not None, **place)
    return _fill(first, inward, second, outward, layer)


@dataclass(frozen=True)
class LowRank:
    """Replace linear layers and convolutions by two cheaper ones of low rank (lecture: W ≈ U · V).

    A layer is replaced only where that lowers its parameters and its MACs: rank · (outputs + inputs · kernel) must be less
    than outputs · inputs · kernel. Convolutions with many channels get a rank that is a multiple of 8, because engines compute
    channels in blocks of 8. Grouped and transposed convolutions, layers that share their weight with another module, and layers inside
    torch's own composite modules (attention, transformer layers) stay. Masks are baked first.

    Args:
        energy: share of the squared singular values that stays in each layer. Exactly one of `energy`, `rank` and `keep` is given;
            with none of them, energy = 0.9, the lower end of what the literature calls lossless after fine-tuning.
        rank: the rank of every replaced layer.
        keep: share of each layer's weights that stays.
        layers: "both", "linear" or "convolution".
        leave: paths of modules that stay as they are, with all that is inside them.
        only_if_pays: False replaces every layer, also where two cost more than one.
        tune: training afterwards, such as "2ep".

    Raises:
        SettingsError: for a wrong setting, or a path in `leave` that the model doesn't have.
        WeightsError: if a weight is NaN or infinite.
        ModelError: if the model reads the weight of a replaced layer itself.

    >>> task = Task(*[[(torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))]] * 3)
    >>> small = LowRank(rank=4)(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)), task)
    >>> [tuple(weight.shape) for name, weight in small.named_parameters() if name.endswith("weight")]
    [(4, 64), (32, 4), (2, 32)]
    """

    energy: float | None = None
    rank: int | None = None
    keep: float | None = None
    layers: Literal["both", "linear", "convolution"] = "both"
    leave: tuple[str, ...] = ()
    only_if_pays: bool = True
    tune: Train | None = None

    def __post_init__(self) -> None:
        problems = Problems("architecture.low_rank")
        given = {name: value for name in ("energy", "rank", "keep") if (value := getattr(self, name)) is not None}
        if not given:
            object.__setattr__(self, "energy", 0.9)
        problems.check(len(given) <= 1, "settings", "one of energy, rank and keep, not several", given)
        for name in ("energy", "keep"):
            if name in given:
                problems.number(name, given[name], low=0, high=1)
        if "rank" in given:
            problems.number("rank", given["rank"], low=1, integer=True)
        problems.check(self.layers in ("both", "linear", "convolution"), "layers", "both, linear or convolution", self.layers)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.check(isinstance(self.only_if_pays, bool), "only_if_pays", "true or false", self.only_if_pays)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with low-rank layers in place of those that it pays for."""
        model = bake(copy.deepcopy(model))
        replaced = self._replace(model)
        if replaced:
            _check_runs(model, task, replaced)
        if self.tune is not None:
            task.tune(model, self.tune)
        return model

    def _replace(self, model: nn.Module) -> list[str]:
        paths = dict(model.named_modules(remove_duplicate=False))
        problems = Problems("architecture.low_rank")
        for path in self.leave:
            problems.check(path in paths and path != "", "leave", "the path of a module of the model", path)
        problems.raise_if_any()
        kinds: list[type[nn.Module]] = [nn.Linear] if self.layers != "convolution" else []
        kinds += _CONVOLUTIONS if self.layers != "linear" else ()
        left = {id(inner) for path in self.leave for inner in paths[path].modules()}
        made: dict[int, nn.Sequential | None] = {}
        replaced = []
        for path, layer in paths.items():
            parent = paths[path.rpartition(".")[0]]
            # a subclass may have a forward of its own, and a composite module of torch reads the weights of its layers itself
            if path == "" or type(layer) not in kinds or id(layer) in left or _is_composite(parent) or _is_shared(model, layer):
                continue
            if id(layer) not in made:
                made[id(layer)] = self._factorised(path, layer)
            if (pair := made[id(layer)]) is not None:
                setattr(parent, path.rpartition(".")[2], pair)
                replaced.append(path)
        return replaced

    def _factorised(self, path: str, layer: nn.Module) -> nn.Sequential | None:
        assert isinstance(layer, nn.Linear | Convolution)
        if not bool(torch.isfinite(layer.weight).all()):
            raise WeightsError(f"{path}.weight contains NaN or infinity, so it can't be decomposed. Train or load the model again.")
        if isinstance(layer, Convolution) and layer.groups != 1:
            return None
        rank = self._rank(layer)
        outputs, inputs = layer.weight.flatten(1).shape
        if self.only_if_pays and rank * (outputs + inputs) >= outputs * inputs:
            return None
        return svd_linear(layer, rank) if isinstance(layer, nn.Linear) else svd_convolution(layer, rank)

    def _rank(self, layer: nn.Linear | Convolution) -> int:
        outputs, inputs = layer.weight.flatten(1).shape
        highest = min(outputs, inputs)
        in_blocks = isinstance(layer, Convolution) and outputs >= _MANY
        if self.rank is not None:
            return min(self.rank, highest)
        if self.keep is not None:
            rank = max(1, int(decimal.Decimal(repr(float(self.keep))) * outputs * inputs / (outputs + inputs)))
            return max(_BLOCK, rank // _BLOCK * _BLOCK) if in_blocks and rank >= _BLOCK else min(rank, highest)
        assert self.energy is not None
        rank = rank_for_energy(torch.linalg.svdvals(layer.weight.detach().double().flatten(1)), self.energy)
        return min(-(-rank // _BLOCK) * _BLOCK, highest) if in_blocks else rank


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of shape (outputs, rank) and (rank, inputs), in double precision so that full rank is exact to the last bits."""
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _fill(first: nn.Module, inward: Tensor, second: nn.Module, outward: Tensor, layer: nn.Linear | Convolution) -> nn.Sequential:
    with torch.no_grad():
        for part, weight in ((first, inward), (second, outward)):
            target = part.get_parameter("weight")
            target.copy_(weight.view(target.shape))
            target.requires_grad_(layer.weight.requires_grad)
        if layer.bias is not None:
            second.get_parameter("bias").copy_(layer.bias)
            second.get_parameter("bias").requires_grad_(layer.bias.requires_grad)
    return nn.Sequential(first, second).train(layer.training)


def _is_composite(module: nn.Module) -> bool:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, containers)


def _is_shared(model: nn.Module, layer: nn.Module) -> bool:
    """Whether another module holds the layer's weight too (tied weights)."""
    weight = layer._parameters.get("weight")
    return weight is None or sum(weight is other for module in model.modules() for other in module._parameters.values()) > 1


def _check_runs(model: nn.Module, task: Task, replaced: list[str]) -> None:
    try:
        with torch.random.fork_rng(devices=[]), evaluating(model):
            model.to(task.machine.device)(*task.example_inputs())
    except Exception as error:
        raise ModelError(
            f"architecture.low_rank: {type(model).__name__} doesn't run with low-rank layers ({error}). It reads the weight of a layer "
            f"itself; name that layer in leave. Replaced were: {', '.join(replaced)}."
        ) from error
