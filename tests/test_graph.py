"""Capture, labels and counts."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cut_models import CASES, build
from pared import prune
from pared.core.errors import CaptureError, ModelError
from pared.graph import capture, count
from pared.graph.algebra import combine, concatenate, reduce, reshape
from pared.graph.analysis_pass import AnalysisPass
from pared.graph.labels import Group, Labels, drop_constant_axes, factor
from pared.graph.record import record


@pytest.mark.parametrize("name", CASES)
def test_a_captured_graph_computes_what_the_model_computes_for_any_batch(name: str) -> None:
    model, inputs = build(name)
    flags = {path: module.training for path, module in model.named_modules()}
    captured = capture(model.train(), tuple(x[:1] for x in inputs))
    assert captured.dynamic
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        for size in (1, 2, 3):
            batch = tuple(x[:size] for x in inputs)
            left, right = (torch.utils._pytree.tree_leaves(net(*batch)) for net in (model, captured.module))
            # not equal to the bit: torch's encoder layer has a fast path in eval
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))
    assert flags == {path: module.training for path, module in model.named_modules()}


def test_a_captured_graph_copies_without_a_warning_and_is_captured_again() -> None:
    model, inputs = build("chain")
    captured = capture(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copy.deepcopy(captured.module)
    again = capture(twin, inputs)
    with torch.no_grad():
        assert torch.equal(again.module(*inputs), model(*inputs))


def test_a_rewritten_network_pickles() -> None:
    model, inputs = build("fused attention")
    small = prune.cut(model, inputs)
    twin = pickle.loads(pickle.dumps(small))
    with torch.no_grad():
        assert torch.equal(small(*inputs), twin(*inputs))


def test_errors_of_capture_name_the_line_and_leave_no_print(capfd: pytest.CaptureFixture[str]) -> None:
    class Loops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while x.norm() > 1:
                x = x / 2
            return x

    with pytest.raises(CaptureError, match=r"Loops: torch.export can't follow its forward.*test_graph.py.*while x.norm\(\) > 1"):
        capture(Loops(), torch.ones(2, 3))
    with pytest.raises(ModelError, match="Linear can't run on inputs of shape"):
        capture(nn.Linear(3, 2), torch.ones(2, 4))
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@given(SIZES, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_factoring_matches_axes_of_equal_size(sizes: list[int], random: object) -> None:
    total = int(np.prod(sizes))
    other: list[int] = []
    rest = total
    while rest > 1:
        part = random.choice([d for d in range(2, rest + 1) if rest % d == 0])  # type: ignore[attr-defined]
        other.append(part)
        rest //= part
    blocks = factor(sizes, other)
    assert [axis for olds, _ in blocks for axis in olds] == list(range(len(sizes)))
    assert [axis for _, news in blocks for axis in news] == list(range(len(other)))
    for olds, news in blocks:
        assert np.prod([sizes[axis] for axis in olds]) == np.prod([other[axis] for axis in news])


def analysis_pass() -> AnalysisPass:
    run = AnalysisPass({})
    run.node = capture(nn.Linear(1, 1), torch.zeros(2, 1)).module.graph.find_nodes(op="placeholder")[0]
    return run


def test_a_reshape_there_and_back_gives_the_same_atoms() -> None:
    cx = analysis_pass()
    labels = Labels((2, 12, 5), (Group((1,), cx.fresh((12,))),))
    split = reshape(cx, labels, (2, 3, 4, 5), "a")
    assert split.groups[0].axes == (1, 2)
    assert split.groups[0].atoms.tolist() == labels.groups[0].atoms.reshape(3, 4).tolist()
    back = reshape(cx, split, (2, 12, 5), "b")
    assert np.array_equal(back.groups[0].atoms, labels.groups[0].atoms)
    flat = reshape(cx, labels, (2, 60), "c")
    assert np.array_equal(flat.groups[0].atoms, np.repeat(labels.groups[0].atoms, 5))
    again = reshape(cx, flat, (2, 12, 5), "d")
    assert again.groups[0].axes == (1,)


def test_channel_shuffle_is_a_permutation() -> None:
    cx = analysis_pass()
    labels = Labels((2, 6), (Group((1,), cx.fresh((6,))),))
    split = reshape(cx, labels, (2, 2, 3), "a").permuted([0, 2, 1])
    assert reshape(cx, split, (2, 6), "b").groups[0].atoms.tolist() == [1, 4, 2, 5, 3, 6]


def test_broadcasting_from_length_one_ties_nothing() -> None:
    cx = analysis_pass()
    x, gate = Labels((2, 4, 8), (Group((1,), cx.fresh((4,))),)), Labels((2, 1, 8))
    assert combine(cx, x, gate).groups == x.groups
    assert not cx.ties
    assert not cx.frozen
    combine(cx, x, Labels((2, 4, 1)))
    assert len(cx.frozen) == 1


def test_concatenation_lays_ranges_side_by_side_and_fixed_ranges_stay() -> None:
    cx = analysis_pass()
    x = Labels((2, 3), (Group((1,), cx.fresh((3,))),))
    joined = concatenate(cx, [x, Labels((2, 2)), x], 1)
    assert joined.shape == (2, 8)
    assert joined.groups[0].atoms.tolist() == [1, 2, 3, 0, 0, 1, 2, 3]


def test_a_sum_over_cells_gives_rows() -> None:
    cx = analysis_pass()
    cells = Group((1, 2), cx.fresh((2, 3)))
    summed = reduce(cx, Labels((5, 2, 3), (cells,)), 2)
    assert summed.shape == (5, 2)
    assert len(cx.links) == 1
    assert summed.groups[0].atoms.shape == (2,)


def test_axes_along_which_nothing_changes_are_dropped() -> None:
    atoms = np.array([[1, 1], [2, 2]])
    group, stayed = drop_constant_axes(Group((3, 4), atoms))
    assert stayed == (3,)
    assert group is not None
    assert group.atoms.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 5, 5), 8 * 2 * 9 * 25),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 3, 3), 4 * 6 * 4 * 9),
        (nn.Conv1d(2, 3, 3, bias=False), (2, 7), 3 * 2 * 3 * 5),
        (nn.Linear(6, 4), (5, 6), 5 * 6 * 4),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 4), 24),
        (nn.LSTM(3, 5, batch_first=True), (7, 3), 7 * 4 * (5 * 3 + 5 * 5)),
        (nn.BatchNorm2d(3), (3, 4, 4), 0),
    ],
)
def test_macs_by_hand(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    for batch in (1, 3):
        counts = count(model, torch.zeros(batch, *shape))
        assert counts.macs == macs
        assert counts.params == sum(parameter.numel() for parameter in model.parameters())


def test_counts_are_by_module_and_shared_parameters_count_once() -> None:
    model, inputs = build("shared layer")
    counts = count(model, inputs)
    assert {found.path: (found.params, found.macs) for found in counts.modules} == {"i": (84, 72), "a": (156, 288), "f": (39, 36)}
    model.a.weight.data[0] = 0
    assert count(model, inputs).nonzero == counts.params - 12


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)), nn.LSTM(5, 4, batch_first=True)])
def test_what_the_capture_noted_is_what_a_run_sees(model: nn.Module) -> None:
    x = torch.randn(2, 3, 6, 6) if isinstance(model, nn.Sequential) else torch.randn(2, 7, 5)
    captured = capture(model, x)
    noted, run = record(captured), record(captured, captured.example_inputs)
    assert noted == run
    assert {node: type(value) for node, value in noted.items()} == {node: type(value) for node, value in run.items()}


def test_a_number_that_only_a_run_knows_is_found_by_running() -> None:
    captured = capture(nn.Linear(3, 2), torch.randn(2, 3))
    for node in captured.module.graph.nodes:
        node.meta.pop("val", None)
    assert list(record(captured).values())[-1] == (2, 2)


class Counting(nn.Module):
    """Counts its calls in a buffer, in place, and keeps its last input in another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("wide", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(x) * self.calls.clamp(max=1)


@pytest.mark.parametrize("train", [False, True])
def test_a_capture_leaves_the_buffers_of_the_model_alone(train: bool) -> None:
    model = Counting()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    own = dict(model.named_buffers())
    capture(model, torch.randn(4, 3), train=train)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(buffer is own[name] for name, buffer in model.named_buffers())
