"""Unlabelled inputs that lie in installed packages: crops of photos, sentences of Python's own documentation."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pared.core.errors import DataError, ModelError

SIDE = 224
WORDS = (10, 40)
"""Of a sentence: fewer is a heading, more is cut off at 32 tokens."""

# folder inside its package, and what is read of it; photos of one scene count once
_SCIKIT_IMAGE, _SCIKIT_LEARN = ("skimage", "data"), ("sklearn", "datasets/images")
EVALUATION_PHOTOS = (
    (_SCIKIT_IMAGE, ("astronaut.png", "camera.png", "coffee.png", "coins.png", "gravel.png", "ihc.png", "rocket.jpg")),
    (_SCIKIT_LEARN, ("china.jpg",)),
)
CALIBRATION_PHOTOS = (
    (
        _SCIKIT_IMAGE,
        (
            "brick.png", "cell.png", "chelsea.png", "clock_motion.png", "grass.png", "hubble_deep_field.jpg", "moon.png",
            "motorcycle_left.png", "page.png", "retina.jpg", "text.png",
        ),
    ),
    (_SCIKIT_LEARN, ("flower.jpg",)),
)  # fmt: skip


def paths(photos: Sequence[tuple[tuple[str, str], tuple[str, ...]]]) -> list[Path]:
    """The files of photos, without importing their packages.

    Raises:
        ModelError: if a package isn't installed.
        DataError: if a photo isn't in it.
    """
    found = []
    for (package, folder), names in photos:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"lab.repair_without_labels takes photos of {package}, which isn't installed. Run: pip install scikit-image scikit-learn"
            )
        found += [Path(spec.submodule_search_locations[0]) / folder / name for name in names]
    missing = [str(path) for path in found if not path.exists()]
    if missing:
        raise DataError(f"{missing[0]}: the photo is not there. Install another version of its package.")
    return found


def crop_box(width: int, height: int, least: float, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """A random crop as (left, upper, right, lower): `least` to 1 of the area, sides at 3 : 4 to 4 : 3; the middle if ten tries don't fit.

    >>> crop_box(40, 30, 0.3, np.random.default_rng(0))[2] <= 40
    True
    """
    for _ in range(10):
        area = width * height * generator.uniform(least, 1.0)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        wide, high = float(np.sqrt(area * ratio)), float(np.sqrt(area / ratio))
        if wide <= width and high <= height:
            left, upper = generator.uniform(0, width - wide), generator.uniform(0, height - high)
            return left, upper, left + wide, upper + high
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def crops(files: Sequence[Path], count: int, seed: int, least: float = 0.3) -> Tensor:
    """Random crops, of each photo as many up to one: shape (count, 3, 224, 224), pixels in [0, 1], half of them mirrored.

    Args:
        files: of the photos.
        count: of the crops.
        seed: of what is drawn.
        least: the smallest crop's share of its photo.

    Raises:
        ModelError: without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ModelError(f"lab.repair_without_labels reads photos by Pillow ({error}). Run: pip install pillow") from None
    generator = np.random.default_rng(seed)
    photos = [Image.open(file).convert("RGB") for file in files]
    result = torch.empty(count, 3, SIDE, SIDE)
    for place in range(count):
        photo = photos[place % len(photos)]
        small = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=crop_box(*photo.size, least, generator))
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        result[place] = pixels.flip(2) if generator.random() < 0.5 else pixels
    return result


def sentences(text: str) -> list[str]:
    """The sentences of a plain text: of paragraphs without indented lines, 10 to 40 words, from a capital letter to a full stop.

    >>> sentences("A title\\n=======\\n\\nThis one has\\njust as many words as are asked for. Not this.\\n\\n   Code is left out.")
    ['This one has just as many words as are asked for.']
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if any(line.startswith("   ") for line in lines):
            continue
        joined = " ".join(line.strip() for line in lines)
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", joined):
            if WORDS[0] <= len(sentence.split()) <= WORDS[1] and sentence[0].isupper() and sentence.endswith("."):
                found.append(sentence)
    return found


def chosen(texts: list[str], count: int, seed: int) -> list[str]:
    """So many of the texts, in random order.

    Raises:
        DataError: if there are too few.

    >>> sorted(chosen(["a", "b", "c"], 3, seed=0))
    ['a', 'b', 'c']
    """
    if count > len(texts):
        raise DataError(f"lab.repair_without_labels: there are {len(texts)} sentences, {count} are asked for. Ask for fewer.")
    return [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))[:count]]


def topics() -> tuple[list[str], list[str]]:
    """The sentences of every second topic of `pydoc_data.topics`, and those of the others that aren't among these."""
    from pydoc_data.topics import topics as texts

    halves: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for place, name in enumerate(sorted(texts)):
        halves[place % 2].update(dict.fromkeys(sentences(texts[name])))
    return list(halves[0]), [sentence for sentence in halves[1] if sentence not in halves[0]]
