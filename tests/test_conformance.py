"""What every method promises, checked for every method on every kind of toy network.

A method that a recipe can name and that has no row here fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.architecture import LowRank, Separable
from pared.core.errors import SettingsError
from pared.core.method import Method, Recipe
from pared.core.rules import bake
from pared.core.seeds import seed_everything
from pared.distill import Decoupled, Generations, Hint, Logits, Mutual, Relations, Teach
from pared.dynamic import Exits
from pared.prune import Blocks, GroupLasso, GrowingRegularization, Movement, Neurons, Regrow, Weights
from pared.quantize import Bits, Clusters, Int8, Integers, Rate, Rounding
from pared.recipe.methods import METHODS, method_name, settings
from pared.recipe.yaml import dumps, loads
from pared.runtime import Engine, export
from pared.training import Task, Train

SAMPLES = 16


@dataclass(frozen=True)
class Row:
    """One method with the settings it is tried with.

    Args:
        method: the settings.
        wrong: a field with a value that the method refuses.
    """

    method: Any
    wrong: dict[str, Any] = field(default_factory=dict)


ONE = Train(epochs=1, learning_rate=0.01)
ROWS = {
    method_name(row.method): row
    for row in (
        Row(Neurons(keep=0.5, round_to=1, tune=ONE), {"keep": 1.5}),
        Row(Blocks(keep=0, tune=ONE), {"keep": 1.5}),
        Row(GroupLasso(strength=0.5, groups=("filters", "shapes"), train=ONE, tune=ONE), {"strength": -1}),
        Row(GrowingRegularization(keep=0.5, round_to=1, train=ONE, tune=ONE), {"growing": 0}),
        Row(Weights(keep=0.4, rounds=2, tune=ONE), {"rounds": 0}),
        Row(Movement(keep=0.4, train=ONE), {"keep": 1.5}),
        Row(Regrow(keep=0.4, train=ONE, every=1), {"fraction": 2}),
        Row(Teach(temperature=3.0, train=ONE, loss=Decoupled(), features=(Hint(), Relations())), {"temperature": -1}),
        Row(Generations(count=1, teach=Teach(loss=Logits(standardize=True), train=ONE)), {"count": 0}),
        Row(Mutual(train=ONE), {"peers": 0}),
        Row(Int8(calibration=SAMPLES), {"calibration": 0}),
        Row(Bits(weights=3, method="lsq", tune=ONE), {"weights": 1}),
        Row(Integers(weights=3, activations=3, tune=ONE, calibration=SAMPLES), {"weights": 1}),
        Row(Rounding(bits=3, samples=SAMPLES, equalize=True), {"bits": 1}),
        Row(Clusters(bits=2, convolution_bits=3, tune=ONE), {"bits": 0}),
        Row(Rate(price=0.01, train=Train(epochs=1)), {"price": -1}),
        Row(LowRank(rank=2, form="tucker", activations=True, tune=ONE), {"energy": 3}),
        Row(Separable(measured=False, samples=SAMPLES, tune=ONE), {"multiplier": 0}),
        Row(Exits(count=1, train=ONE), {"max_drop": -1}),
        Row(ONE, {"learning_rate": 0}),
    )
}


# --- toy networks ---


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.out(F.relu(x + self.block(x)).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)
        self.middle, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, y):
        return self.out(torch.relu(self.middle(torch.relu(self.left(x) + self.right(y)))))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x)))))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(72, 3)),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "mlp": (mlp, ((6,),)),
    "convnet": (convnet, ((2, 6, 6),)),
    "residual": (Residual, ((2, 6, 6),)),
    "depthwise": (depthwise, ((2, 6, 6),)),
    "two inputs": (TwoInputs, ((6,), (4,))),
    "shared": (Shared, ((6,),)),
}
CASES = pytest.mark.parametrize(("name", "network"), [(name, network) for name in ROWS for network in NETWORKS])


def case(network: str) -> tuple[nn.Module, Task]:
    """A fresh toy network that was trained a little, in mixed modes, and its task with itself as the teacher."""
    seed_everything(0)
    make, shapes = NETWORKS[network]
    model = make()
    inputs = tuple(torch.rand(SAMPLES, *shape) for shape in shapes)
    targets = torch.randint(0, 3, (SAMPLES,))
    batches = [
        (tuple(x[at : at + 8] for x in inputs) if len(inputs) > 1 else inputs[0][at : at + 8], targets[at : at + 8]) for at in (0, 8)
    ]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(*as_tuple(batch)), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    next(iter(model.children())).eval()  # flags of single modules must come through as well
    return model, Task(batches, batches, batches, teacher=model)


def as_tuple(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def apply(name: str, network: str) -> tuple[nn.Module, Task]:
    model, task = case(network)
    seed_everything(1)
    return ROWS[name].method(model, task), task


# --- promises ---


def test_every_method_of_a_recipe_has_a_row():
    assert {method_name(method) for method in METHODS} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_method_is_a_value(name):
    method = ROWS[name].method
    assert isinstance(method, Method)
    assert method == copy.deepcopy(method)
    with pytest.raises(AttributeError):
        method.anything = 1


@pytest.mark.parametrize("name", ROWS)
def test_settings_go_through_yaml_and_back(name):
    method = ROWS[name].method
    recipe = loads(dumps(Recipe(method)), "recipe.yaml")
    assert recipe.steps == (method,)
    assert settings(recipe.steps[0]) == settings(method)


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_value_is_named(name):
    wrong = ROWS[name].wrong
    where = "train" if name == "training.train" else name
    with pytest.raises(SettingsError, match=rf"{where}: {next(iter(wrong))} must be .*Got {next(iter(wrong.values()))}"):
        type(ROWS[name].method)(**wrong)


@CASES
def test_the_input_stays_as_it_is_and_the_same_seed_gives_the_same_network(name, network):
    model, task = case(network)
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    seed_everything(1)
    first = ROWS[name].method(model, task)
    assert first is not model
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert [type(module) for module in model.modules()] == classes
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in first.parameters()}
    second, _ = apply(name, network)
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


@CASES
def test_the_result_runs_and_takes_a_training_step(name, network):
    result, task = apply(name, network)
    inputs, targets = task.train[0]  # type: ignore[index]
    inputs = task.prepare(inputs)
    assert isinstance(result, nn.Module)
    with torch.no_grad():
        outputs = result.eval()(*inputs)
    assert outputs.shape == (8, 3)
    assert bool(torch.isfinite(outputs).all())
    result.train()
    trainable = [parameter for parameter in result.parameters() if parameter.requires_grad]
    assert trainable
    before = [parameter.detach().clone() for parameter in trainable]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    outputs = result(*inputs)
    exits = outputs if isinstance(outputs, list) else [outputs]
    torch.stack([task.loss(logits, targets) for logits in exits]).sum().backward()
    optimizer.step()
    assert any(not torch.equal(was, now) for was, now in zip(before, trainable, strict=True))


def check_file(name: str, network: str, folder: Any) -> None:
    result, task = apply(name, network)
    result = bake(result).eval()
    first = export(result, task.example_inputs(), folder / "first.onnx")
    second = export(result, task.example_inputs(), folder / "second.onnx")
    assert first.read_bytes() == second.read_bytes()
    inputs = tuple(torch.cat(parts) for parts in zip(*[task.prepare(x) for x, _ in task.train], strict=True))
    engine = Engine(first)
    for batch in (inputs, tuple(x[:1] for x in inputs)):
        with torch.no_grad():
            ours = result(*batch).numpy()
        theirs = engine.run(*(x.numpy() for x in batch))[0]
        # of an int8 network a value may be rounded the other way where it lies in the middle
        step = (max(ours.max(), 0) - min(ours.min(), 0)) / 255 if name in ("quantize.int8", "quantize.integers") else 0
        assert np.abs(ours - theirs).max() <= 1e-4 + 1.01 * step


@pytest.mark.parametrize("name", ROWS)
def test_the_file_answers_as_the_network(name, tmp_path):
    check_file(name, "convnet", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "network"), [(name, network) for name in ROWS for network in NETWORKS if network != "convnet"])
def test_all_files_answer_as_their_networks(name, network, tmp_path):
    check_file(name, network, tmp_path)
