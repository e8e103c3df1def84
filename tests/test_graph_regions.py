"""Regions with their own autocast or without gradients are followed like any other part of a forward."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pared.graph.analysis import analyse
from pared.graph.capture import capture
from pared.graph.rewritten import Rewritten
from pared.prune import cut
from pared.runtime import export


class Regions(nn.Module):
    """Two hidden layers, one under autocast that is switched off, one read without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu() * self.scale
        with torch.autocast("cpu", enabled=False):
            y, doubled = self.second(h).relu(), h * 2
        with torch.no_grad():
            size = y.sum(-1, keepdim=True)
            constant = h.sum(-1, keepdim=True) + torch.ones(1)
        return self.last(doubled) * size + constant


def network() -> Regions:
    torch.manual_seed(0)
    return Regions().eval()


def test_a_captured_graph_has_no_regions_left_and_computes_the_same() -> None:
    model, x = network(), torch.randn(5, 4)
    captured = capture(model, x)
    names = [str(node.target) for node in captured.module.graph.nodes]
    assert not any("wrap_with" in name for name in names)
    assert sum("autocast" in name for name in names) == 2
    torch.testing.assert_close(captured.module(x), model(x))
    analysis = analyse(captured)
    assert analysis.first.unknown == []
    assert sorted(len(found.neurons) for found in analysis.classes) == [6, 8]


def test_what_was_read_without_gradients_gives_none() -> None:
    model, x = network(), torch.randn(5, 4)
    twin = copy.deepcopy(model)
    captured = capture(twin, x)
    captured.module(x).sum().backward()
    model(x).sum().backward()
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_autocast_stays_off_inside() -> None:
    model, x = network(), torch.randn(5, 4)
    captured = capture(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(captured.module(x), model(x))
        assert not torch.equal(captured.module(x).float(), capture(model, x).module(x * 1.01).float())
    assert not torch.is_autocast_enabled("cpu")


def test_gradients_stay_off_around() -> None:
    captured = capture(network(), torch.randn(5, 4))
    with torch.no_grad():
        assert not captured.module(torch.randn(5, 4)).requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_cut_goes_through_them(rewritten: bool, tmp_path) -> None:
    model, x = network(), torch.randn(5, 4)
    small = cut(model, x, 0.5)
    assert isinstance(small, Regions)
    assert (small.first.out_features, small.second.out_features) == (4, 3)
    if rewritten:
        captured = capture(small, x)
        parts = {**dict(captured.module.named_parameters()), **dict(captured.module.named_buffers())}
        small = Rewritten(parts, captured.module.graph, captured.module.graph, set(parts)).eval()
    export(small, x, tmp_path / "small.onnx")  # raises where the file computes something else
