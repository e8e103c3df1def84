"""Depth: which blocks are found, that removing one is exact where its branch gives zero, and which go first."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.core.errors import DataError, SettingsError
from pared.core.seeds import seed_everything
from pared.graph.capture import capture
from pared.graph.depth import Shortened, find_blocks, shorten
from pared.prune import Blocks, Removal, Similarity
from pared.prune.blocks import change, goal, lowest_blocks
from pared.runtime import Engine, export
from pared.training import Task, Train, evaluate


class Basic(nn.Module):
    """ResNet's block, with everything in place."""

    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.c2, self.n2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(ins, outs, 1, stride) if ins != outs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.n2(self.c2(self.act(self.n1(self.c1(x)))))
        y += x if self.down is None else self.down(x)
        return self.act(y)


class ResNet(nn.Module):
    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2) if pool else nn.Identity()
        self.body = nn.Sequential(Basic(4, 4), Basic(4, 4), Basic(4, 8, 2), Basic(8, 8))
        self.f = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.body(self.pool(F.relu(self.stem(x)))).mean((2, 3)))


class InForward(nn.Module):
    """Sums in the model's own forward: a batch norm and dropout in the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.f = nn.Linear(4, 8), nn.Linear(8, 4)
        self.a, self.n, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        x = x + self.n(self.a(x.relu()))
        x = x + self.b(F.dropout(x.relu(), 0.5, self.training))
        return self.f(x)


class Transformer(nn.Module):
    def __init__(self, norm_first: bool = True, masked: bool = False) -> None:
        super().__init__()
        self.masked, self.e, self.f = masked, nn.Embedding(9, 8), nn.Linear(8, 4)
        self.t = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.e(x)
        for layer in self.t:
            y = layer(y, src_key_padding_mask=x == 0) if self.masked else layer(y)
        return self.f(y.mean(1))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.f = nn.Linear(4, 8), nn.Linear(8, 4)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        y = self.a(x)
        y = y + self.b(y.relu())
        return self.f(x + self.c(y))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.f = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        for _ in range(3):
            x = x + self.a(x).relu()
        return self.f(x)


class NotBlocks(nn.Module):
    """A branch that is read elsewhere, a projected shortcut, a second input that is learned, a scaled sum, a sum without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(5))
        self.f = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.i(x)
        y = self.a(z)
        u = z + y  # y is read below
        v = self.b(u) + self.c(u)  # neither starts from the other
        w = v + self.d(v * y)  # y comes from the side
        w = torch.add(w, self.d(w), alpha=2)
        w = w + w.relu()
        return self.f(torch.cat([w, y, v], 1))


