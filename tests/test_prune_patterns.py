"""N:M groups and blocks: the counts are exact, and what goes goes together."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pared.core.errors import SettingsError
from pared.core.method import Recipe
from pared.core.rules import Mask, bake, find_rule
from pared.prune.importance import Random
from pared.prune.patterns import Block, NofM, choose_weights, from_matrix, parse_pattern, to_matrix
from pared.prune.weights import Weights
from pared.recipe.yaml import dumps, loads
from pared.training import Task

LAYERS = [
    nn.Linear(6, 4),
    nn.Conv1d(6, 4, 3, groups=2),
    nn.Conv2d(3, 5, (2, 3)),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.Conv3d(2, 3, 2),
    nn.ConvTranspose2d(4, 6, 2, groups=2),
    nn.ConvTranspose1d(3, 2, 3),
]


def toy_task(*shape: int) -> Task:
    batches = [(torch.zeros(2, *shape), torch.tensor([0, 1]))]
    return Task(batches, batches, batches)


def numpy_n_of_m(scores: np.ndarray, kept: int, of: int) -> np.ndarray:
    mask = np.zeros(scores.shape, dtype=bool)
    for row, values in enumerate(scores):
        for start in range(0, len(values), of):
            group = list(range(start, min(start + of, len(values))))
            count = -(-kept * len(group) // of)
            for at in sorted(group, key=lambda at: (-values[at], at))[:count]:
                mask[row, at] = True
    return mask


def numpy_block_mask(scores: np.ndarray, rows: int, columns: int, count: int) -> np.ndarray:
    corners = [(r, c) for r in range(0, scores.shape[0], rows) for c in range(0, scores.shape[1], columns)]
    sums = [scores[r : r + rows, c : c + columns].sum() for r, c in corners]
    mask = np.zeros(scores.shape, dtype=bool)
    for at in sorted(range(len(corners)), key=lambda at: (-sums[at], at))[:count]:
        r, c = corners[at]
        mask[r : r + rows, c : c + columns] = True
    return mask


# --- the patterns themselves ---


def test_patterns_are_read():
    assert parse_pattern("") == Block(1, 1)
    assert parse_pattern("1:4") == NofM(1, 4)
    assert parse_pattern("16x2") == Block(16, 2)
    for wrong in ("4:2", "2:2", "0:4", "x8", "2:4:8", "0x1", "2 : 4", "two", 24, None):
        with pytest.raises(SettingsError, match=r"prune.weights: pattern must be empty, N:M with N < M such as 2:4"):
            parse_pattern(wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="N:M must be such that"):
        NofM(3, 2)
    with pytest.raises(SettingsError, match="rows must be"):
        Block(0, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 13), st.data())
def test_groups_keep_their_count_with_ties_by_position(of, rows, columns, data):
    kept = data.draw(st.integers(1, of))
    scores = np.array(data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns)), dtype=np.float32)
    scores = scores.reshape(rows, columns)
    mask = NofM(kept, of).mask(torch.from_numpy(scores))
    assert np.array_equal(mask.numpy(), numpy_n_of_m(scores, kept, of))


def test_groups_start_anew_after_a_run():
    mask = NofM(1, 4, run=3).mask(torch.tensor([[1.0, 2.0, 3.0, 3.0, 2.0, 1.0]]))
    assert mask.tolist() == [[False, False, True, True, False, False]]


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (8, 1), (2, 3), (1, 1)])
def test_blocks_are_pooled_and_spread(rows, columns):
    values = torch.arange(70.0).view(1, 7, 10)
    sums = Block(rows, columns).pool(values)
    expected = np.add.reduceat(np.add.reduceat(values[0].numpy(), range(0, 7, rows), 0), range(0, 10, columns), 1)
    assert np.array_equal(sums[0].numpy(), expected)
    marks = Block(rows, columns).spread(sums % 2 == 0, 7, 10)
    assert all(marks[0, r, c] == (expected[r // rows, c // columns] % 2 == 0) for r in range(7) for c in range(10))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("pattern", [Block(), NofM(2, 4)])
def test_matrix_and_back(layer, pattern):
    tensor = torch.arange(float(layer.weight.numel())).view(layer.weight.shape)
    matrix = to_matrix(layer, tensor, pattern)
    groups = getattr(layer, "groups", 1)
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert matrix.shape == (groups, outputs // groups, tensor.numel() // outputs)
    assert torch.equal(from_matrix(layer, matrix, pattern), tensor)


def test_columns_are_those_of_im2col_or_by_position():
    weight = torch.arange(8.0).view(1, 2, 2, 2)
    layer = nn.Conv2d(2, 1, 2)
    assert to_matrix(layer, weight, Block()).flatten().tolist() == list(range(8))
    assert to_matrix(layer, weight, NofM(1, 2)).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


# --- choosing ---


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 100), st.integers(0, 9))
def test_blocks_stay_by_count(rows, columns, high, wide, percent, seed):
    scores = np.random.default_rng(seed).integers(0, 3, (rows, columns)).astype(np.float32)
    layer = nn.Linear(columns, rows)
    alive = torch.ones(rows, columns, dtype=torch.bool)
    mask = choose_weights({"": layer}, {"": torch.from_numpy(scores)}, {"": alive}, percent / 100, "global", Block(high, wide))[""]
    blocks = -(-rows // high) * -(-columns // wide)
    assert np.array_equal(mask.numpy(), numpy_block_mask(scores, high, wide, (percent * blocks * 2 + 100) // 200))


def test_blocks_of_several_layers_are_ranked_together_or_apart():
    layers: dict[str, nn.Linear] = {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}
    scores = {"a": torch.tensor([[1.0, 1.0, 2.0, 2.0]]), "b": torch.tensor([[5.0, 0.0, 3.0, 3.0]])}
    alive = {path: torch.ones(1, 4, dtype=torch.bool) for path in layers}
    together = choose_weights(layers, scores, alive, 0.5, "global", Block(1, 2))
    assert [mask.int().tolist() for mask in together.values()] == [[[0, 0, 0, 0]], [[1, 1, 1, 1]]]
    apart = choose_weights(layers, scores, alive, 0.5, "layer", Block(1, 2))
    assert [mask.int().tolist() for mask in apart.values()] == [[[0, 0, 1, 1]], [[0, 0, 1, 1]]]


def test_removed_weights_count_for_nothing():
    layers = {"a": nn.Linear(4, 1)}
    alive = {"a": torch.tensor([[False, True, False, False]])}
    scores = {"a": torch.tensor([[9.0, 1.0, 9.0, 9.0]])}
    assert choose_weights(layers, scores, alive, 0.5, "layer", Block(1, 2))["a"].tolist() == [[False, True, False, False]]
    assert choose_weights(layers, scores, alive, 0.5, "layer", NofM(2, 4))["a"].tolist() == [[False, True, False, False]]


# --- the method ---


def groups_of_four(layer: nn.Module, weight: Tensor) -> Tensor:
    """How many of each four consecutive inputs are not zero."""
    rows = to_matrix(layer, weight, NofM(2, 4))[0] != 0  # type: ignore[arg-type]
    return rows.view(len(rows), -1, 4).sum(-1)


def test_two_of_four_along_the_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 4))
    before = copy.deepcopy(model)
    method = Weights(pattern="2:4")
    assert method.keep == 0.5
    small = bake(method(model, toy_task(8, 4, 4)))
    for index in (0, 2):
        assert bool((groups_of_four(small[index], small[index].weight) == 2).all())
    # at each position of the kernel the two largest of four consecutive channels
    kept = small[0].weight[1, 4:8, 2, 0] != 0
    assert kept.nonzero().flatten().tolist() == sorted(before[0].weight[1, 4:8, 2, 0].abs().topk(2).indices.tolist())


def test_incomplete_groups_keep_their_proportion_and_no_layer_is_emptied():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1))
    small = bake(Weights(pattern="1:4")(model, toy_task(3, 8, 8)))
    assert [int(layer.weight.count_nonzero()) for layer in small] == [4 * 9, 4 * 9, 6]
    wider = bake(Weights(pattern="2:4")(model, toy_task(3, 8, 8)))
    assert [int(layer.weight.count_nonzero()) for layer in wider] == [4 * 9 * 2, 4 * 9, 12]


def test_rounds_narrow_the_groups_step_by_step():
    seen: list[Tensor] = []

    def fit(model, task, train, objective=None):
        mask = find_rule(model, "weight", Mask)
        assert isinstance(mask, Mask)
        seen.append(mask.keep.clone())

    batches = [(torch.zeros(2, 8), torch.tensor([0, 1]))]
    torch.manual_seed(0)
    Weights(pattern="1:8", rounds=3, tune="1ep")(nn.Linear(8, 5), Task(batches, batches, batches, fit=fit))  # type: ignore[arg-type]
    # 8 * (1/8 + 7/8 (1 - t/3)³): 3.07, 1.26, 1, rounded up
    assert [mask.sum(1).tolist() for mask in seen] == [[4] * 5, [2] * 5, [1] * 5]
    assert all(bool((was | ~now).all()) for was, now in itertools.pairwise(seen))


@pytest.mark.parametrize(("pattern", "rows", "columns"), [("1x8", 1, 8), ("8x1", 8, 1)])
def test_blocks_go_as_a_whole(pattern, rows, columns):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    sizes = [model[index].weight.detach().abs().numpy() for index in (0, 2)]
    small = bake(Weights(keep=0.25, pattern=pattern)(model, toy_task(16)))
    masks = [(small[index].weight != 0).numpy() for index in (0, 2)]
    sums = [Block(rows, columns).pool(torch.from_numpy(size)).flatten() for size in sizes]
    order = torch.cat(sums).sort(descending=True).indices[:12]  # a quarter of 32 + 16 blocks
    expected = [Block(rows, columns).pool(torch.from_numpy(mask).float()).flatten() for mask in masks]
    assert sorted(torch.cat(expected).nonzero().flatten().tolist()) == sorted(order.tolist())
    assert set(torch.cat(expected).tolist()) == {0.0, 8.0}


def test_patterns_follow_an_importance_and_earlier_masks():
    torch.manual_seed(0)
    first = Weights(keep=0.5)(nn.Linear(16, 4), toy_task(16))
    second = bake(Weights(pattern="1:4", importance=Random(3))(first, toy_task(16)))
    assert bool(((first.weight != 0) | (second.weight == 0)).all())
    assert int((second.weight != 0).view(4, 4, 4).sum(-1).max()) == 1


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_nothing_and_everything(keep):
    layer = nn.Linear(9, 3)
    small = bake(Weights(keep=keep, pattern="1x8")(layer, toy_task(9)))
    assert int(small.weight.count_nonzero()) == 27 * keep


def test_a_share_that_contradicts_the_pattern_is_refused():
    assert Weights(keep=0.5, pattern="2:4") == Weights(pattern="2:4")
    with pytest.raises(SettingsError, match=r"keep must be left out, because 2:4 keeps 0.5. Got 0.3"):
        Weights(keep=0.3, pattern="2:4")
    with pytest.raises(SettingsError, match="pattern must be empty"):
        Weights(pattern="4:2")


def test_patterns_go_through_a_recipe_file():
    recipe = loads("steps: [prune.weights: {pattern: 2:4, repair: obs}]", "recipe.yaml")
    assert recipe.steps == (Weights(pattern="2:4", repair="obs"),)
    for pattern in ("1:3", "8x1", ""):
        method = Weights(pattern=pattern)
        assert loads(dumps(Recipe(method)), "recipe.yaml").steps == (method,)
    with pytest.raises(SettingsError, match=r"recipe.yaml:1: prune.weights: pattern must be empty, N:M"):
        loads("steps: [prune.weights: {pattern: 4:2}]", "recipe.yaml")
