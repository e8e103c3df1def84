"""Movement pruning: what stays is what moves away from zero, counted exactly, and nothing of the machinery stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pared.core.errors import SettingsError, TrainingError
from pared.core.rules import Mask, add_rule, bake, find_rule
from pared.prune.movement import Movement, Scored
from pared.prune.selection import cubic
from pared.training import Journal, Task, Train
from pared.training.plan import make_optimizer


def toy_task(batches: int = 10, **settings: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(6, 8, generator=generator), torch.randint(0, 3, (6,), generator=generator)) for _ in range(batches)]
    return Task(data, data, data, **settings)


def toy_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def kept(model: nn.Module) -> int:
    return sum(int(rule.keep.sum()) for rule in model.modules() if isinstance(rule, Mask))


# --- the scores ---


def test_a_score_gets_the_gradient_of_the_masked_weight_times_the_weight():
    layer = nn.Linear(3, 2, bias=False)
    weight = layer.weight.detach().clone()
    keep = torch.tensor([[True, False, True], [False, True, False]])
    add_rule(layer, "weight", Scored(keep, weight))
    x, target = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    rules: Any = layer.parametrizations
    with torch.no_grad():
        rules.weight.original.copy_(weight)  # putting a mask on has set what it removes to zero
    outputs = layer(x)
    assert torch.equal(outputs, x @ (weight * keep).T)
    (0.5 * (outputs - target) ** 2).sum().backward()
    dense = ((x @ (weight * keep).T - target).T @ x).numpy()  # of the masked weight, in all places
    assert rules.weight[0].scores.grad.view(2, 3).numpy() == pytest.approx(dense * weight.numpy(), rel=1e-5)
    assert rules.weight.original.grad.numpy() == pytest.approx(dense * keep.numpy(), rel=1e-5)


def test_weight_decay_leaves_the_scores_alone():
    layer = nn.Linear(3, 2)
    add_rule(layer, "weight", Scored(torch.ones(2, 3, dtype=torch.bool), layer.weight.detach()))
    groups = make_optimizer(layer, Train(weight_decay=0.5)).param_groups
    rules: Any = layer.parametrizations
    scores = rules.weight[0].scores
    assert [group["weight_decay"] for group in groups if any(each is scores for each in group["params"])] == [0.0]


def test_a_rule_without_gradients_is_a_mask():
    rule = Scored(torch.tensor([True, False]), torch.zeros(2))
    with torch.no_grad():
        assert rule(torch.tensor([1.0, float("inf")])).tolist() == [1.0, 0.0]


# --- the method ---


def test_what_moves_away_from_zero_stays_and_the_large_that_shrinks_goes():
    # y = 2 x1: the first weight is small and has to grow, the second is large and has to go
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 2, generator=generator)
    batches = [(part, 2 * part[:, :1]) for part in inputs.split(8)]
    task = Task(batches, batches, batches, loss=nn.functional.mse_loss, metric=Distance())  # type: ignore[arg-type]
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 1.0]]))
    plan = Train(epochs=4, optimizer="sgd", learning_rate=0.02, momentum=0.0)
    small = bake(Movement(keep=0.5, train=plan, begin=0.2)(model, task))
    assert (small.weight != 0).tolist() == [[True, False]]
    assert small.weight[0, 0].item() > 1.0


class Distance:
    name, higher_is_better = "distance", False

    def __call__(self, outputs, targets):
        return (outputs - targets).square().mean(1)


@pytest.mark.parametrize("keep", [0, 0.1, 0.35, 1])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_count_is_exact_and_only_masks_are_left(keep, scope):
    model = toy_mlp()
    names = set(model.state_dict())
    small = Movement(keep=keep, scope=scope, train=Train(epochs=2, weight_decay=0.1))(model, toy_task())
    counts = [int((small[index].weight != 0).sum()) for index in (0, 2)]
    if scope == "layer":
        assert counts == [round(48 * keep + 1e-9), round(18 * keep + 1e-9)]
    assert sum(counts) == kept(small) == {0: 0, 0.1: 7, 0.35: 23, 1: 66}[keep]
    rules = [rule for module in small.modules() if isinstance(module, parametrize.ParametrizationList) for rule in module]
    assert [type(rule) for rule in rules] == [Mask, Mask]
    assert not list(small.buffers(recurse=False))
    assert len(list(small.parameters())) == len(list(model.parameters()))
    assert set(bake(small).state_dict()) == names


def test_the_count_falls_along_the_cubic_curve_over_the_batches_of_all_epochs():
    counts: list[int] = []

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "batch":
            counts.append(kept(watched[0]))

    watched: list[nn.Module] = []

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def fit(model, task, train, objective=None):
        from pared.training import fit as ordinary

        watched.append(model)
        ordinary(model, task, train, objective)

    Movement(keep=0.2, train=Train(epochs=2), begin=0.25, end=0.75)(toy_mlp(), toy_task(fit=fit, report=report, loss=loss))
    shares = [cubic(0.2, (done / 20 - 0.25) / 0.5) for done in range(20)]
    assert counts == [int(66 * share + 0.5) for share in shares]
    assert counts[:6] == [66] * 6
    assert counts[15:] == [13] * 5


def test_a_loop_of_the_users_own_that_stops_early_still_ends_at_the_count():
    seen: list[float] = []

    def fit(model, task, train, objective=None):
        assert objective is not None
        assert train.label_smoothing == 0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for inputs, targets in list(task.train)[:3]:
            optimizer.zero_grad()
            loss = objective(model, task.prepare(inputs), targets)
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # asking for the loss doesn't count
                seen.append(objective(model, task.prepare(inputs), targets).item())

    small = Movement(keep=0.3, train=Train(epochs=1, label_smoothing=0.1))(toy_mlp(), toy_task(fit=fit))
    assert len(seen) == 3
    assert kept(small) == 20


def test_removed_weights_of_earlier_steps_stay_away_and_tied_ones_count_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.out = model, nn.Linear(8, 3)

        def forward(self, x):
            return self.out(torch.relu(self.parts["b"](torch.relu(self.parts["a"](x)))))

    net = Net()
    first = torch.zeros(8, 8, dtype=torch.bool)
    first[:, :4] = True
    mask = Mask(first)
    add_rule(net.parts["a"], "weight", mask)
    add_rule(net.parts["b"], "weight", mask)
    small = Movement(keep=0.4, train="1ep")(net, toy_task())  # type: ignore[arg-type]
    rules = [find_rule(small.parts[name], "weight", Mask) for name in ("a", "b")]
    assert rules[0] is rules[1]
    assert kept(small) == 35  # two fifths of 64 + 24, a half rounded up
    assert not small.parts["a"].weight[:, 4:].any()
    assert kept(net) == 32


def test_frozen_weights_are_masked_and_stay_as_they_are():
    model = toy_mlp()
    model[0].weight.requires_grad_(False)
    small = Movement(keep=0.5, scope="layer", train="1ep")(model, toy_task())  # type: ignore[arg-type]
    mask = find_rule(small[0], "weight", Mask)
    assert isinstance(mask, Mask)
    assert int(mask.keep.sum()) == 24
    assert torch.equal(small[0].weight, model[0].weight * mask.keep)


def test_a_killed_training_goes_on_where_it_was(tmp_path):
    method = Movement(keep=0.3, train=Train(epochs=3, learning_rate=0.05))
    whole = method(toy_mlp(), toy_task())

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "batch" and event["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method(toy_mlp(), toy_task(journal=Journal(tmp_path), report=kill))
    resumed = method(toy_mlp(), toy_task(journal=Journal(tmp_path)))
    again = method(toy_mlp(), toy_task(journal=Journal(tmp_path)))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
        assert torch.equal(value, again.state_dict()[name])


def test_wrong_settings_are_named_together():
    with pytest.raises(SettingsError) as error:
        Movement(keep=2, train=Train(epochs=0, early_stop=1), scope="all", begin=-1, end=0, leave="0")  # type: ignore[arg-type]
    assert [problem.split(" must be ")[0] for problem in error.value.problems] == [
        f"prune.movement: {field}" for field in ("keep", "train.epochs", "train.early_stop", "scope", "begin", "end", "leave")
    ]
    with pytest.raises(SettingsError, match=r"begin must be less than end \(0.5\). Got 0.5"):
        Movement(begin=0.5, end=0.5)
    with pytest.raises(SettingsError, match=r"prune.movement: leave must be the path"):
        Movement(leave=("head",))(toy_mlp(), toy_task())
    with pytest.raises(SettingsError, match=r"prune.movement: Sequential has no convolution"):
        Movement()(nn.Sequential(nn.ReLU()), toy_task())
    with pytest.raises(TrainingError, match="loss is nan"):
        Movement(train="1ep")(toy_mlp(), toy_task(loss=lambda outputs, targets: outputs.sum() * float("nan")))  # type: ignore[arg-type]
