"""Two runs of a model show the graph that torch.export shows; what they can't show is noticed."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from cut_models import CASES, Auxiliary, build
from pared.graph.analysis import analyse
from pared.graph.capture import Captured, capture
from pared.graph.open_batch import NotTraced
from pared.graph.tracing import trace, trace_or_capture
from pared.prune import cut


def flat(outputs: object) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_a_traced_graph_computes_and_is_cut_as_a_captured_one(name: str) -> None:
    model, inputs = build(name)
    found, exported = trace(model, inputs), capture(model, inputs)
    batches = [inputs] + [tuple(torch.randn(size, *x.shape[1:]) for x in inputs) for size in (1, 5)]
    for batch in batches[: 3 if exported.dynamic else 1]:
        expected, got = flat(model(*batch)), flat(found(*batch))
        assert len(expected) == len(got)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)
    ours, theirs = analyse(Captured(found, inputs, True)), analyse(exported)
    assert [(each.name, len(each.neurons), [grid.name for grid in each.grids]) for each in ours.classes] == [
        (each.name, len(each.neurons), [grid.name for grid in each.grids]) for each in theirs.classes
    ]
    names = {str(node.target) for node in found.graph.nodes if node.op == "get_attr"}
    assert {name for name in names if "constant" not in name} <= {name for name, _ in (*model.named_parameters(), *model.named_buffers())}


def test_training_mode_is_traced_too_and_leaves_buffers_and_flags_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    model[1].train()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    x = torch.randn(4, 3, 8, 8)
    captured = trace_or_capture(model, x, train=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    targets = [str(node.target) for node in captured.module.graph.nodes]
    assert "aten.dropout.default" in targets
    assert "aten.add_.Tensor" in targets  # batches are counted
    twin = copy.deepcopy(model).train()
    torch.manual_seed(1)
    expected = twin(x)
    torch.manual_seed(1)
    torch.testing.assert_close(captured.module(x), expected, rtol=0, atol=0)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


class Does(nn.Module):
    """A layer, and something in its forward."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self.layer(x))


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x * 2


HIDDEN = {
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "list": lambda x: x * len(x.detach().tolist()),
    "numpy": lambda x: x * float(x.detach().numpy().sum()),
    "past the operators": lambda x: x + x.data,
    "no gradients": without_gradients,
    "autocast": under_autocast,
    "batch less one": lambda x: x[: len(x) - 1],
    "one over batch": lambda x: x * (1 / len(x)),
    "made from the input": lambda x: x + torch.from_numpy(x.detach().numpy()),
    "one operator for each sample": lambda x: torch.stack([row * 2 for row in x.unbind(0)]),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_run_can_not_show_is_left_to_export(name: str) -> None:
    model = Does(HIDDEN[name]).eval()
    with pytest.raises(NotTraced):
        trace(model, (torch.randn(2, 4),))
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_numbers_that_are_multiples_of_the_batch_stay_open() -> None:
    model = Does(lambda x: x.reshape(2 * len(x), 2).relu().reshape(len(x), 4) / len(x)).eval()
    found = trace(model, (torch.randn(3, 4),))
    for size in (1, 2, 7):
        x = torch.randn(size, 4)
        torch.testing.assert_close(found(x), model(x), rtol=0, atol=0)


def test_constants_of_a_forward_are_kept_and_not_shared_with_it() -> None:
    table = torch.tensor([1.0, 2.0, 3.0, 4.0])
    model = Does(lambda x: x * table + torch.tensor([1.0, 0.0, 0.0, 0.0])).eval()
    found, x = trace(model, (torch.randn(2, 4),)), torch.randn(3, 4)
    expected = model(x)
    table.zero_()
    torch.testing.assert_close(found(x), expected, rtol=0, atol=0)


def test_operators_know_their_module_their_call_and_their_line() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x).relu())

    nodes = [node for node in trace(Twice().eval(), (torch.randn(2, 4),)).graph.nodes if node.op == "call_function"]
    assert [list(node.meta["nn_module_stack"])[-1] for node in nodes] == ["inner", "", "inner@1"]
    assert all("test_graph_tracing.py" in node.meta["stack_trace"] for node in nodes)


def test_tied_weights_are_one_and_a_model_that_raises_says_so() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    tied[2].weight = tied[0].weight
    names = [str(node.target) for node in trace(tied, (torch.randn(2, 4),)).graph.nodes if node.op == "get_attr"]
    assert names.count("0.weight") == 1
    assert "2.weight" not in names
    with pytest.raises(NotTraced, match="can't be run"):
        trace(tied, (torch.randn(2, 5),))


def test_a_cut_after_a_fallback_is_that_of_the_export() -> None:
    """no_grad isn't traced, so the rewritten network has the region still."""
    torch.manual_seed(0)
    model = nn.Sequential(Does(without_gradients), nn.Linear(4, 2)).eval()
    small = cut(model, torch.randn(2, 4), 0.5)
    assert small.get_parameter("0.layer.weight").shape == (2, 4)
    assert small(torch.randn(3, 4)).grad_fn is not None
    assert trace_or_capture(Auxiliary().eval(), torch.randn(2, 3, 8, 8)).dynamic
