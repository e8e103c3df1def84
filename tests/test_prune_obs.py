"""Optimal brain surgery: closed forms, least squares, and networks that answer more nearly as before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pared.core.errors import ModelError, SettingsError
from pared.core.layers import compressible
from pared.core.rules import bake
from pared.data import load
from pared.prune.obs import obs_prune, output_error, refit
from pared.prune.patterns import Block, NofM, to_matrix
from pared.prune.selection import highest, select
from pared.prune.weights import Weights
from pared.training import Task, Train
from pared.training.layer_inputs import execution_order, gram_of, unfold


def random_layer(seed: int, rows: int, columns: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, correlated inputs, and their Gram matrix."""
    rng = np.random.default_rng(seed)
    inputs = torch.from_numpy(rng.normal(size=(samples, columns)) @ rng.normal(size=(columns, columns)))
    return torch.from_numpy(rng.normal(size=(rows, columns))), inputs, inputs.T @ inputs


def keeping(count: int):
    return lambda scores: highest(scores, count)


# --- one layer ---


def test_removing_one_weight_is_the_closed_form():
    weight, _, gram = random_layer(0, 3, 5, 40)
    new, mask = obs_prune(weight, gram, keeping(14), damping=0.01)
    damped = gram.numpy() + 0.01 * np.trace(gram.numpy()) / 5 * np.eye(5)
    inverse, w = np.linalg.inv(damped), weight.numpy()
    cost = w**2 / np.diag(inverse)
    row, column = np.unravel_index(cost.argmin(), cost.shape)
    expected = w.copy()
    expected[row] -= w[row, column] / inverse[column, column] * inverse[:, column]
    expected[row, column] = 0
    assert np.argwhere(~mask.numpy()).tolist() == [[row, column]]
    assert new.numpy() == pytest.approx(expected, abs=1e-12)
    change = expected - w  # what the paper says that it costs
    assert ((change @ damped) * change).sum() == pytest.approx(cost.min())


@pytest.mark.parametrize("count", [4, 14, 24, 30])
def test_what_stays_is_refitted_by_least_squares(count):
    weight, inputs, gram = random_layer(1, 3, 10, 50)
    mask = select(torch.rand(3, 10, generator=torch.Generator().manual_seed(0)), count / 30)
    new = refit(weight, gram, gram.inverse(), mask).numpy()
    for row in range(3):
        kept = mask[row].numpy()
        answer = np.linalg.lstsq(inputs.numpy()[:, kept], inputs.numpy() @ weight[row].numpy(), rcond=None)[0] if kept.any() else []
        assert new[row, kept] == pytest.approx(answer, abs=1e-8)
        assert not new[row, ~kept].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 9), st.integers(1, 20), st.floats(0, 1))
def test_the_error_is_never_larger_than_that_of_magnitude(seed, rows, columns, samples, keep):
    weight, inputs, gram = random_layer(seed, rows, columns, samples)  # singular where there are fewer samples than columns
    plain = weight * select(weight.abs(), keep)
    new, mask = obs_prune(weight, gram, lambda scores: select(scores, keep))
    assert int(mask.sum()) == int(select(weight, keep).sum())
    assert not new[~mask].any()
    error = ((inputs @ (weight - new).T) ** 2).sum().item()
    assert output_error(weight, new, gram) == pytest.approx(error, rel=1e-6, abs=1e-6)
    assert error <= output_error(weight, plain, gram) * (1 + 1e-9) + 1e-9


def test_much_is_gained_on_correlated_inputs():
    weight, _, gram = random_layer(2, 30, 100, 400)  # more columns than are decided at a time
    error = output_error(weight, obs_prune(weight, gram, lambda scores: select(scores, 0.3))[0], gram)
    assert error < 0.55 * output_error(weight, weight * select(weight.abs(), 0.3), gram)
    # better than choosing by the cost alone, without looking again after each window
    inverse = (gram + 0.01 * gram.diagonal().mean() * torch.eye(100)).inverse()
    once = refit(weight, gram, gram.inverse(), select(weight.square() / inverse.diagonal(), 0.3))
    assert error < output_error(weight, once, gram)


