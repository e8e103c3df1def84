"""Chains of thin layers: what they compute, what they cost, and how their ranks are chosen."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pared.architecture import (
    LowRank,
    cp_convolution,
    low_rank,
    merged,
    spatial_convolution,
    svd_convolution,
    svd_linear,
    tucker_convolution,
)
from pared.architecture.factors import compose, cp, kernels_by_input, spatial, spatial_values, tucker2
from pared.architecture.layer_inputs import moments, sizes
from pared.architecture.thin_choice import Place, for_budget, for_energy, for_share
from pared.core.errors import SettingsError
from pared.graph.counts import count
from pared.training import Task

CONVOLUTIONS: list[dict[str, Any]] = [
    {}, {"padding": 1}, {"stride": 2, "padding": (2, 1)}, {"dilation": 2, "padding": "same"}, {"padding": 1, "padding_mode": "reflect"},
    {"bias": False}, {"stride": (1, 2)},
]  # fmt: skip


def task_of(*shape: int, count: int = 16) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, *shape, generator=generator), torch.zeros(8, dtype=torch.long)) for _ in range(count // 8)]
    return Task(batches, batches, batches)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(48 * 16, 64), nn.ReLU(), nn.Linear(64, 5)).eval()


@pytest.mark.parametrize("settings", CONVOLUTIONS)
@pytest.mark.parametrize("form", ["tucker", "spatial", "channels"])
def test_full_ranks_are_exact(form: str, settings: dict[str, Any]) -> None:
    layer = nn.Conv2d(5, 6, (3, 2) if settings.get("padding") != "same" else 3, **settings)
    place = Place(layer, form)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 9, 8)
    torch.testing.assert_close(place.build(place.highest)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "kernel", "size"), [(nn.Conv1d, 3, (9,)), (nn.Conv3d, (1, 3, 2), (4, 5, 6))])
@pytest.mark.parametrize("form", ["tucker", "channels", "cp"])
def test_other_dimensions(kind: Any, kernel: Any, size: tuple[int, ...], form: str) -> None:
    layer = kind(4, 5, kernel, stride=2, padding=1 if kind is nn.Conv1d else 0)
    place = Place(layer, form)  # type: ignore[arg-type]
    x = torch.randn(2, 4, *size)
    found = place.build(place.highest)(x)
    assert found.shape == layer(x).shape
    if form != "cp":
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


def test_a_sum_of_products_is_the_convolution_that_cp_makes_of_it() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    chain = cp_convolution(layer, 7)
    assert layer.bias is not None
    weight = compose(cp(layer.weight, 7)).float()
    x = torch.randn(2, 4, 8, 8)
    wanted = nn.functional.conv2d(x, weight, layer.bias, 2, 1)
    torch.testing.assert_close(chain(x), wanted, rtol=1e-4, atol=1e-4)


def test_more_components_of_cp_lose_less_and_one_is_found_exactly() -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    losses = [float((compose(cp(weight, rank)) - weight).norm()) for rank in (1, 4, 12, 40)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.3 * losses[0]


def test_tucker_is_never_worse_than_the_singular_vectors_it_begins_with() -> None:
    for seed in range(5):
        weight = torch.randn(8, 7, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

        def lost(sweeps: int, weight: torch.Tensor = weight) -> float:
            found = tucker2(weight, 4, 3, sweeps=sweeps)
            return float((torch.einsum("or,rihw,ij->ojhw", *found) - weight).norm())

        losses = [lost(sweeps) for sweeps in range(5)]
        assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(losses))
        unfoldings = (weight.numpy().reshape(8, -1), weight.numpy().swapaxes(0, 1).reshape(7, -1))
        tails = [np.linalg.svd(each, compute_uv=False)[rank:] for each, rank in zip(unfoldings, (4, 3), strict=True)]
        assert losses[0] ** 2 <= sum(float((tail**2).sum()) for tail in tails) + 1e-9


def test_spatial_loses_what_its_singular_values_say() -> None:
    weight = torch.randn(6, 5, 3, 2)
    values = spatial_values(weight)
    for rank in (1, 4, 9):
        down, along = spatial(weight, rank)
        again = torch.einsum("rihx,orxw->oihw", down, along)
        np.testing.assert_allclose(float((again - weight).norm()), float(values[rank:].square().sum().sqrt()), rtol=1e-6, atol=1e-6)


def test_the_best_separable_kernels() -> None:
    weight = torch.randn(5, 4, 3, 3)
    for kernels in (1, 3):
        depthwise, pointwise = kernels_by_input(weight, kernels)
        again = torch.einsum("ichw,oic->oihw", depthwise.view(4, kernels, 3, 3), pointwise.view(5, 4, kernels))
        for channel in range(4):
            values = np.linalg.svd(weight[:, channel].reshape(5, 9).numpy(), compute_uv=False)
            np.testing.assert_allclose(float((again - weight)[:, channel].norm()), np.sqrt((values[kernels:] ** 2).sum()), rtol=1e-5)


@pytest.mark.parametrize("form", ["channels", "tucker", "spatial", "cp"])
def test_weights_and_macs_are_those_of_the_network(form: str) -> None:
    x = torch.randn(2, 5, 9, 8)
    for settings in CONVOLUTIONS:
        layer = nn.Conv2d(5, 6, 3, **settings)
        out = layer(x)
        place = Place(layer, form, (9, 8), tuple(out.shape[2:]))  # type: ignore[arg-type]
        ranks = tuple(max(1, highest // 2) for highest in place.highest)
        chain = place.build(ranks)
        assert place.weights(ranks) == sum(part.weight.numel() for part in chain)  # type: ignore[misc, union-attr]
        assert place.macs(ranks) == count(chain, x).macs
        assert place.macs() == count(layer, x).macs


def test_two_layers_are_one_again() -> None:
    x = torch.randn(3, 8)
    for bias in (True, False):
        thin = nn.Sequential(nn.Linear(8, 3, bias=bias), nn.Linear(3, 6, bias=not bias))
        torch.testing.assert_close(merged(thin[0], thin[1])(x), thin(x), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    image = torch.randn(2, 4, 7, 7)
    chain = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, stride=2), nn.Conv2d(3, 5, 1))
    torch.testing.assert_close(merged(chain[0], chain[1])(image), chain(image), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    one = svd_convolution(nn.Conv2d(4, 6, 3), 6)
    assert merged(one[0], one[1]).weight.shape == (6, 4, 3, 3)  # type: ignore[arg-type]
    grouped = nn.Conv2d(4, 4, 1, groups=2)
    pairs = (nn.Conv2d(4, 3, 1), nn.Conv2d(3, 5, 3)), (nn.Linear(4, 3), nn.Linear(2, 2)), (nn.Conv2d(4, 4, 3), grouped)
    for first, second in pairs:
        with pytest.raises(ValueError, match="aren't one layer"):
            merged(first, second)


def test_moments_are_those_of_numpy() -> None:
    model, task = net(), task_of(3, 8, 8)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    found = moments(model, task, layers, 16)
    x = torch.cat([inputs for inputs, _ in task.train])
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.stack([padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)], 2)  # batch, channel, place, h, w
    rows = patches.transpose(0, 3, 4, 1, 2).reshape(-1, 27)
    np.testing.assert_allclose(found["0"].numpy(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    last = model[:7](x).double().detach().numpy()
    np.testing.assert_allclose(found["7"].numpy(), last.T @ last / len(last), rtol=1e-5, atol=1e-6)
    assert sizes(model, task, layers)["2"] == ((8, 8), (4, 4))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_what_layers_see_makes_outputs_better(kind: str) -> None:
    torch.manual_seed(0)
    mixing = torch.randn(12, 12) * torch.logspace(0, -3, 12)
    layer: Any = nn.Linear(12, 10) if kind == "linear" else nn.Conv2d(12, 10, 3, padding=1)
    x = torch.randn(400, 12) @ mixing.T if kind == "linear" else torch.einsum("ij,njhw->nihw", mixing, torch.randn(20, 12, 6, 6))
    batches = [(x, torch.zeros(len(x), dtype=torch.long))]
    moment = moments(layer, Task(batches, batches, batches), {"": layer}, len(x))[""]
    build: Any = svd_linear if kind == "linear" else svd_convolution
    plain, seen = ((build(layer, 4, each)(x) - layer(x)).square().mean() for each in (None, moment))
    assert seen < 0.5 * plain
    full = min(layer.weight.flatten(1).shape)
    torch.testing.assert_close(build(layer, full, moment)(x), layer(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["channels", "tucker", "spatial", "cp"])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_budget_of_the_whole_network_is_met(form: str, share: float) -> None:
    model, task = net(), task_of(3, 8, 8)
    small = LowRank(macs=share, form=form)(model, task)  # type: ignore[arg-type]
    before, after = (count(each, task.example_inputs()).macs for each in (model, small))
    assert 0.8 * share * before < after <= share * before
    assert LowRank(macs=1.0)(model, task).state_dict().keys() == model.state_dict().keys()


def test_a_budget_is_spent_where_it_loses_least() -> None:
    torch.manual_seed(0)
    easy, hard = nn.Linear(64, 64), nn.Linear(64, 64)
    easy.weight.data = torch.randn(64, 4) @ torch.randn(4, 64)  # of rank 4: thin for free
    found = for_budget({"easy": Place(easy, "channels"), "hard": Place(hard, "channels")}, 2000)
    assert list(found) == ["easy"]


def test_energy_is_kept() -> None:
    weight = nn.Conv2d(40, 48, 3)
    for form in ("channels", "tucker", "spatial"):
        place = Place(weight, form)  # type: ignore[arg-type]
        lost = _dense(place.build(for_energy(place, 0.8))) - weight.weight.detach()
        assert lost.square().sum() <= 0.2 * weight.weight.detach().square().sum() * (1 + 1e-6)


def _dense(chain: nn.Sequential) -> torch.Tensor:
    """The kernel of a chain without bias and padding, by its answer to impulses."""
    bare = copy.deepcopy(chain)
    for part in bare:
        part.bias = None
    inputs = bare[0].in_channels
    impulses = torch.zeros(inputs, inputs, 5, 5)  # type: ignore[arg-type]
    impulses[range(inputs), range(inputs), 2, 2] = 1  # type: ignore[arg-type]
    return bare(impulses).detach().flip(2, 3).transpose(0, 1)


def test_shares_are_kept_and_never_nothing() -> None:
    place = Place(nn.Conv2d(40, 16, 3), "tucker")
    for share in (0.0, 0.01, 0.3, 0.9):
        ranks = for_share(place, share)
        assert min(ranks) >= 1
        assert place.weights(ranks) <= max(share * place.weights(), place.weights((1, 1)))


def test_a_share_of_the_time_is_searched_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = net(), task_of(3, 8, 8)
    total = count(model, task.example_inputs()).macs

    class Times:  # a machine on which time is multiply-adds
        def __init__(self, model: nn.Module, task: Task) -> None: ...

        def __call__(self, small: nn.Module) -> tuple[float, float]:
            return 1.0, count(small, task.example_inputs()).macs / total

    monkeypatch.setattr(low_rank, "Interleaved", Times)
    small = LowRank(latency=0.5)(model, task)
    assert 0.4 <= count(small, task.example_inputs()).macs / total <= 0.5


def test_no_speed_no_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Slow:
        def __init__(self, model: nn.Module, task: Task) -> None: ...

        def __call__(self, small: nn.Module) -> tuple[float, float]:
            return 1.0, 1.0

    monkeypatch.setattr(low_rank, "Interleaved", Slow)
    LowRank(latency=0.5)(net(), task_of(3, 8, 8))
    assert "was to take 0.5 of its time, it takes 1" in caplog.text


def test_settings_of_forms() -> None:
    with pytest.raises(SettingsError, match="form must be another than 'cp'"):
        LowRank(form="cp")
    with pytest.raises(SettingsError) as caught:
        LowRank(macs=0.0, form="tt", activations=1, samples=0)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 4
    with pytest.raises(SettingsError, match="only_if_pays must be true where latency is given"):
        LowRank(latency=0.5, only_if_pays=False)


def test_thin_layers_are_written_and_run(tmp_path: Any) -> None:
    from pared.runtime import Engine, export

    model, task = net(), task_of(3, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    for form in ("tucker", "spatial", "cp"):
        small = LowRank(keep=0.5, form=form)(model, task).eval()  # type: ignore[arg-type]
        engine = Engine(export(small, x, tmp_path / f"{form}.onnx"))
        np.testing.assert_allclose(engine.run(x.numpy())[0], small(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_gradients_of_frozen_layers_stay_off() -> None:
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.requires_grad_(False)
    for chain in (tucker_convolution(layer, 2, 2), spatial_convolution(layer, 2), cp_convolution(layer, 2)):
        assert [name for name, parameter in chain.named_parameters() if parameter.requires_grad] == [f"{len(chain) - 1}.bias"]
