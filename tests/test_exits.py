"""A network with exits stops where it is sure, and is trained at all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.core.errors import ModelError, SettingsError
from pared.dynamic import EarlyExit, Exits
from pared.dynamic.thresholds import NEVER
from pared.graph import Staged
from pared.training import Task, Train, evaluate
from test_exits_parts import Residual, build, mlp, toy_task

# --- the network ---


class Watched(nn.Module):
    """Passes its input on, scaled, and notes how many samples it saw."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.seen = scale, []

    def forward(self, x):
        self.seen.append(len(x))
        return x * self.scale


def watched(thresholds: list[float]) -> EarlyExit:
    return EarlyExit([Watched(), Watched(2), Watched(3)], [nn.Identity()] * 3, torch.tensor(thresholds)).eval()


def confidences(*values: float) -> Tensor:
    """Two-class logits of the given confidence in the first class."""
    p = torch.tensor(values)
    return torch.stack([torch.log(p / (1 - p)), torch.zeros(len(p))], 1)


def test_confident_samples_leave_and_the_order_stays():
    network = watched([0.9, 0.95])
    x = confidences(0.7, 0.99, 0.6, 0.85, 0.95)
    logits, exits = network.leave(x)
    # doubling the logits gives 0.84, -, 0.69, 0.97, -
    assert exits.tolist() == [2, 0, 2, 1, 0]
    assert torch.allclose(logits, x * torch.tensor([6.0, 1, 6, 2, 1])[:, None])
    assert [stage.seen for stage in network.stages] == [[5], [3], [2]]
    assert torch.equal(network(x), logits)


def test_later_stages_are_not_called_when_nobody_is_left():
    network = watched([0.0, 0.0])
    network(confidences(0.5, 0.9))
    assert [stage.seen for stage in network.stages] == [[2], [], []]
    network = watched([NEVER, NEVER])
    network(confidences(0.5, 1 - 1e-7))
    assert [stage.seen for stage in network.stages] == [[2], [2], [2]]


def test_a_confidence_equal_to_the_threshold_leaves_and_nan_goes_on():
    x = torch.zeros(2, 2)
    x[1] = float("nan")
    assert watched([0.5, NEVER]).leave(x)[1].tolist() == [0, 2]


def test_training_gives_all_logits():
    network = watched([0.0, 0.0]).train()
    x = confidences(0.5, 0.9)
    assert [torch.equal(each, x * scale) for each, scale in zip(network(x), (1, 2, 6), strict=True)] == [True] * 3


def test_parts_must_fit():
    with pytest.raises(ModelError, match="Got 2 stages, 1 heads"):
        EarlyExit([nn.Identity(), nn.Identity()], [nn.Identity()])
    with pytest.raises(ModelError, match=r"thresholds of shape \(2,\)"):
        EarlyExit([nn.Identity()] * 2, [nn.Identity()] * 2, torch.zeros(2))
    assert isinstance(watched([0.5, 0.5]), Staged)


def test_mean_macs_by_hand():
    stages = [nn.Linear(2, 4, bias=False), nn.Linear(4, 8, bias=False)]
    network = EarlyExit(stages, [nn.Linear(4, 2, bias=False), nn.Linear(8, 2, bias=False)], torch.tensor([0.9])).eval()
    with torch.no_grad():
        stages[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1.0], [0, 0], [0, 0]]))
        network.heads[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    # first stage and head: 2·4 + 4·2 = 16; second: 4·8 + 8·2 = 48 more
    assert network.exit_macs(torch.zeros(1, 2)) == [16, 64]
    batches = [
        (torch.tensor([[5.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0])),
        (torch.tensor([[0.0, 0.0], [0.0, 0.2]]), torch.tensor([0, 0])),
    ]
    task = Task(batches, batches, batches)
    assert network.mean_macs(task, "test") == (16 + 3 * 64) / 4
    network.thresholds.fill_(NEVER)
    assert network.mean_macs(task, "valid") == 64


# --- the method ---


def test_an_untrained_last_exit_is_the_network_itself():
    model, inputs = build("residual")
    network = Exits(count=2, train=Train(epochs=0))(model, toy_task((1, 8, 8)))
    assert torch.allclose(network.all_logits(*inputs)[-1], model.eval()(*inputs), atol=1e-6)


def test_loss_is_the_weighted_sum_of_all_exits():
    found = []

    def fit(model, task, train, objective=None):
        inputs, targets = task.train[0]
        logits = model.train()(*task.prepare(inputs))
        each = torch.stack([F.cross_entropy(z, targets) for z in logits])
        found.append((objective(model, task.prepare(inputs), targets).item(), each))

    task = toy_task((4,), fit=fit)
    Exits(count=2)(mlp(), task)
    Exits(count=2, weights=(1.0, 0.3, 2.0))(mlp(), task)
    assert found[0][0] == pytest.approx(found[0][1].sum().item())
    assert found[1][0] == pytest.approx((found[1][1] * torch.tensor([1.0, 0.3, 2.0])).sum().item())


def test_confidence_given_is_taken_as_it_is():
    assert Exits(count=2, confidence=0.75, train="1ep")(mlp(), toy_task((4,))).thresholds.tolist() == [0.75, 0.75]  # type: ignore[arg-type]


def test_named_places():
    task = toy_task((1, 8, 8))
    network = Exits(after=("blocks.0", "relu"), train="1ep")(Residual(), task)  # type: ignore[arg-type]
    assert len(network.stages) == 3
    assert [name for name, _ in network.stages[0].named_parameters()] == ["stem.weight", "stem.bias"]
    assert {name.split(".")[1] for name, _ in network.stages[1].named_parameters()} == {"0"}
    with pytest.raises(SettingsError, match=r"after must be the path of a module of the model. Got 'blocks.7'"):
        Exits(after=("blocks.7",))(Residual(), task)
    with pytest.raises(SettingsError, match=r"such are: relu, blocks.0, blocks.1, drop\). Got 'blocks.0.norm'"):
        Exits(after=("blocks.0.norm",))(Residual(), task)


def test_width_of_the_heads():
    network = Exits(count=1, width=5, train="1ep")(mlp(), toy_task((4,)))  # type: ignore[arg-type]
    assert [type(layer) for layer in network.heads[0]] == [nn.Linear, nn.ReLU, nn.Linear]


def test_mistakes_are_named():
    with pytest.raises(SettingsError) as error:
        Exits(after=(), count=0, confidence=2, max_drop=-1, weights=(1, 2, 3), width=0)
    fields = [problem.split(" must be ")[0].split(": ")[1] for problem in error.value.problems]
    assert fields == ["after", "count", "confidence", "max_drop", "weights", "width"]
    with pytest.raises(SettingsError, match="one number of at least 0 for each of the 3 exits"):
        Exits(after=("a", "b"), weights=(1, 1))
    with pytest.raises(SettingsError, match="has exits already"):
        Exits()(watched([0.5, 0.5]), toy_task((2,)))
    with pytest.raises(SettingsError, match="count must be at most 2"):
        Exits(count=3)(mlp(), toy_task((4,)))


def test_lower_is_better():
    class Error:
        name = "error"
        higher_is_better = False

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs.argmax(1) != targets).float()

    task = toy_task((4,), samples=40, metric=Error())
    network = Exits(count=1, train=Train(epochs=20, learning_rate=0.05))(mlp(), task)
    last = copy.deepcopy(network)
    last.thresholds.fill_(NEVER)
    assert evaluate(network, task, "valid") <= evaluate(last, task, "valid")
