"""Levels of a graph: every one sees what a whole run would show, and all together cost about two runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pared.core.errors import ModelError
from pared.graph.capture import Captured, capture
from pared.graph.fold import packet
from pared.prune.observe import levels
from pared.prune.stepwise import Stepwise


class Branched(nn.Module):
    """Two branches, a shortcut, and operators that write to what others read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        left = self.a(x)
        first = left[:, :2]
        left.relu_()  # also changes `first`
        right = self.b(x)
        both = left + self.c(right)
        both += torch.cat([first, first], dim=1)
        return self.d(both) + x


def linear_nodes(captured: Captured) -> list[list[fx.Node]]:
    nodes = [node for node in captured.module.graph.nodes if packet(node) is torch.ops.aten.linear]
    return levels(captured.module.graph, {node: node for node in nodes})


def read_by(module: nn.Module, paths: str, x: Tensor) -> dict[str, Tensor]:
    """What linear layers read and give in a plain run."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(path).register_forward_hook(
            lambda _, given, out, path=path: seen.update({path: torch.cat([given[0], out], dim=1).clone()})
        )
        for path in paths
    ]
    with torch.no_grad():
        module(x.clone())
    for handle in handles:
        handle.remove()
    return seen


def looked(network: Stepwise, level: int, nodes: list[fx.Node]) -> Iterator[dict[fx.Node, Any]]:
    return network.look(level, {node: lambda given, out: torch.cat([given, out], dim=1).clone() for node in nodes})


@pytest.mark.parametrize("held", [2**30, 200, 0])
def test_each_level_sees_what_a_run_with_the_present_weights_shows(held: int) -> None:
    torch.manual_seed(0)
    model = Branched()
    captured = capture(model, torch.zeros(3, 4))
    ordered = linear_nodes(captured)
    names = {node: str(node.args[1].target)[0] for level in ordered for node in level}  # type: ignore[union-attr]
    assert [sorted(names[node] for node in level) for level in ordered] == [["a", "b"], ["c"], ["d"]]
    batches = [torch.randn(3, 4), torch.randn(5, 4)]
    given = [batch.clone() for batch in batches]
    network = Stepwise(captured.module, [(batch,) for batch in batches], ordered, held)
    for number, level in enumerate(ordered):
        for batch, seen in zip(given, looked(network, number, level), strict=True):
            assert torch.is_grad_enabled()
            expected = read_by(model, "abcd", batch)
            for node in level:
                assert torch.equal(seen[node], expected[names[node]])
        with torch.no_grad():
            for node in level:
                model.get_submodule(names[node]).weight += 0.5  # type: ignore[operator]
    assert all(torch.equal(batch, before) for batch, before in zip(batches, given, strict=True))


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket is torch.ops.aten.addmm
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("held", "most"), [(2**30, 2 * 10), (0, 10 * 11 // 2)])
def test_all_levels_together_cost_about_two_runs(held: int, most: int) -> None:
    captured = capture(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(10))), torch.zeros(2, 4))
    ordered = linear_nodes(captured)
    network = Stepwise(captured.module, [(torch.randn(2, 4),)] * 3, ordered, held)
    with Counting() as counting:
        for number, level in enumerate(ordered):
            assert len(list(looked(network, number, level))) == 3
    assert 3 * 10 <= counting.calls <= 3 * most
    assert (counting.calls > 3 * 20) == (held == 0)


def test_a_batch_that_does_not_fit_is_named() -> None:
    captured = capture(nn.Linear(4, 2), torch.zeros(2, 4))
    ordered = linear_nodes(captured)
    with pytest.raises(ModelError, match=r"shape \(2, 5\)"):
        list(looked(Stepwise(captured.module, [(torch.zeros(2, 5),)], ordered), 0, ordered[0]))
