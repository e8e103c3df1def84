"""Looking at the nodes of a captured graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pared.core.errors import ModelError
from pared.graph.capture import capture
from pared.prune.observe import Watch, operator_name


class Counting(nn.Module):
    """Writes to a buffer of its own, and in place to what a layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.first(x).relu_()
        return self.second(hidden) * self.calls


def operators(module: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in module.graph.nodes if operator_name(node) == name]


def test_values_and_arguments_of_the_watched_nodes_only() -> None:
    model = Counting().eval()
    module = capture(model, torch.zeros(2, 2)).module
    seen: list[tuple[str, tuple[int, ...], Tensor]] = []

    def see(node: fx.Node, arguments: tuple[Any, ...], value: Tensor) -> None:
        seen.append((operator_name(node), tuple(arguments[0].shape), value.clone()))

    x = torch.randn(3, 2)
    Watch(module, operators(module, "linear"), see).look((x,))
    assert [(name, shape) for name, shape, _ in seen] == [("linear", (3, 2)), ("linear", (3, 3))]
    with torch.no_grad():
        torch.testing.assert_close(seen[0][2], model.first(x))
        torch.testing.assert_close(seen[1][2], model.second(model.first(x).relu()))


def test_it_stops_after_the_last_watched_node() -> None:
    module = capture(Counting(), torch.zeros(2, 2)).module
    first = operators(module, "linear")[0]
    watch = Watch(module, [first], lambda *_: None)
    assert len(watch.graph.nodes) < len(module.graph.nodes)
    assert not [node for node in watch.graph.nodes if operator_name(node) == "mul"]
    Watch(module, [], lambda *_: None).look((torch.zeros(2, 2),))


def test_the_model_and_the_inputs_stay_as_they_are() -> None:
    model, x = Counting(), torch.randn(3, 2)
    module = capture(model, torch.zeros(2, 2)).module
    before, given = copy.deepcopy(model.state_dict()), x.clone()
    factors: list[float] = []
    watch = Watch(module, operators(module, "mul"), lambda node, arguments, value: factors.append(float(arguments[1])))
    watch.look((x,))
    watch.look((x,))
    assert factors == [before["calls"] + 1, before["calls"] + 2]  # its own copy goes on
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, given)


def test_a_batch_that_does_not_fit_is_named() -> None:
    module = capture(Counting(), torch.zeros(2, 2)).module
    with pytest.raises(ModelError, match=r"the model fails on inputs of shape \(3, 5\)"):
        Watch(module, operators(module, "linear"), lambda *_: None).look((torch.zeros(3, 5),))
