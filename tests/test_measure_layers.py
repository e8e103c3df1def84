"""Time by layer, from the engine's own profile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pared.dynamic import EarlyExit
from pared.measure import layer_times


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.big, self.small = nn.Conv2d(8, 64, 5, padding=2), nn.Conv2d(64, 4, 1)
        self.block = nn.Sequential(nn.Flatten(), nn.Linear(4 * 32 * 32, 3), nn.Softmax(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.small(self.big(x).relu()))


@pytest.mark.parametrize("normalize", [None, nn.Hardtanh(0, 1)])
def test_every_layer_that_multiplies_has_its_time_and_no_other_names_occur(normalize: nn.Module | None) -> None:
    times = layer_times(Net(), torch.rand(2, 8, 32, 32), normalize, runs=20)
    assert set(times) <= {"", "big", "small", "block.0", "block.1", "block.2"}
    assert {"big", "small", "block.1"} <= set(times)
    assert all(time >= 0 for time in times.values())


def test_a_network_that_decides_as_it_runs_has_no_time_by_layer() -> None:
    assert layer_times(EarlyExit([nn.Linear(4, 3), nn.Linear(3, 2)], [nn.Linear(3, 2), nn.Identity()]), torch.zeros(1, 4)) == {}