@pytest.mark.parametrize("columns", [8, 100, 131])
def test_patterns_hold_across_windows(columns):
    weight, _, gram = random_layer(3, 6, columns, 300)
    pattern = NofM(1, 3)
    new, mask = obs_prune(weight, gram, pattern.mask)
    assert torch.equal(mask, pattern.mask(mask.float()))
    assert mask.sum(1).tolist() == [columns // 3 + (columns % 3 > 0)] * 6
    assert not new[~mask].any()
    block = Block(2, 7)

    def pick(scores):
        sums = block.pool(scores)
        return block.spread(select(sums, 0.4), *scores.shape)

    _, mask = obs_prune(weight, gram, pick)
    assert torch.equal(mask, block.spread(block.pool(mask.float()) > 0, *mask.shape))
    blocks = 3 * -(-columns // 7)
    assert int((block.pool(mask.float()) > 0).sum()) == int(select(torch.zeros(blocks), 0.4).sum())


def test_inputs_that_are_always_zero_and_no_inputs_at_all():
    weight, gram = torch.tensor([[5.0, 0.1, 0.2]]), torch.diag(torch.tensor([0.0, 1.0, 1.0]))
    new, mask = obs_prune(weight, gram, keeping(2))
    assert mask.tolist() == [[False, True, True]]
    assert new[0].tolist() == pytest.approx([0, 0.1, 0.2])
    new, mask = obs_prune(weight, torch.zeros(3, 3), keeping(2))
    assert int(mask.sum()) == 2
    new, mask = obs_prune(weight, gram, keeping(0))
    assert not new.any()
    new, mask = obs_prune(weight, gram, keeping(3))
    assert torch.equal(new, weight)


# --- the inputs of layers ---

SHAPES = [
    (nn.Linear(6, 4), (3, 5, 6)),
    (nn.Conv1d(6, 4, 3, stride=2, padding=2, groups=2), (3, 6, 9)),
    (nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 3, 8, 9)),
    (nn.Conv2d(4, 8, 3, groups=4, padding="same", dilation=2), (3, 4, 6, 6)),
    (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), (3, 4, 5, 5)),
    (nn.Conv2d(4, 2, 3, padding="same", padding_mode="reflect"), (3, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2, stride=2), (3, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(3, 2, 3), (3, 3, 5)),
    (nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 3), padding=(0, 1), output_padding=(1, 2), groups=2, dilation=(2, 1)), (3, 4, 5, 4)),
    (nn.ConvTranspose2d(2, 2, 1, padding=0), (3, 2, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), SHAPES, ids=str)
def test_columns_times_weights_are_the_outputs(layer, shape):
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    columns = unfold(layer, inputs)
    matrix = to_matrix(layer, layer.weight.detach(), Block())
    outputs = torch.einsum("pgc,goc->pgo", columns.flatten(2), matrix).flatten(1) + layer.bias
    expected = layer(inputs).detach()
    expected = expected if isinstance(layer, nn.Linear) else expected.movedim(1, -1)
    assert torch.allclose(outputs, expected.reshape(outputs.shape), atol=1e-5)
    # the Gram matrix in both orders of columns gives the energy of the outputs
    for pattern in (Block(), NofM(2, 4)):
        gram, weight = gram_of(layer, inputs, isinstance(pattern, NofM)), to_matrix(layer, layer.weight.detach(), pattern).double()
        energy = ((outputs - layer.bias) ** 2).sum().item()
        assert float(((weight @ gram) * weight).sum()) == pytest.approx(energy, rel=1e-4)


def test_large_batches_are_taken_in_parts(monkeypatch):
    layer, inputs = nn.Conv2d(2, 3, 3), torch.randn(7, 2, 6, 6)
    whole = gram_of(layer, inputs)
    monkeypatch.setattr("pared.training.layer_inputs._ELEMENTS", 2 * 36 * 9 * 2)
    assert torch.allclose(gram_of(layer, inputs), whole, rtol=1e-5)
    one = gram_of(layer, inputs[0])
    assert torch.allclose(one, gram_of(layer, inputs[:1]))


def test_layers_come_in_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.unused = nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(9, 9)

        def forward(self, x):
            return self.last(self.first(input=x))

    model = Backwards()
    assert execution_order(model, compressible(model, (), "prune.weights"), (torch.zeros(2, 3),)) == ["first", "last"]
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- the method ---


def toy_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3)),
    )


