"""Low-rank layers: one wide product becomes two or more narrow ones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pared.architecture import layer_inputs
from pared.architecture.replacing import replace, replaceable
from pared.architecture.thin_choice import FORMS, Form, Place, Ranks, for_budget, for_energy, for_rank, for_share
from pared.architecture.thin_layers import CONVOLUTIONS, Convolution
from pared.core.bisection import bisect
from pared.core.errors import WeightsError
from pared.core.problems import Problems
from pared.core.rules import bake
from pared.graph.counts import count
from pared.measure.deployed import Interleaved
from pared.training import Task, Train

_WHERE = "architecture.low_rank"
_GOALS = ("energy", "rank", "keep", "macs", "latency")
_THINNEST, _NEAR = 1 / 64, 0.05  # of the multiply-adds; of a latency: two measurements of one file differ by 2 %

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LowRank:
    """Replace linear layers and convolutions by chains of cheaper ones of low rank (lecture: W ≈ U · V).

    A layer is replaced only where that lowers its parameters and its MACs. Convolutions with many channels get ranks that are multiples of
    8, because engines compute channels in blocks of 8. Grouped and transposed convolutions, layers that share their weight with another
    module, and layers inside torch's own composite modules (attention, transformer layers) stay. Masks are baked first.

    Args:
        energy: share of the squared singular values that stays in each layer. Exactly one of `energy`, `rank`, `keep`, `macs` and `latency`
            is given; with none of them, energy = 0.9, the lower end of what the literature calls lossless after fine-tuning.
        rank: the rank of every replaced layer.
        keep: share of each layer's weights that stays.
        macs: share of the whole network's multiply-adds that is to be left. The layers share it so that the least is lost: again and again
            the step is taken that loses the least energy for each multiply-add saved.
        latency: share of the time that the deployed file takes in ONNX Runtime, one sample on one thread; the largest budget of
            multiply-adds that meets it is searched, each one measured in turn with the original.
        form: what a convolution becomes. "channels": k×k to fewer channels, then 1×1 (Denton et al. 2014, 1404.0736). "tucker": 1×1,
            k×k, 1×1 (Kim et al. 2016, 1511.06530). "spatial": k×1, then 1×k (Jaderberg et al. 2014, 1405.3866); two axes only. "cp":
            1×1, depthwise k×1 and 1×k, 1×1 (Lebedev et al. 2015, 1412.6553): the cheapest, and the hardest to tune; it has no energy.
        activations: make the error of the outputs least, not that of the weights, by what the layers see in training samples. For linear
            layers and the form "channels"; layers with more than 4096 weights for an output go by their weights.
        samples: how many are looked at for that.
        layers: "both", "linear" or "convolution".
        leave: paths of modules that stay as they are, with all that is inside them.
        only_if_pays: False replaces every layer, also where the chain costs more than the one; not with macs or latency.
        tune: training afterwards, such as "2ep"; `Train(teach=0.9)` lets the original teach.

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
    macs: float | None = None
    latency: float | None = None
    form: Form = "channels"
    activations: bool = False
    samples: int = 256
    layers: Literal["both", "linear", "convolution"] = "both"
    leave: tuple[str, ...] = ()
    only_if_pays: bool = True
    tune: Train | None = None

    def __post_init__(self) -> None:
        problems = Problems(_WHERE)
        given = {name: value for name in _GOALS if (value := getattr(self, name)) is not None}
        if not given:
            given = {"energy": 0.9}
            object.__setattr__(self, "energy", 0.9)
        problems.check(len(given) <= 1, "settings", f"one of {', '.join(_GOALS[:-1])} and {_GOALS[-1]}, not several", given)
        for name in ("energy", "keep"):
            if name in given:
                problems.number(name, given[name], low=0, high=1)
        for name in ("macs", "latency"):
            if name in given:
                problems.number(name, given[name], above=0, high=1)
                problems.check(self.only_if_pays is True, "only_if_pays", f"true where {name} is given", self.only_if_pays)
        if "rank" in given:
            problems.number("rank", given["rank"], low=1, integer=True)
        problems.check(self.form in FORMS, "form", "channels, tucker, spatial or cp", self.form)
        has_energy = self.form != "cp" or "energy" not in given
        problems.check(has_energy, "form", "another than 'cp' where none of rank, keep, macs and latency is given", self.form)
        problems.check(isinstance(self.activations, bool), "activations", "true or false", self.activations)
        problems.number("samples", self.samples, low=1, integer=True)
        problems.check(self.layers in ("both", "linear", "convolution"), "layers", "both, linear or convolution", self.layers)
        problems.check(not isinstance(self.leave, str), "leave", "a list of module paths", self.leave)
        problems.check(isinstance(self.only_if_pays, bool), "only_if_pays", "true or false", self.only_if_pays)
        problems.raise_if_any()
        object.__setattr__(self, "tune", None if self.tune is None else Train.parse(self.tune))
        object.__setattr__(self, "leave", tuple(self.leave))

    def __call__(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a copy of `model` with low-rank layers in place of those that it pays for."""
        model = bake(copy.deepcopy(model)).to(task.machine.device)
        places = self._places(model, task)
        if self.latency is not None:
            model = self._fast_enough(model, places, task)
        else:
            chains = {path: places[path].build(ranks) for path, ranks in self._ranks(places, model, task).items()}
            model = replace(model, chains, task, _WHERE)
        if self.tune is not None:
            task.tune(model, self.tune)
        return model

    def _places(self, model: nn.Module, task: Task) -> dict[str, Place]:
        """All layers that may be replaced, by path; one that is there several times comes once."""
        kinds: list[type[nn.Module]] = [nn.Linear] if self.layers != "convolution" else []
        kinds += CONVOLUTIONS if self.layers != "linear" else ()
        found = replaceable(model, kinds, self.leave, _WHERE)
        layers = {path: layer for path, layer in found.items() if getattr(layer, "groups", 1) == 1}
        moments = layer_inputs.moments(model, task, layers, self.samples) if self.activations else {}
        sizes = layer_inputs.sizes(model, task, layers) if layers else {}
        places = {}
        for path, layer in layers.items():
            assert isinstance(layer, nn.Linear | Convolution)
            if not bool(torch.isfinite(layer.weight).all()):
                raise WeightsError(f"{path}.weight contains NaN or infinity, so it can't be decomposed. Train or load the model again.")
            form: Form = "channels" if isinstance(layer, nn.Linear) else self.form
            if form == "spatial" and not isinstance(layer, nn.Conv2d):
                continue
            inputs, outputs = sizes.get(path, ((1,) * (layer.weight.dim() - 2),) * 2)
            places[path] = Place(layer, form, inputs, outputs, moments.get(path) if form == "channels" else None)
        return places

    def _ranks(self, places: Mapping[str, Place], model: nn.Module, task: Task) -> dict[str, Ranks]:
        if self.macs is not None:
            return for_budget(places, (1 - self.macs) * count(model, task.example_inputs()).macs)
        found = {}
        for path, place in places.items():
            if self.rank is not None:
                ranks = for_rank(place, self.rank)
            elif self.keep is not None:
                ranks = for_share(place, self.keep)
            else:
                assert self.energy is not None
                ranks = for_energy(place, self.energy)
            if not self.only_if_pays or place.pays(ranks):
                found[path] = ranks
        return found

    def _fast_enough(self, model: nn.Module, places: Mapping[str, Place], task: Task) -> nn.Module:
        """The network with the most multiply-adds whose file takes at most the share wanted of the original's time."""
        assert self.latency is not None
        times, total = Interleaved(model, task), count(model, task.example_inputs()).macs
        tried: dict[tuple[tuple[str, Ranks], ...], tuple[float, nn.Module]] = {}
        last: list[nn.Module] = [model]

        def cost(share: float) -> float:
            ranks = for_budget(places, (1 - max(share, _THINNEST)) * total)
            key = tuple(sorted(ranks.items()))
            if key not in tried:
                small = replace(copy.deepcopy(model), {path: places[path].build(each) for path, each in ranks.items()}, task, _WHERE)
                original, own = times(small)
                tried[key] = own / original if ranks else 1.0, small
            last[0] = tried[key][1]
            return tried[key][0]

        reached = cost(bisect(cost, self.latency, first=self.latency, near=_NEAR))
        if reached > self.latency:
            _log.warning(
                "architecture.low_rank: the file was to take %.3g of its time, it takes %.3g. Thinner layers don't help more.",
                self.latency,
                reached,
            )
        return last[0]
