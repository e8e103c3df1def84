from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pared import prune
from pared.core.errors import SettingsError
from pared.lab.coverage.distinct import distinct_values, make_distinct, settle_batch_norms
from pared.lab.coverage.models import LIST, names
from pared.lab.coverage.oracle import NotComparable, compare, reference, survivors
from pared.lab.coverage.run import Coverage, outcome


def convnet() -> nn.Sequential:
    body = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4 * 9, 3)).eval()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.one, self.two, self.leave = (
            nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.two(torch.sigmoid(self.one(self.norm(x)))))


@pytest.mark.parametrize("shape", [(1,), (2,), (7, 3), (64, 64, 3, 3), (3, 0)])
def test_values_are_distinct_and_keep_their_size(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    before = torch.randn(shape, generator=generator) * 0.1
    after = distinct_values(before, generator)
    assert after.shape == before.shape
    assert len(np.unique(np.abs(after.numpy()))) == before.numel()
    if before.numel() > 100:
        assert 0.7 < float(after.std() / before.std()) < 1.5
        assert abs(float(after.mean())) < 0.1 * float(after.std())


def test_constants_keep_their_sign_and_zeros_get_a_size() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(distinct_values(torch.ones(50), generator).min()) > 0.2
    for tiny in (torch.zeros(50), torch.full((50,), 1e-6), torch.randn(50) * 1e-6):
        assert 0.02 < float(distinct_values(tiny, generator).abs().max()) < 0.5
    assert float(distinct_values(torch.zeros(50), generator).min()) < 0
    assert 0.05 < float(distinct_values(torch.full((20, 100), -0.001), generator).std()) < 0.2


def test_all_parameters_of_a_model_are_filled_by_the_seed() -> None:
    first = convnet()
    second, other = copy.deepcopy(first), copy.deepcopy(first)
    make_distinct(first, 1)
    make_distinct(second, 1)
    make_distinct(other, 2)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    scale = nn.Module()
    scale.scale = nn.Parameter(torch.tensor([2.5]))
    make_distinct(scale, 0)
    assert scale.scale.item() == 2.5


def test_batch_norms_settle_and_get_their_momentum_back() -> None:
    model = convnet()
    settle_batch_norms(model, (torch.randn(2, 2, 5, 5),))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.momentum == 0.1
    assert float(norm.running_mean.abs().max()) > 0  # type: ignore[union-attr]
    assert not model.training


def gather(model: nn.Sequential, kept: list[int]) -> nn.Sequential:
    """By hand: keep some of the first convolution's channels, the same number for each group that reads them."""
    small = copy.deepcopy(model)
    first, norm, second = small[0], small[1], small[3]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(second, nn.Conv2d)
    first.weight, first.bias = nn.Parameter(first.weight[kept]), nn.Parameter(first.bias[kept])  # type: ignore[index]
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(getattr(norm, name)[kept]))
    norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]  # type: ignore[index]
    left, right = [k for k in kept if k < 3], [k - 3 for k in kept if k >= 3]
    second.weight = nn.Parameter(torch.cat([second.weight[:2][:, left], second.weight[2:][:, right]]))
    return small


def test_a_right_cut_is_found_right_and_a_wrong_one_wrong() -> None:
    model = convnet()
    make_distinct(model, 0)
    settle_batch_norms(model, (torch.randn(2, 2, 5, 5),))
    batches = [(torch.randn(2, 2, 5, 5),), (torch.randn(3, 2, 5, 5),)]
    small = gather(model, [0, 2, 3, 5])
    alive = survivors(model, small)
    assert alive["0.bias"].tolist() == [True, False, True, True, False, True]
    assert set(alive) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}
    found = compare(reference(model, alive), small, batches)
    assert found.equal
    assert found.error < 1e-12
    assert found.precision == "float64"
    assert found.variation > 0.01
    # the same channels are kept, but the layer that reads them keeps another column
    wrong = copy.deepcopy(small)
    wrong[3].weight = nn.Parameter(torch.cat([model[3].weight[:2][:, [0, 1]], model[3].weight[2:][:, [0, 2]]]))  # type: ignore[index,operator]
    found = compare(reference(model, survivors(model, wrong)), wrong, batches)
    assert not found.equal
    assert found.error > 1e-3


