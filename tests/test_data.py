"""Batches in memory, transforms, splits, IDX files, digits, and loading by name."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pared.core.errors import DataError, SettingsError
from pared.data import Batches, CropAndFlip, Normalize, load
from pared.data.idx import parse_idx, read_bytes
from pared.data.splits import check_range, every_nth
from pared.training import Task


def test_batches_hold_every_sample_once_and_differ_by_one() -> None:
    batches = Batches(torch.arange(10.0), torch.arange(10), 4, shuffle=True)
    sizes = [len(targets) for _, targets in batches]
    assert sizes == [4, 3, 3]
    assert len(batches) == 3
    assert batches.samples == 10
    order = torch.cat([targets for _, targets in batches])
    assert sorted(order.tolist()) == list(range(10))
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]).long(), order)


def test_no_batch_of_one() -> None:
    assert [len(targets) for _, targets in Batches(torch.zeros(129, 1), torch.zeros(129), 128)] == [65, 64]


def test_shuffling_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(torch.arange(50), torch.arange(50), 8, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        torch.rand(1)
        return torch.cat([targets for _, targets in batches]).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    state = torch.get_rng_state()
    list(Batches(torch.arange(5), torch.arange(5), 2, shuffle=True))
    assert torch.equal(state, torch.get_rng_state())


def test_bytes_become_numbers_between_0_and_1() -> None:
    inputs, _ = next(iter(Batches(torch.tensor([[0, 51, 255]], dtype=torch.uint8), torch.zeros(1))))
    np.testing.assert_allclose(inputs, [[0, 0.2, 1]], rtol=1e-6)
    inputs, _ = next(iter(Batches(torch.tensor([[4, 16]], dtype=torch.uint8), torch.zeros(1), full_scale=16)))
    assert inputs.tolist() == [[0.25, 1]]


def test_batches_that_cannot_be() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        Batches(torch.zeros(0, 1), torch.zeros(0))
    with pytest.raises(DataError, match="2 samples and 3 targets"):
        Batches(torch.zeros(2), torch.zeros(3))
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        Batches(torch.zeros(2), torch.zeros(2), 0)


def test_normalize_by_channel() -> None:
    images = torch.rand(2, 3, 4, 5)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 1.0, 2.0])
    expected = (images.numpy() - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(Normalize(mean.tolist(), std.tolist())(images), expected, rtol=1e-5)
    with pytest.raises(SettingsError, match="std greater than 0"):
        Normalize([0.0], [0.0])
    with pytest.raises(SettingsError, match="one number a channel"):
        Normalize([0.0, 1.0], [1.0])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_crop_and_flip_is_what_loops_in_numpy_say(padding: int, flip: bool) -> None:
    images = torch.rand(16, 2, 5, 7)
    result = CropAndFlip(padding, flip)(images, torch.Generator().manual_seed(4)).numpy()
    generator = torch.Generator().manual_seed(4)
    shifts = torch.randint(0, 2 * padding + 1, (2, 16, 1), generator=generator).numpy()
    mirrored = (torch.rand(16, 1, generator=generator) < 0.5).numpy() if flip else np.zeros((16, 1), bool)
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    for number in range(16):
        top, left = shifts[:, number, 0]
        expected = padded[number, :, top : top + 5, left : left + 7]
        np.testing.assert_array_equal(result[number], expected[:, :, ::-1] if mirrored[number] else expected)
    if flip:
        assert 0 < mirrored.sum() < 16


def test_crop_and_flip_settings() -> None:
    with pytest.raises(SettingsError, match="padding must be a whole number"):
        CropAndFlip(-1)


def test_every_nth_takes_its_share_of_every_class() -> None:
    targets = torch.randint(0, 7, (1000,), generator=torch.Generator().manual_seed(0))
    kept, taken = every_nth(targets, 5)
    assert len(taken) == 200
    assert sorted(torch.cat([kept, taken]).tolist()) == list(range(1000))
    shares = torch.bincount(targets[taken], minlength=7) - torch.bincount(targets, minlength=7) / 5
    assert shares.abs().max() <= 1
    with pytest.raises(DataError, match="labels: label 7 is out of range 0 to 6"):
        check_range(torch.tensor([0, 7]), 7, "labels")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_idx_round_trip(shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    assert np.array_equal(parse_idx(idx(array), len(shape), "x").numpy(), array)


@given(st.binary(max_size=64) | st.binary(max_size=40).map(lambda tail: bytes([0, 0, 8, 3]) + tail), st.integers(1, 3))
def test_idx_of_any_bytes_is_an_array_or_a_data_error(content: bytes, axes: int) -> None:
    right = content[:4] == bytes([0, 0, 8, axes]) and len(content) >= 4 + 4 * axes
    if right:
        right = len(content) - 4 - 4 * axes == math.prod(struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes]))
    if right:
        assert idx(parse_idx(content, axes, "some file").numpy()) == content
    else:
        with pytest.raises(DataError, match="some file: "):
            parse_idx(content, axes, "some file")


@given(st.data())
def test_idx_with_one_byte_changed_or_cut(data: st.DataObject) -> None:
    content = bytearray(idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)))
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(DataError):
        parse_idx(bytes(content[:cut]), 3, "x")
    place = data.draw(st.integers(0, 15))
    content[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DataError):
        parse_idx(bytes(content), 3, "x")


def test_gzip_files_are_unpacked_and_damage_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(b"content" * 100)
    path = tmp_path / "x.gz"
    path.write_bytes(packed)
    assert read_bytes(path) == b"content" * 100
    for broken in (packed[:-9], packed[:20] + b"\xff" * 10 + packed[30:], packed[:3]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"x\.gz: can't be read"):
            read_bytes(path)
    with pytest.raises(DataError, match=r"missing: can't be read \(.*No such file"):
        read_bytes(tmp_path / "missing")


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    task = load("digits")
    splits = (task.train, task.valid, task.test)
    images = np.concatenate([split.inputs.numpy() for split in splits])
    targets = np.concatenate([split.targets.numpy() for split in splits])
    given = sorted(zip(images.reshape(-1, 64).tolist(), targets.tolist(), strict=True))
    assert given == sorted(zip(pixels.astype(int).tolist(), labels.tolist(), strict=True))
    for split, samples in zip(splits, (1197, 300, 300), strict=True):
        assert split.samples == samples
        assert (torch.bincount(split.targets) - samples / 10).abs().max() <= samples * 0.01 + 1
    (example,) = task.example_inputs()
    assert example.shape == (2, 1, 8, 8)


def test_the_split_does_not_depend_on_the_seed_but_the_order_does() -> None:
    first, second = load("digits", seed=0), load("digits", seed=1)
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert not torch.equal(next(iter(first.train))[1], next(iter(second.train))[1])
    assert torch.equal(next(iter(first.test))[1], next(iter(second.test))[1])


def test_unknown_names() -> None:
    with pytest.raises(DataError, match=r"digit: no such data set or folder\. Did you mean digits\? Known are"):
        load("digit")


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\nfrom pared.data import load\n\n"
        "def task(seed, batch_size):\n"
        "    return dataclasses.replace(load('digits', seed, batch_size), name=f'mine {seed} {batch_size}')\n\n"
        "def wrong():\n    return 3\n\n"
        "def broken():\n    raise ValueError('no such shelf')\n"
    )
    assert load(f"{path}:task", seed=4, batch_size=9).name == "mine 4 9"
    with pytest.raises(DataError, match=r"must return a pared\.Task\. Got int"):
        load(f"{path}:wrong")
    with pytest.raises(DataError, match=r"mine\.py:broken: ValueError: no such shelf \(.*mine\.py, line 11: raise ValueError"):
        load(f"{path}:broken")
    with pytest.raises(DataError, match=r"mine\.py: has no function other"):
        load(f"{path}:other")
    with pytest.raises(DataError, match=r"nothing\.py: no such file"):
        load(f"{tmp_path}/nothing.py:task")
    with pytest.raises(DataError, match=r"pared_nowhere\.data: no such module\. Install it"):
        load("pared_nowhere.data:task")
    (tmp_path / "syntax.py").write_text("def task(:\n")
    with pytest.raises(DataError, match=r"syntax\.py: SyntaxError"):
        load(f"{tmp_path}/syntax.py:task")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(load("mine:task"), Task)
