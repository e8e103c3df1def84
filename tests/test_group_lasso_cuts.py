"""On every kind of network: groups that are set to zero are cut, and what is left answers as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from cut_models import CASES, build
from pared.graph.analysis import analyse
from pared.graph.capture import capture
from pared.graph.cutting import cut_model
from pared.graph.silence import silent_neurons
from pared.prune.groups import neuron_groups

GROUPS = {"filters": (True, False), "channels": (False, True), "both": (True, True)}


@pytest.mark.parametrize("groups", ["filters", *(pytest.param(groups, marks=pytest.mark.slow) for groups in ("channels", "both"))])
@pytest.mark.parametrize("name", CASES)
def test_zero_groups_leave_without_a_trace(name: str, groups: str) -> None:
    model, inputs = build(name)
    model.eval()
    filters, channels = GROUPS[groups]
    found = neuron_groups(analyse(capture(model, inputs)), filters=filters, channels=channels)
    for group in found:
        group.scale((torch.arange(group.count) % 3 != 1).float())
        assert (group.norms() == 0).any() or group.count == 1
    before = sum(parameter.numel() for parameter in model.parameters())
    result = cut_model(model, inputs, silent_neurons).model.eval()
    after = sum(parameter.numel() for parameter in result.parameters())
    if filters and any(group.count > 1 for group in found):
        assert after < before
    assert same(model, result, inputs)


def same(first: Any, second: Any, inputs: tuple[Any, ...]) -> bool:
    with torch.no_grad():
        left, right = (pytree.tree_leaves(network(*inputs)) for network in (first, second))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))
