"""The experiment's verdict on rows that are written down, and the parts that need no trained network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pared.core.errors import SettingsError
from pared.lab.int8_against_peers.peers import installed
from pared.lab.int8_against_peers.run import EXPERIMENT, Int8AgainstPeers
from pared.lab.int8_against_peers.small import layer_errors
from pared.training import Task


def small(net: str, seed: int, int8: float, layers: list[dict[str, Any]]) -> dict[str, Any]:
    test = {"float": 10.0, "int8": int8, "lsq 4": 10.1, "lsq 2": 11.0, "pact 2": 11.2, "dorefa 2": 12.0}
    names = test if layers else ("float", "int8")
    row = {"key": f"{net} seed {seed}", "net": net, "seed": seed, "same": 0.9995, "layers": layers}
    row |= {"test": {name: test[name] for name in names}, "bytes": dict.fromkeys(names, 1000), "ms": {"float": 1.0, "int8": 0.6}}
    return row | ({"same few": 0.998} if layers else {})


def rows(nearest: float = 0.3, agreement: float = 0.96, int8_ms: float = 1.0) -> list[dict[str, Any]]:
    layer = {"layer": "fc", "bits": 4, "nearest": nearest, "adaround": 0.2, "gptq": 0.1}
    arms = {
        name: {"agreement": share, "bytes": 5, "valid": share}
        for name, share in (("pared, int8", 0.9), ("pared, rounding and int8", agreement), ("nncf", 0.95))
    }
    arms["torchao"] = {"agreement": 1.0, "layers": 0}  # left everything in float, so it isn't compared
    return [
        {"key": "convolutions", "net": "convolutions", "seed": 0, "ms": {"64": {"float": 2.0, "int8": int8_ms}}},
        small("lenet5", 0, 10.05, [layer]),
        *(small("resnet20", seed, error, []) for seed, error in ((0, 10.3), (1, 9.8))),
        {"key": "efficientnet-lite0", "net": "efficientnet-lite0", "seed": 0, "arms": arms | {"original": {"bytes": 20, "ms": 3.0}}},
    ]


def test_all_parts_hold() -> None:
    verdict = EXPERIMENT.verdict(rows())
    assert verdict.outcome == "reproduced"
    assert "resnet20 loses at most 0.1 points with int8 (+0.05 points of test error): yes." in verdict.text
    assert "for at least 99.80 % of test pictures" in verdict.text
    assert len({len(line) for line in verdict.figures}) == 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"nearest": 0.2}, "(1 are not): no."),
        (
            {"agreement": 0.94},
            "of its answers (pared, rounding and int8: 94.0 %): no. no other tool's network keeps more (nncf: 95.0 %): no.",
        ),
        ({"int8_ms": 1.5}, "(1.33 times): no."),
    ],
)
def test_what_fails_is_named(change: dict[str, float], part: str) -> None:
    verdict = EXPERIMENT.verdict(rows(**change))
    assert verdict.outcome == "partly reproduced"
    assert part in verdict.text


def test_of_two_ways_validation_chooses() -> None:
    better = rows(agreement=0.97)
    arms = better[-1]["arms"]
    arms["pared, int8"]["valid"] = 0.99  # so its agreement on other crops counts, though it is the lower
    text = EXPERIMENT.verdict(better).text
    assert "(pared, int8: 90.0 %): no." in text


def test_learned_rounding_is_below_nearest_in_every_layer() -> None:
    torch.manual_seed(0)
    mix = torch.randn(12, 12)
    x = torch.relu(torch.randn(64, 12) @ mix)
    batches = [(x, torch.zeros(64, dtype=torch.long))]
    network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    found = layer_errors(network, Task(batches, batches, batches), 64)
    assert [(each["layer"], each["bits"]) for each in found] == [("0", 4), ("0", 3), ("2", 4), ("2", 3)]
    assert all(max(each["gptq"], each["adaround"]) < each["nearest"] < 1 for each in found)


def test_settings_and_keys() -> None:
    assert EXPERIMENT.keys()[:2] == ("convolutions", "lenet5 seed 0")
    with pytest.raises(SettingsError, match="evaluation must be"):
        Int8AgainstPeers(evaluation=0)
    assert installed("torch")