IMAGES, TOKENS, VECTORS = torch.Size((3, 8, 8)), torch.Size((5,)), torch.Size((4,))
LAYER = ["{}.norm1, {}.self_attn", "{}.norm2, {}.linear1, {}.linear2"]
CASES = {
    "resnet": (ResNet, IMAGES, ["body.0", "body.1", "body.3"]),
    "pooled": (lambda: ResNet(pool=True), IMAGES, ["body.0", "body.1", "body.3"]),
    "in forward": (InForward, VECTORS, ["a, n", "b"]),
    "pre-norm": (Transformer, TOKENS, [name.replace("{}", f"t.{layer}") for layer in range(2) for name in LAYER]),
    "masked": (lambda: Transformer(masked=True), TOKENS, [name.replace("{}", f"t.{layer}") for layer in range(2) for name in LAYER]),
    "post-norm": (
        lambda: Transformer(norm_first=False),
        TOKENS,
        [name for layer in range(2) for name in (f"t.{layer}.self_attn", f"t.{layer}.linear1, t.{layer}.linear2")],
    ),
    "nested": (Nested, VECTORS, ["b", "a, b, c"]),
    "shared": (Shared, VECTORS, ["a", "a (2)", "a (3)"]),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    seed_everything(0)
    make, shape, _ = CASES[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None
            module.running_mean.normal_()
    return model.eval(), torch.randint(0, 9, (3, *shape)) if shape == TOKENS else torch.randn(3, *shape)


def without(model: nn.Module, x: Tensor, *places: int) -> Shortened:
    return shorten(model, x, lambda _, blocks: [blocks[place] for place in places])


def silenced(model: nn.Module, name: str) -> nn.Module:
    """A copy in which the last layer of a branch is zero."""
    quiet = copy.deepcopy(model)
    last = quiet.get_submodule(name.split(" (")[0].split(", ")[-1])
    for parameter in getattr(last, "out_proj", getattr(last, "n2", last)).parameters():
        nn.init.zeros_(parameter)
    return quiet


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_found_in_order_with_names(name: str) -> None:
    model, x = build(name)
    assert [block.name for block in find_blocks(capture(model, x))] == CASES[name][2]
    assert [block.name for block in find_blocks(capture(model, x, train=True))] == CASES[name][2]


def test_what_is_no_block_is_not_found() -> None:
    assert find_blocks(capture(NotBlocks(), torch.randn(2, 8))) == ()


@pytest.mark.parametrize("name", CASES)
def test_a_block_whose_branch_gives_zero_goes_without_a_change(name: str) -> None:
    model, x = build(name)
    for place, block in enumerate(CASES[name][2]):
        quiet = silenced(model, block)
        places = range(3) if name == "shared" else (place,)
        found = without(quiet, x, *places)
        for batch in (x, x[:1], torch.cat([x, x])):
            torch.testing.assert_close(run(found.model, batch), run(quiet, batch), rtol=0, atol=1e-5)
        assert found.removed == (tuple(CASES[name][2]) if name == "shared" else (block,))
        gone = sum(p.numel() for p in quiet.parameters()) - sum(p.numel() for p in found.model.parameters())
        assert gone > 0


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_an_ordinary_module_that_trains(name: str, tmp_path: Path) -> None:
    model, x = build(name)
    before = copy.deepcopy(model.state_dict())
    found = without(model.train(), x, 0)
    assert found.model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert set(found.model.state_dict()) <= set(before)
    twin = copy.deepcopy(found.model)
    twin(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    counts = [buffer for key, buffer in twin.named_buffers() if key.endswith("num_batches_tracked")]
    assert all(int(count) == 1 for count in counts)
    small = found.model.eval()
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    torch.testing.assert_close(run(twin.eval(), x), run(small, x), rtol=0, atol=0)
    answer = Engine(export(small, (x,), tmp_path / "small.onnx")).run(x.numpy())[0]
    torch.testing.assert_close(torch.from_numpy(answer), run(small, x), rtol=1e-4, atol=1e-5)


def test_a_module_that_is_a_block_becomes_nothing_in_the_users_own_class() -> None:
    model, x = build("resnet")
    found = without(model, x, 0, 2)
    assert found.own_class
    assert isinstance(found.model, ResNet)
    assert [type(part).__name__ for part in found.model.body] == ["Identity", "Basic", "Basic", "Identity"]
    model, x = build("pooled")
    assert isinstance(without(model, x, 0).model.get_submodule("body.0"), nn.ReLU)  # what is pooled isn't known to be rectified
    model, x = build("pre-norm")
    assert isinstance(without(model, x, 0, 1).model.get_submodule("t.0"), nn.Identity)
    assert not without(model, x, 0).own_class


def test_what_a_removed_block_alone_read_is_gone_and_shared_weights_stay() -> None:
    model, x = build("in forward")
    assert set(without(model, x, 0).model.state_dict()) == {"i.weight", "i.bias", "b.weight", "b.bias", "f.weight", "f.bias"}
    kept = without(model, x, 1).model.state_dict()
    assert {key for key in kept if key.startswith("n.")} == {key for key in model.state_dict() if key.startswith("n.")}
    model, x = build("shared")
    assert set(without(model, x, 0, 2).model.state_dict()) == set(model.state_dict())


def test_dropout_drops_in_the_rest_of_a_rewritten_network() -> None:
    model, x = build("in forward")
    small = without(model.train(), x, 0).model
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


def test_blocks_are_found_again_in_the_result() -> None:
    for name in ("in forward", "pre-norm", "resnet"):
        model, x = build(name)
        small = without(model, x, 0).model
        before, after = (find_blocks(capture(net, x)) for net in (model, small))
        assert [block.modules for block in after] == [block.modules for block in before][1:]


def test_an_input_that_becomes_the_output_of_a_block_is_not_written_to() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.f = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(F.relu_(x + self.a(x)))

    model, x = First(), -torch.ones(2, 4)
    small = without(model, x, 0).model
    small(x)
    assert torch.equal(x, -torch.ones(2, 4))


# --- the choice ---


def test_change_is_one_minus_the_cosine() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 5))
    cosine = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    found = change(torch.from_numpy(a), torch.from_numpy(b), 1)
    np.testing.assert_allclose(found.numpy(), 1 - cosine, atol=1e-12)
    assert change(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])).item() == pytest.approx(2)
    assert change(torch.zeros(2), torch.ones(2)).item() == 1
    assert change(torch.zeros(2), torch.zeros(2)).item() == 0


