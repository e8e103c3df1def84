"""Dense convolutions rewritten as separable ones: exactness, least squares, order, and what pays."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pared.architecture import LowRank, Separable, separable, separable_convolution
from pared.architecture.separable import fit_outputs
from pared.core.errors import SettingsError, WeightsError
from pared.graph.counts import count
from pared.training import Task, Train


def task_of(*shape: int, **settings: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, *shape, generator=generator), torch.randint(0, 3, (16,), generator=generator)) for _ in range(2)]
    return Task(batches, batches, batches, **settings)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), nn.ReLU()
    return nn.Sequential(*body, nn.Conv2d(24, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3)).eval()


SETTINGS: list[dict[str, Any]] = [
    {}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"bias": False}, {"padding_mode": "circular"},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_as_many_kernels_as_places_are_exact(settings: dict[str, Any]) -> None:
    layer, x = nn.Conv2d(3, 12, 3, **settings), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(separable_convolution(layer, 9)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_lectures_example_has_26_weights() -> None:
    chain = separable_convolution(nn.Conv2d(2, 4, 3, bias=False))
    assert [part.weight.numel() for part in chain] == [18, 8]  # type: ignore[union-attr, operator]


def test_outputs_are_fitted_as_numpy_fits_them() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    chain = separable_convolution(layer)
    x = torch.randn(8, 4, 7, 7)
    seen = chain[0](x).detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, 4)
    wanted = layer(x).detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, 6)
    before = float((chain(x) - layer(x)).detach().square().mean())
    best = np.linalg.lstsq(np.c_[seen, np.ones(len(seen))], wanted, rcond=None)[0]
    fit_outputs(chain, [(x[:5], layer(x[:5]).detach()), (x[5:], layer(x[5:]).detach())])
    np.testing.assert_allclose(chain[1].weight.detach().numpy()[:, :, 0, 0], best[:-1].T, rtol=1e-2, atol=1e-3)  # type: ignore[union-attr, operator]
    assert float((chain(x) - layer(x)).detach().square().mean()) < before


def test_layers_mend_what_those_before_lost() -> None:
    model, task = net(), task_of(3, 8, 8)
    small = Separable(measured=False)(model, task)
    plain = copy.deepcopy(model)
    for path in ("0", "3"):
        setattr(plain, path, separable_convolution(plain.get_submodule(path)))  # type: ignore[arg-type]
    x = torch.cat([inputs for inputs, _ in task.train])
    lost = [float((each(x) - model(x)).detach().square().mean()) for each in (small, plain)]
    assert lost[0] < 0.5 * lost[1]
    assert count(small, x[:2]).macs < 0.4 * count(model, x[:2]).macs
    assert isinstance(small[5], nn.Conv2d)  # a kernel of 1 has nothing to separate


def test_only_what_is_measured_to_pay_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    times = {(16, 3): (1.0, 0.96), (24, 16): (1.0, 0.5)}
    monkeypatch.setattr(separable, "_times", lambda layer, chain, given: times[tuple(layer.weight.shape[:2])])
    small = Separable()(net(), task_of(3, 8, 8, report=events.append))
    assert isinstance(small[0], nn.Conv2d)
    assert isinstance(small[3], nn.Sequential)
    assert [(event["layer"], event["was_ms"], event["ms"]) for event in events] == [("0", None, None), ("3", 1.0, 0.5)]


def test_times_are_those_of_files() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    found = separable._times(layer, separable_convolution(layer), torch.randn(1, 8, 6, 6))
    assert min(found) > 0


def test_it_is_tuned_and_the_original_stays() -> None:
    model, task = net(), task_of(3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    small = Separable(measured=False, leave=("0",), tune="1ep")(model, task)  # type: ignore[arg-type]
    assert isinstance(small[0], nn.Conv2d)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert Separable(tune="1ep").tune == Train(epochs=1)  # type: ignore[arg-type]


def test_mistakes_are_named() -> None:
    with pytest.raises(SettingsError) as caught:
        Separable(multiplier=0, measured=1, samples=0, leave="a")  # type: ignore[arg-type]
    assert len(caught.value.problems) == 4
    with pytest.raises(SettingsError, match="leave must be the path of a module"):
        Separable(leave=("nowhere",))(net(), task_of(3, 8, 8))
    model = net()
    model[3].weight.data[0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(WeightsError, match=r"3\.weight contains NaN"):
        Separable(measured=False)(model, task_of(3, 8, 8))


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(input=self.conv(input=x).mean((2, 3)))


def test_layers_that_are_called_by_name() -> None:
    model, task = ByName().eval(), task_of(3, 8, 8)
    x = torch.zeros(1, 3, 8, 8)
    for method in (Separable(measured=False), LowRank(keep=0.5, activations=True)):
        small = method(model, task)
        assert isinstance(small.conv, nn.Sequential)
        assert small(x).shape == (1, 3)
