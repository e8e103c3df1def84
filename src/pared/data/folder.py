"""A folder of images as a task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from pared.core.errors import DataError
from pared.data.batches import Batches
from pared.data.transforms import CropAndFlip, Normalize
from pared.training import Task

if TYPE_CHECKING:
    from PIL.Image import Image

Result = TypeVar("Result")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
_LARGEST = 224  # the side that images of different sizes are brought to


def image_folder(root: str | Path, seed: int = 0, batch_size: int = 128, size: int | None = None) -> Task:
    """The images under a folder, a class a sub-folder.

    Either `root/{class}/picture.png`, split by the hash of each path (8 : 1 : 1, the same on every machine, and unchanged for
    the old pictures when new ones come), or `root/{train,valid,test}/{class}/picture.png`. Without a `valid` folder a tenth of
    the training images, chosen by hash, validates. Pictures are kept in memory as bytes; grey ones have one channel, if all are grey.

    Args:
        root: the folder.
        seed: of the shuffling; the split is fixed.
        batch_size: the most samples in a batch.
        size: side in pixels; the shorter side is scaled to it and the middle is cut out. None: as they are if all have the same
            size, else 224.

    Raises:
        DataError: if there are no classes or images, a picture can't be read, or a split stays empty.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: isn't a folder.")
    files = _by_split(root)
    classes = sorted({label for found in files.values() for _, label in found})
    if unknown := [label for label in classes if label not in {label for _, label in files["train"]}]:
        raise DataError(f"{root}: no training images of class {unknown[0]!r}. Add some, or take the class out of the other splits.")
    headers = [_with_image(path, lambda picture: (picture.mode, picture.size)) for found in files.values() for path, _ in found]
    mode = "L" if all(mode in ("1", "L") for mode, _ in headers) else "RGB"
    side = size if size is not None else None if len({size for _, size in headers}) == 1 else _LARGEST
    images = {
        split: torch.stack([_with_image(path, lambda picture: _pixels(picture, mode, side)) for path, _ in found])
        for split, found in files.items()
    }
    labels = {split: torch.tensor([classes.index(label) for _, label in found]) for split, found in files.items()}
    mean, std = _statistics(images["train"])
    return Task(
        train=Batches(images["train"], labels["train"], batch_size, shuffle=True, seed=seed),
        valid=Batches(images["valid"], labels["valid"], batch_size),
        test=Batches(images["test"], labels["test"], batch_size),
        normalize=Normalize(mean, std),
        augment=CropAndFlip(padding=max(1, images["train"].shape[-1] // 8), flip=True),
        name=root.resolve().name,
    )


def _by_split(root: Path) -> dict[str, list[tuple[Path, str]]]:
    """(file, class) of all images of each split, in the order of their paths."""
    files: dict[str, list[tuple[Path, str]]] = {"train": [], "valid": [], "test": []}
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    if any(folder.name == "train" for folder in folders):
        for folder in folders:
            if folder.name in _SPLITS:
                files[_SPLITS[folder.name]] += _images(folder)
        if not files["valid"]:
            files["valid"] = [found for found in files["train"] if _share(found[0], root) < 0.1]
            files["train"] = [found for found in files["train"] if _share(found[0], root) >= 0.1]
    else:
        for found in _images(root):
            share = _share(found[0], root)
            files["valid" if share < 0.1 else "test" if share < 0.2 else "train"].append(found)
    if not any(files.values()):
        raise DataError(f"{root}: no images found. Expected {root}/CLASS/picture.png or {root}/train/CLASS/picture.png.")
    if empty := [split for split, found in files.items() if not found]:
        raise DataError(f"{root}: no images for the {empty[0]} split. Add images, or make the folders train, valid and test yourself.")
    return files


def _images(folder: Path) -> list[tuple[Path, str]]:
    """(file, class) of all images in the sub-folders of `folder`, which are the classes."""
    classes = [each for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith(".")]
    return [(path, each.name) for each in classes for path in sorted(each.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]


def _share(path: Path, root: Path) -> float:
    """A number in [0, 1) that depends on the path within the folder alone."""
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def _with_image(path: Path, use: Callable[[Image], Result]) -> Result:
    """Open a picture, use it, close it."""
    try:
        from PIL import Image  # here, because only image folders need it
    except ImportError as error:
        raise DataError("reading pictures needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as picture:
            return use(picture)
    except Exception as error:  # damaged pictures make Pillow raise nearly anything
        raise DataError(f"{path}: can't be read as a picture ({error}). Replace or remove it.") from error


def _pixels(picture: Image, mode: str, side: int | None) -> Tensor:
    """The picture as bytes, shape (channels, height, width); with `side`, scaled and cut to a square."""
    converted = picture.convert(mode)
    if side is not None:
        scale = side / min(converted.size)
        width, height = (max(side, round(length * scale)) for length in converted.size)
        left, top = (width - side) // 2, (height - side) // 2
        converted = converted.resize((width, height), resample=2).crop((left, top, left + side, top + side))  # 2: bilinear
    pixels = torch.from_numpy(np.array(converted, dtype=np.uint8))
    return pixels[None] if mode == "L" else pixels.permute(2, 0, 1).contiguous()


def _statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]; bytes are counted, so that no large float copy is made."""
    mean, std = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in images.unbind(1):
        weight = torch.bincount(channel.flatten(), minlength=256).to(torch.float64) / channel.numel()
        centre = (weight * values).sum()
        mean.append(centre.item())
        std.append(max(1e-3, (weight * (values - centre) ** 2).sum().sqrt().item()))
    return mean, std