def test_counts_are_exact_whatever_the_ties() -> None:
    alone = [frozenset[int]()] * 5
    for count in range(6):
        assert lowest_blocks(np.zeros(5), count, alone) == list(range(5 - count, 5))
    assert lowest_blocks(np.array([0, np.inf, 0, 1, 1]), 5, alone) == [0, 2, 3, 4]
    outer = [frozenset({1, 2}), *alone[1:]]
    assert lowest_blocks(np.array([0, 1, 2, 3, 4.0]), 3, outer) == [0, 1, 2]
    assert lowest_blocks(np.array([0, 1, 2, 3, 4.0]), 2, outer) == [1, 2]
    assert lowest_blocks(np.array([0, 1, np.inf, 3, 4.0]), 4, outer) == [1, 3, 4]
    assert [goal(Blocks(keep=keep), 4, 1) for keep in (0, 0.5, 0.6, 1)] == [4, 2, 1, 0]
    assert [goal(Blocks(remove=5, rounds=3), 8, number) for number in (1, 2, 3)] == [2, 4, 5]


class Line(nn.Module):
    """Three blocks of which the second changes nothing and the first little; the answer fits on paper."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.a.weight.data = torch.tensor([[0.0, 0.0], [0.1, 0.0]])
        self.b.weight.data = torch.zeros(2, 2)
        self.c.weight.data = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.b(x)
        return x + self.c(x)


def line_task(**more: object) -> Task:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    batches = [(x[:2], torch.tensor([1, 1])), (x[2:], torch.tensor([1, 1]))]
    return Task(batches, batches, batches, **more)  # type: ignore[arg-type]


def test_similarity_is_that_on_paper() -> None:
    model, task = Line(), line_task()
    captured = capture(model, task.example_inputs())
    scores = Similarity()(captured, find_blocks(captured), task)
    # (1, 0) -> (1, 0.1) -> (1, 0.1) -> (0, 1.1)
    np.testing.assert_allclose(scores, [1 - 1 / np.sqrt(1.01), 0, 1 - 0.1 / np.sqrt(1.01)], atol=1e-7)
    assert np.array_equal(scores, Similarity()(captured, find_blocks(captured), task))


def test_removal_is_the_metric_that_is_lost() -> None:
    model, task = Line(), line_task()
    captured = capture(model, task.example_inputs())
    assert evaluate(model, task) == 1
    assert Removal()(captured, find_blocks(captured), task).tolist() == [0, 0, 1]


def test_the_least_blocks_go_and_an_event_says_so() -> None:
    events: list[dict[str, object]] = []
    small = Blocks(keep=0.34, rounds=2)(Line(), line_task(report=events.append))
    assert set(small.state_dict()) == {"a.weight", "c.weight"}
    assert [event["removed"] for event in events] == [["b"]]
    assert (events[0]["macs"], events[0]["original_macs"]) == (8, 12)
    small = Blocks(remove=2, rounds=2, importance=Removal())(Line(), line_task(report=events.append))
    assert set(small.state_dict()) == {"c.weight"}
    assert [event["removed"] for event in events[1:]] == [["b"], ["a"]]
    assert set(Blocks(keep=0)(Line(), line_task()).state_dict()) == set()
    assert set(Blocks(keep=1)(Line(), line_task()).state_dict()) == set(Line().state_dict())
    assert set(Blocks(remove=2, leave=["b"])(Line(), line_task()).state_dict()) == {"b.weight"}


def test_what_is_left_is_tuned_after_every_round() -> None:
    events: list[dict[str, object]] = []
    model = Line()
    first = Blocks(remove=2, rounds=2, tune=Train(epochs=1, learning_rate=0.1))(model, line_task(report=events.append))
    assert [event["event"] for event in events if event["event"] in ("blocks", "epoch")] == ["blocks", "epoch"] * 2
    second = Blocks(remove=2, rounds=2, tune=Train(epochs=1, learning_rate=0.1))(model, line_task())
    assert list(first.state_dict()) == list(second.state_dict())


def test_a_network_without_blocks_comes_back_as_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    same = Blocks(keep=0.5)(model, line_task())
    assert same is not model
    assert torch.equal(same[0].weight, model[0].weight)  # type: ignore[index]
    assert "no residual blocks" in caplog.text


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(SettingsError, match=r"keep must be .*Got 1\.5") as error:
        Blocks(keep=1.5, remove=-1, importance="similar", rounds=0, leave="a")  # type: ignore[arg-type]
    assert all(f"prune.blocks: {name} must be" in str(error.value) for name in ("keep", "remove", "importance", "rounds", "leave"))
    with pytest.raises(SettingsError, match="samples must be"):
        Similarity(samples=0)
    with pytest.raises(SettingsError, match=r"no block has a module 'z'\. Blocks are a, b, c"):
        Blocks(leave=("z",))(Line(), line_task())
    with pytest.raises(SettingsError, match="remove must be at most 3"):
        Blocks(remove=4)(Line(), line_task())
    empty = Task([(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))], line_task().valid, line_task().test)
    with pytest.raises(DataError, match="no samples"):
        Blocks(keep=0.5)(Line(), empty)