def test_a_reordered_cut_is_wrong_unless_all_is_reordered() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    make_distinct(model, 0)
    small = copy.deepcopy(model)
    order = [2, 0]
    for parameter in ("weight", "bias"):
        setattr(small[0], parameter, nn.Parameter(getattr(model[0], parameter)[order]))
    small[2].weight = nn.Parameter(model[2].weight[:, order])  # type: ignore[index]
    batches = [(torch.randn(4, 3),)]
    assert compare(reference(model, survivors(model, small)), small, batches).equal
    small[2].weight = nn.Parameter(model[2].weight[:, [0, 2]])  # type: ignore[index]
    assert not compare(reference(model, survivors(model, small)), small, batches).equal


def test_norms_look_at_kept_channels_only() -> None:
    model = Block().eval()
    make_distinct(model, 0)
    batches = [(torch.randn(2, 4),), (torch.randn(3, 4),)]
    for norms in (False, True):
        small = prune.cut(model, torch.randn(2, 4), keep=0.5, norms=norms)
        alive = survivors(model, small)
        assert ("norm.weight" in alive) == norms
        assert compare(reference(model, alive), small, batches).equal
    # twin by hand: the reference's norm on the kept channels
    kept = alive["norm.weight"].numpy()
    norm = reference(model, alive).norm
    x = torch.randn(5, 8)
    part = x.numpy()[:, kept]
    expected = (part - part.mean(1, keepdims=True)) / np.sqrt(part.var(1, keepdims=True) + 1e-5)
    expected = expected * model.norm.weight.detach().numpy()[kept] + model.norm.bias.detach().numpy()[kept]
    got = norm(x).detach().numpy()
    np.testing.assert_allclose(got[:, kept], expected, rtol=1e-4, atol=1e-5)
    assert not got[:, ~kept].any()


def test_changed_or_missing_weights_are_not_comparable() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    make_distinct(model, 0)
    small = copy.deepcopy(model)
    small[0].weight.data *= 1.5
    with pytest.raises(NotComparable, match="doesn't have"):
        survivors(model, small)
    with pytest.raises(NotComparable, match="is gone"):
        survivors(model, nn.Linear(3, 4))


def part(**changes: Any) -> dict[str, Any]:
    usual = {"equal": True, "error": 1e-6, "variation": 0.5, "finite": True, "shapes": True, "share": 1.0, "macs": 30, "not_exact": []}
    return {**usual, "seconds": 1.0, **changes}


def row(pared: dict[str, Any], other: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"key": "m seed 0", "pared": {"macs_before": 100, **pared}, "torch-pruning": {"macs_before": 100, **(other or part())}}


LAYER, MEAN = "a norm (aten.layer_norm.default", "a mean (aten.mean.dim"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"exact": part()}, ("passed", "")),
        ({"exact": part(equal=False, error=0.5)}, ("wrong outputs", "relative error 0.5")),
        ({"exact": part(not_exact=[LAYER]), "norms": part(equal=False, not_exact=[LAYER])}, ("wrong outputs", "relative error 1e-06")),
        ({"exact": part(not_exact=[MEAN]), "norms": part(equal=False, not_exact=[MEAN])}, ("not judged", "a statistic")),
        ({"exact": part(not_exact=[MEAN]), "norms": part(equal=False, finite=False, not_exact=[MEAN])}, ("wrong outputs", "")),
        ({"exact": part(equal=False, not_exact=[MEAN])}, ("wrong outputs", "")),
        ({"exact": part(), "stage": "train", "failure": "ValueError: x"}, ("failed", "train: ValueError: x")),
        ({"stage": "exact: cut", "failure": "more than 9 s (SIGXCPU)"}, ("limit", "exact: cut: more than")),
        ({"exact": part(macs=70)}, ("failed", "MACs fell by 30% only")),
        ({"exact": part(macs=70, share=0.5)}, ("passed", "")),
        ({"exact": part(variation=0.0, error=0.0)}, ("not judged", "the outputs hardly depend")),
        ({"exact": part(variation=1e-3, error=1e-6)}, ("not judged", "the outputs hardly depend")),
        ({"exact": part(variation=1e-4, error=1e-12)}, ("passed", "")),
    ],
)
def test_outcomes(found: dict[str, Any], expected: tuple[str, str]) -> None:
    word, why = outcome(row(found), "pared")
    assert word == expected[0]
    assert why.startswith(expected[1])