def unlabelled_task(count: int = 64) -> Task:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(16, 2, 8, 8, generator=generator), None) for _ in range(count // 16)]
    return Task(batches, batches, batches)


def outputs(model: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(*task.prepare(inputs)) for inputs, _ in task.train])


@pytest.mark.parametrize("pattern", ["", "2:4", "1x8", "8x1"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_repair_brings_the_outputs_back_at_equal_counts(pattern, scope):
    model, task = toy_net(), unlabelled_task()
    keep = 0.5 if ":" in pattern else 0.4
    plain = bake(Weights(keep, pattern=pattern, scope=scope)(model, task))
    repaired = bake(Weights(keep, pattern=pattern, scope=scope, repair="obs", samples=64)(model, task))
    for index in (0, 3, 5, 8):
        counts = [int(net[index].weight.count_nonzero()) for net in (plain, repaired)]
        if "x" not in pattern:  # blocks at edges are of several sizes
            assert counts[0] == counts[1]
        assert torch.equal(repaired[index].bias, model[index].bias)
    before = outputs(model, task)
    assert (outputs(repaired, task) - before).square().sum() < 0.7 * (outputs(plain, task) - before).square().sum()
    again = bake(Weights(keep, pattern=pattern, scope=scope, repair="obs", samples=64)(model, task))
    assert all(torch.equal(a, b) for a, b in zip(repaired.state_dict().values(), again.state_dict().values(), strict=True))


def test_repair_leaves_modes_statistics_and_the_input_alone():
    model, task = toy_net(), unlabelled_task()
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = bake(Weights(0.5, repair="obs")(model, task))
    assert [module.training for module in small.modules()] == flags
    assert torch.equal(small[1].running_mean, model[1].running_mean)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in small.modules())


def test_earlier_masks_hold_and_rounds_are_nested():
    model, task = toy_net(), unlabelled_task()
    first = Weights(0.6, repair="obs")(model, task)
    second = bake(Weights(0.2, rounds=3, repair="obs")(first, task))
    kept = [bake(net)[index].weight != 0 for net in (first, second) for index in (0, 3, 5, 8)]
    assert all(bool((was | ~now).all()) for was, now in zip(kept[:4], kept[4:], strict=True))
    total = sum(mask.numel() for mask in kept[4:])
    assert sum(int(mask.sum()) for mask in kept[4:]) == int(select(torch.zeros(total), 0.2).sum())


def test_a_tied_layer_sees_the_inputs_of_both_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    batches = [(torch.randn(32, 6), None)]
    small = Weights(0.5, repair="obs", samples=32)(Twice(), Task(batches, batches, batches))
    assert torch.equal(small.a.weight, small.b.weight)
    assert int(bake(small).a.weight.count_nonzero()) == 18


def test_a_weight_that_is_read_without_calling_its_layer_is_masked_by_magnitude():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model, batches = Attention(), [(torch.randn(16, 5, 8), None)]
    small = bake(Weights(0.5, scope="layer", repair="obs")(model, Task(batches, batches, batches)))
    weight = model.attention.out_proj.weight
    assert torch.equal(small.attention.out_proj.weight, weight * select(weight.abs(), 0.5))
    assert int(small.out.weight.count_nonzero()) == 12


def test_wrong_settings():
    with pytest.raises(SettingsError) as error:
        Weights(repair="all", samples=0, damping=0)  # type: ignore[arg-type]
    assert [problem.split(" must be ")[0] for problem in error.value.problems] == [
        f"prune.weights: {field}" for field in ("repair", "samples", "damping")
    ]


def test_digits_without_labels():
    task = load("digits")
    torch.manual_seed(0)
    model = Train(epochs=6, learning_rate=0.01)(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), task)

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            hits = [net(*task.prepare(inputs)).argmax(1) == labels for inputs, labels in task.test]
        return torch.cat(hits).float().mean().item()

    plain, repaired = (bake(Weights(0.15, repair=repair, samples=1000)(model, task)) for repair in ("none", "obs"))  # type: ignore[arg-type]
    assert accuracy(model) > 0.9
    assert accuracy(repaired) > accuracy(plain) + 0.02


def test_values_that_are_not_finite_are_named():
    batches = [(torch.full((4, 2, 8, 8), torch.inf), None)]
    with pytest.raises(ModelError, match="0 reads values that aren't finite"):
        Weights(0.5, repair="obs", samples=4)(toy_net(), Task(batches, batches, batches))
