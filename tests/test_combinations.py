"""Everything combines: whatever step comes after a cut that the user's class could not follow, it works as on any network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pared import Task, bake, data
from pared.architecture import LowRank
from pared.architecture.nets import resnet8
from pared.core.errors import ModelError
from pared.core.method import Method
from pared.distill import Teach
from pared.dynamic import EarlyExit, Exits
from pared.graph.rewritten import Rewritten
from pared.prune import Neurons, Random, Weights
from pared.quantize import Int8
from pared.runtime import Engine, export
from pared.training import Train

STEPS: dict[str, Method] = {
    "neurons": Neurons(keep=0.6, importance=Random(3), round_to=1),
    "weights": Weights(keep=0.5),
    "teach": Teach(train=Train(epochs=1)),
    "low rank": LowRank(keep=0.6),
    "exits": Exits(train=Train(epochs=1)),
    "int8": Int8(),
}


@pytest.fixture(scope="module")
def task() -> Task:
    few = data.load("digits")
    some = [next(iter(few.train))]
    torch.manual_seed(0)
    original = resnet8(channels=1, size=8)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return dataclasses.replace(few, train=some, valid=some, test=some, teacher=original)


@pytest.fixture(scope="module")
def cut(task: Task) -> nn.Module:
    """A cut by chance: the shortcut's zeros no longer lie alike on both sides, which the class can't express."""
    assert task.teacher is not None
    return Neurons(keep=0.6, importance=Random(1), round_to=1)(task.teacher, task)


def test_a_rewritten_network_still_has_torchs_layers(cut: nn.Module, task: Task) -> None:
    assert isinstance(cut, Rewritten)
    assert task.teacher is not None
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    before = {path: type(module) for path, module in task.teacher.named_modules() if isinstance(module, kinds)}
    assert {path: type(module) for path, module in cut.named_modules() if isinstance(module, kinds)} == before
    convolution = cut.get_submodule("stage2.0.conv1")
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.weight.shape[:2] == (convolution.out_channels, convolution.in_channels)
    assert set(cut.state_dict()) == set(task.teacher.state_dict())


def test_a_layers_own_flag_counts_in_a_rewritten_network(cut: nn.Module, task: Task) -> None:
    norm = cut.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    counted = int(norm.num_batches_tracked or 0)
    cut.train()
    cut(*task.example_inputs(4))
    norm.eval()
    cut(*task.example_inputs(4))
    cut.eval()
    assert int(norm.num_batches_tracked or 0) == counted + 1


@pytest.mark.parametrize("name", STEPS)
def test_a_step_after_a_rewriting_cut(name: str, cut: nn.Module, task: Task, tmp_path: Path) -> None:
    result = bake(STEPS[name](cut, task)).eval()
    inputs = task.example_inputs(4)
    if isinstance(result, EarlyExit):
        assert result(*inputs).shape == (4, 10)
        return
    found = Engine(export(result, inputs, tmp_path / "small.onnx")).run(*(x.numpy() for x in inputs))[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, result(*inputs).numpy(), atol=1e-5 if name != "int8" else 0.5)


def test_masks_outlive_a_rewriting_cut(task: Task) -> None:
    assert task.teacher is not None
    pruned = Weights(keep=0.5)(task.teacher, task)
    result = Neurons(keep=0.6, importance=Random(1), round_to=1, tune="1ep")(pruned, task)
    assert isinstance(result, Rewritten)
    baked = bake(result)
    assert not any("parametrizations" in name for name in baked.state_dict())
    share = [float((module.weight == 0).float().mean()) for module in baked.modules() if isinstance(module, nn.Conv2d)]
    assert sum(share) / len(share) > 0.2


def test_neurons_can_not_be_cut_after_exits(task: Task) -> None:
    network = EarlyExit([nn.Flatten(), nn.Linear(64, 10)], [nn.Linear(64, 10), nn.Identity()])
    with pytest.raises(ModelError, match=r"before dynamic\.exits"):
        Neurons()(network, task)