def test_the_other_tool_is_judged_by_the_same_rule() -> None:
    exact = {"exact": part(not_exact=[LAYER])}
    assert outcome(row(exact, part(equal=False)), "torch-pruning")[0] == "wrong outputs"
    assert outcome(row({"exact": part(not_exact=[MEAN])}, part(equal=False)), "torch-pruning")[0] == "not judged"
    assert outcome(row({"exact": part()}, part(not_comparable="gone", equal=False)), "torch-pruning") == ("wrong outputs", "gone")


def test_the_verdict_counts() -> None:
    experiment = Coverage(only=names()[:1])
    good, bad = row({"exact": part()}), row({"exact": part(equal=False)})
    failed = row({"stage": "exact: cut", "failure": "CaptureError: no"})
    assert experiment.verdict([good] * 19 + [failed]).outcome == "reproduced"
    assert experiment.verdict([good] * 17 + [failed] * 3).outcome == "partly reproduced"
    found = experiment.verdict([good] * 19 + [bad])
    assert found.outcome == "did not reproduce"
    assert found.text.startswith("19 of 20 models passed (95.0%), 1 gave wrong outputs.")
    assert ("passed", "19", "20") in found.figures
    assert experiment.verdict([failed]).figures[-1] == ("median seconds, 0 models", "–", "–")


def test_settings_are_checked_together() -> None:
    with pytest.raises(SettingsError) as caught:
        Coverage(keep=2, seeds=(), only=("lenet",), tools=("scissors",))
    assert len(caught.value.problems) == 4


def test_the_list_names_each_model_once() -> None:
    listed = json.loads(LIST.read_text())
    assert sorted(listed) == sorted(names())
    assert {"torchvision:resnet18", "torchvision:fcn_resnet50", "torchvision:raft_small", "torchvision:r3d_18"} <= set(listed)
    assert sum(name.startswith("torchvision:") for name in listed) >= 85
    assert listed[names()[0]] < listed[names()[-1]]


def test_a_missing_library_is_a_clear_failure(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; sys.modules['timm'] = None; from pared.lab.coverage.worker import work\n"
    code += "work('pared', 'timm:test_vit', 0, 0.5, 60, Path(sys.argv[1]))"
    file = tmp_path / "now.json"
    assert subprocess.run([sys.executable, "-c", code, str(file)], check=False).returncode == 1
    failure = json.loads(file.read_text())["failure"]
    assert failure.startswith("ModelError: This experiment needs timm")
    assert "pip install" in failure


class StdConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.flatten(1)
        weight = (weight - weight.mean(1, keepdim=True)) / (weight.var(1, keepdim=True) + 1e-4).sqrt()
        return nn.functional.conv2d(input, weight.reshape(self.weight.shape), self.bias, groups=self.groups)


def test_standardised_weights_look_at_kept_inputs_only() -> None:
    body = [StdConv(3, 6, 3), nn.ReLU(), StdConv(6, 4, 3), StdConv(4, 6, 1, groups=2), nn.ReLU(), StdConv(6, 4, 1, groups=2)]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(4 * 4, 2)).eval()
    make_distinct(model, 0)
    small = copy.deepcopy(model)
    kept = [1, 4, 5]
    small[0].weight, small[0].bias = nn.Parameter(model[0].weight[kept]), nn.Parameter(model[0].bias[kept])  # type: ignore[index]
    small[2].weight = nn.Parameter(model[2].weight[:, kept])  # type: ignore[index]
    # of each group another two of three channels
    small[3].weight, small[3].bias = nn.Parameter(model[3].weight[[0, 2, 3, 4]]), nn.Parameter(model[3].bias[[0, 2, 3, 4]])  # type: ignore[index]
    parts = [model[5].weight[:2][:, [0, 2]], model[5].weight[2:][:, [0, 1]]]  # type: ignore[index]
    small[5].weight = nn.Parameter(torch.cat(parts))
    batches = [(torch.randn(2, 3, 6, 6),)]
    assert compare(reference(model, survivors(model, small)), small, batches).equal


def test_a_forward_that_fixes_float32_is_compared_in_float32() -> None:
    class Fixed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.float())

    model = Fixed(3, 2)
    found = compare(model, copy.deepcopy(model), [(torch.randn(2, 3),)])
    assert found.equal
    assert found.precision == "float32"
