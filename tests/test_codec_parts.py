"""The codings of tensors: round trips, sizes that fit on paper, an independent reader, and bytes that are wrong."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

import codec_twin
from pared.codec import grids, huffman, integers, logistic, mixing, scales, static, tensors, tokens, values
from pared.codec.cursor import Cursor, number
from pared.codec.elements import ELEMENTS, Layout, ordered
from pared.codec.integers import Coding
from pared.codec.values import Kind
from pared.core.errors import FileError

quickly = settings(max_examples=25, deadline=None, derandomize=True)


def layout_of(array: np.ndarray) -> Layout:
    return Layout(ELEMENTS[str(array.dtype)], array.shape)


def entropy(symbols: NDArray[np.int64]) -> float:
    _, counts = np.unique(symbols, return_counts=True)
    shares = counts / counts.sum()
    return float(-(counts * np.log2(shares)).sum() / 8)


def test_tables_are_those_of_decimal_arithmetic() -> None:
    squash, stretch = codec_twin.squash_and_stretch()
    assert logistic.squash_table().tolist() == squash
    assert logistic.stretch_table().tolist() == stretch


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, (1 << 63) - 1])
def test_numbers(value: int) -> None:
    cursor = Cursor(number(value), "x")
    assert (cursor.number("it"), cursor.left) == (value, 0)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 10])
def test_wrong_numbers(data: bytes) -> None:
    with pytest.raises(FileError, match=r"x: a size"):
        Cursor(data, "x").number("a size")


@given(
    matrix=arrays(np.int64, array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9), elements=st.integers(-9, 9)),
    lag=st.integers(0, 4),
)
@quickly
def test_adaptive_round_trip_by_both_readers(matrix: NDArray[np.int64], lag: int) -> None:
    data = mixing.encode(matrix, lag, 2 * lag)
    assert (mixing.decode(data, matrix.shape, lag, 2 * lag) == matrix).all()
    assert codec_twin.adaptive(data, *matrix.shape, lag, 2 * lag) == matrix.tolist()


def test_adaptive_takes_the_largest_integers() -> None:
    matrix = np.array([[mixing.LARGEST, -mixing.LARGEST], [1, 0]] * 5)
    data = mixing.encode(matrix)
    assert (mixing.decode(data, (10, 2)) == matrix).all()
    assert codec_twin.adaptive(data, 10, 2, 0, 0) == matrix.tolist()


def test_adaptive_integers_that_are_too_long_are_refused() -> None:
    data = mixing.encode(np.array([[7, -8, 0]]))
    assert mixing.decode(data, (1, 3), most=4).tolist() == [[7, -8, 0]]
    with pytest.raises(FileError, match="more than 3 bits"):
        mixing.decode(data, (1, 3), most=3)


def test_adaptive_code_that_goes_on_is_refused() -> None:
    data = mixing.encode(np.array([[1, 2, 3]]))
    for wrong in (data + b"\0", data + b"\1", data + data):
        with pytest.raises(FileError, match="ends elsewhere"):
            mixing.decode(wrong, (1, 3))
    with pytest.raises(FileError, match="left over"):
        mixing.decode(b"x", (0, 3))


def test_adaptive_coding_of_a_sparse_matrix_with_empty_rows_and_columns() -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.random((80, 90)) < 0.1).astype(np.int64)
    matrix[::2], matrix[:, ::3] = 0, 0
    inside = matrix[1::2][:, np.arange(90) % 3 != 0]
    # the flags of 170 rows and columns are a pattern that is learnt, the rest costs its entropy and what is spent on learning it
    assert len(mixing.encode(matrix)) < 1.1 * entropy(inside) + 30


def test_contexts_pay_where_there_is_something_to_see() -> None:
    rng = np.random.default_rng(0)
    lit = np.zeros((12, 12))
    lit[3:9, 4:8] = 0.7
    matrix = (rng.random((200, 144)) < np.maximum(lit.reshape(-1), 0.004)).astype(np.int64)
    assert len(mixing.encode(matrix, 12)) < 0.7 * entropy(matrix)


@pytest.mark.parametrize("counts", [[1], [3, 0, 1], [1] * 4096, [10**12, 1, 0, 5], [0, 7]])
def test_frequencies_add_up_and_leave_nothing_out(counts: list[int]) -> None:
    table = static.frequencies(np.array(counts))
    assert table.sum() == 1 << static.PRECISION
    assert ((table > 0) == (np.array(counts) > 0)).all()


def test_no_counts_no_frequencies() -> None:
    assert static.frequencies(np.zeros(3, np.int64)).tolist() == [0, 0, 0]


@given(st.lists(st.integers(1 - 2**31, 2**31 - 1) | st.integers(-3, 3), max_size=60))
@quickly
def test_tokens_by_both_readers(found: list[int]) -> None:
    for coding in ("static", "huffman"):
        data = tokens.encode(np.array(found, np.int32), coding)  # type: ignore[arg-type]
        cursor = Cursor(data, "x")
        assert tokens.decode(cursor, len(found), coding).tolist() == found  # type: ignore[arg-type]
        assert cursor.left == 0
        if coding == "static" or found:
            assert codec_twin.tokens(codec_twin.Bytes(data), len(found), coding) == found


def test_static_coding_comes_within_half_a_percent_of_the_entropy() -> None:
    rng = np.random.default_rng(0)
    for symbols in ((rng.random(300_000) < 0.05) * rng.choice([-1, 1], 300_000), np.rint(rng.normal(size=300_000) * 500)):
        matrix = symbols.astype(np.int64)
        assert len(tokens.encode(matrix, "static")) <= 1.005 * entropy(matrix)


def test_huffman_lengths_are_optimal_and_need_a_whole_bit() -> None:
    assert huffman.code_lengths(np.array([8, 4, 2, 1, 1])).tolist() == [1, 2, 3, 4, 4]
    symbols = np.array([0] * 99 + [1])
    assert len(tokens.encode(symbols, "huffman")) == pytest.approx(100 / 8, abs=8)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2], [-1, 1, 1], [60, 1], [2]])
def test_codes_that_do_not_fit_together(lengths: list[int]) -> None:
    with pytest.raises(FileError, match="fit together"):
        huffman.decode(b"\0", 3, np.array(lengths))


@pytest.mark.parametrize("coding", list(Coding)[1:])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (9, 40), (0, 4), (4, 0)])
def test_every_coding_of_a_matrix_by_both_readers(coding: Coding, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    matrix = np.where(rng.random(shape) < 0.4, rng.integers(-300, 300, shape), 0)
    if coding is Coding.SCALED and not matrix.size:
        return
    data = integers.encode(matrix, coding, (True, min(2, *shape), 0))
    cursor = Cursor(data, "x")
    assert (integers.decode(cursor, shape, coding) == matrix).all()
    assert cursor.left == 0
    if matrix.size:
        assert codec_twin.integers(codec_twin.Bytes(data), *shape, int(coding)) == matrix.reshape(-1).tolist()


def scaled_matrix() -> NDArray[np.int32]:
    """Rows and columns of different scale, and some integers that are far too large for the tables."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 12, (61, 1)) * rng.uniform(0.5, 4, (1, 97))
    matrix = np.rint(rng.laplace(size=(61, 97)) * scale).astype(np.int32)
    matrix[3, 5], matrix[60, 96] = scales.LARGEST, -scales.LARGEST
    return matrix


def test_tables_of_the_scaled_coding_are_those_of_decimal_arithmetic() -> None:
    assert scales._LOGARITHMS.tolist() == codec_twin.LOGARITHM
    assert scales._ROOTS.tolist() == codec_twin.ROOT


def test_the_scaled_coding_by_both_readers() -> None:
    matrix = scaled_matrix()
    assert scales.fits(matrix)
    data = scales.encode(matrix)
    assert (scales.decode(Cursor(data, "x"), matrix.shape) == matrix).all()
    assert codec_twin.scaled(codec_twin.Bytes(data), *matrix.shape) == matrix.reshape(-1).tolist()


def test_scales_pay_where_rows_and_columns_differ() -> None:
    rng = np.random.default_rng(0)
    scale = 2.0 ** rng.integers(0, 5, (200, 1))
    matrix = np.rint(rng.normal(size=(200, 200)) * 4 * scale).astype(np.int32)
    ideal = sum(math.log2(4 * s * math.sqrt(2 * math.pi * math.e)) for s in scale[:, 0]) * 200 / 8  # of normal numbers, rounded
    assert len(scales.encode(matrix)) < 1.02 * ideal < 0.95 * entropy(matrix)


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_damaged_scaled_matrices(place: int) -> None:
    matrix = scaled_matrix()
    data = bytearray(scales.encode(matrix))
    data[place] ^= 0x15
    with contextlib.suppress(FileError):
        assert scales.decode(Cursor(data, "x"), matrix.shape).shape == matrix.shape


def test_lines_of_pixels_are_found() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((10, 14))
    image[2:8, 3:6] = 0.8
    matrix = (rng.random((60, 140)) < image.reshape(-1)).astype(np.int64)
    assert integers.line(matrix) == 14
    assert integers.line(np.ones((9, 9), np.int64)) == integers.line(np.zeros((9, 9), np.int64)) == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@given(step=st.floats(1e-3, 10), found=st.lists(st.integers(-255, 255), min_size=1, max_size=40))
@quickly
def test_steps_are_found_where_there_is_one(dtype: type, step: float, found: list[int]) -> None:
    exact = np.array(step, dtype)
    grid = np.array(found).astype(dtype) * exact
    answer = grids.find_step(grid)
    smallest = min((abs(k) for k in found if k), default=1)
    if smallest > grids.MOST_STEPS:
        return
    assert answer is not None
    again = grids.multiples(grid[None], np.array(answer, dtype))
    assert again is not None


def test_no_step_for_what_lies_on_no_grid() -> None:
    assert grids.find_step(np.array([1, np.nan])) is None
    assert grids.find_step(np.array([1, np.inf])) is None
    assert grids.find_step(np.random.default_rng(0).normal(size=50).astype(np.float32)) is None
    assert grids.find_step(np.zeros(3)) == 1


@given(st.integers(0, 2**32), st.sampled_from(["f2", "f4", "f8"]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_steps_of_many_lines_are_those_of_each(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    lines = rng.integers(-9, 10, (rng.integers(1, 20), rng.integers(1, 60)))
    lines = lines.astype(dtype) * rng.random((len(lines), 1)).astype(dtype)
    if seed % 3 == 0:
        lines[-1, -1] = rng.random()
    found, each = grids.find_steps(lines), [grids.find_step(line) for line in lines]
    assert (None in each) if found is None else (found.tolist() == each)


def test_groups_of_no_entries_and_too_long_ones_are_refused() -> None:
    layout = Layout(ELEMENTS["float32"], (3, 5))
    for kind, length in ((Kind.GRID_GROUPS, 0), (Kind.GRID_GROUPS, 6), (Kind.GRID_COLUMN_GROUPS, 0), (Kind.SIGNED_GRID_COLUMN_GROUPS, 4)):
        with pytest.raises(FileError, match="group"):
            tensors.decode(Cursor(bytes([kind, length]) + b"\0" * 60, "x"), layout)


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(["f4", "f8"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_groups_of_any_length_are_seen(seed: int, down: bool, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    rows, columns, length = rng.integers(2, 30), rng.integers(40, 160), int(rng.integers(8, 36))
    small = rng.integers(-7, 8, (rows, columns))
    small[:, ::3] |= 1  # every group has what only its own step fits
    steps = np.repeat(rng.random((rows, -(-columns // length))), length, axis=1)[:, :columns]
    array = small.astype(dtype) * steps.astype(dtype)
    array = np.ascontiguousarray(array.T) if down else array
    data = tensors.encode(array.tobytes(), layout_of(array))
    assert data[0] & 15 == (Kind.GRID_COLUMN_GROUPS if down else Kind.GRID_GROUPS)
    assert tensors.decode(Cursor(data, "x"), layout_of(array)) == array.tobytes()


def test_numbers_are_ordered_by_value() -> None:
    found = np.array([-np.inf, -2, -0.0, 0.0, 1e-40, 3, np.inf], np.float32)
    keys = ordered(found.view(np.uint32), "float")
    assert (np.diff(keys.astype(np.int64)) > 0).all()


def cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weight, small = rng.normal(size=(24, 40)).astype(np.float32), rng.integers(-7, 8, (24, 40))
    scale = rng.random((24, 1)).astype(np.float32)
    scales = np.repeat(rng.random((24, 3)).astype(np.float32), 16, axis=1)[:, :40]  # groups of 16, 16 and 8
    return {
        "dense": weight, "half": weight.astype(np.float16), "double": weight.astype(np.float64), "one": np.array(2.5, np.float32),
        "none": np.zeros((0, 3), np.float32), "zeros": np.zeros((30, 30), np.float32), "same": np.full((30, 30), np.float32(0.3)),
        "nan": np.where(weight > 0, np.float32(np.nan), weight), "minus zero": np.where(weight > 0, np.float32(-0.0), weight),
        "grid": small.astype(np.float32) * np.float32(0.037), "rounded": np.round(weight * 3) * np.float32(0.037),
        "rows": small.astype(np.float32) * scale, "columns": (small.astype(np.float32) * scale).T.copy(),
        "rounded rows": np.round(weight * 3) * scale, "table": np.sort(weight.reshape(-1)[:9])[small + 1], "int8": small.astype(np.int8),
        "halves": (small + 8).astype(np.uint8) * 16 + 5, "int64": np.arange(90) * 7, "extremes": np.array([2**63 - 1, -(2**63), 0] * 9),
        "groups": small.astype(np.float32) * scales, "rounded groups": np.round(weight * 3) * scales,
        "half groups": small.astype(np.float16) * scales.astype(np.float16), "bool": weight > 1,
        "odd groups": small.astype(np.float32) * scales[:, ::-1], "groups down": (small.astype(np.float32) * scales).T.copy(),
        "rounded groups down": (np.round(weight * 3) * scales).T.copy(),
        "conv": (small.reshape(8, 4, 30) * np.float32(0.5)).reshape(8, 4, 5, 6),
    }  # fmt: skip


@pytest.mark.parametrize("prefer", ["auto", "smallest", "static", "huffman", "raw"])
@pytest.mark.parametrize("name", cases())
def test_every_tensor_comes_back_bit_for_bit(name: str, prefer: tensors.Prefer) -> None:
    array = cases()[name]
    layout = layout_of(array)
    data = tensors.encode(array.tobytes(), layout, prefer)
    cursor = Cursor(data, "x")
    assert tensors.decode(cursor, layout) == array.tobytes()
    assert cursor.left == 0
    assert len(data) <= array.nbytes + 1
    dtype = "<u1" if array.dtype == bool else array.dtype.str
    assert codec_twin.tensor(codec_twin.Bytes(data), dtype, array.shape) == array.tobytes()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("zeros", Kind.GRID), ("grid", Kind.GRID), ("rounded", Kind.SIGNED_GRID), ("rows", Kind.GRID_ROWS), ("columns", Kind.GRID_COLUMNS),
        ("rounded rows", Kind.SIGNED_GRID_ROWS), ("table", Kind.TABLE), ("int8", Kind.INTEGERS), ("conv", Kind.GRID), ("one", Kind.RAW),
        ("groups", Kind.GRID_GROUPS), ("rounded groups", Kind.SIGNED_GRID_GROUPS), ("half groups", Kind.GRID_GROUPS),
        ("odd groups", Kind.GRID_GROUPS), ("groups down", Kind.GRID_COLUMN_GROUPS),
        ("rounded groups down", Kind.SIGNED_GRID_COLUMN_GROUPS),
    ],
)  # fmt: skip
def test_what_a_tensor_is_seen_as(name: str, kind: Kind) -> None:
    array = cases()[name]
    assert tensors.encode(array.tobytes(), layout_of(array))[0] & 15 == kind


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "complex64", "bytes"])
def test_types_that_numpy_lacks(dtype: str) -> None:
    element = ELEMENTS[dtype]
    data = np.random.default_rng(0).integers(0, 256, 960, np.uint8).tobytes()
    layout = Layout(element, (960 // element.size,) if dtype != "complex64" else (240,))
    assert tensors.decode(Cursor(tensors.encode(data, layout), "x"), layout) == data


@pytest.mark.parametrize("code", [0xFF, 0xF0, 0x73, 0x10, 0x21])
def test_codings_of_a_newer_pared(code: int) -> None:
    with pytest.raises(FileError, match=r"newer pared"):
        tensors.decode(Cursor(bytes([code]) + b"\0" * 20, "x"), Layout(ELEMENTS["float32"], (3,)))


@pytest.mark.parametrize(("kind", "element"), [(Kind.INTEGERS, "float32"), (Kind.GRID, "int8"), (Kind.NIBBLES, "int16")])
def test_kinds_that_a_type_can_not_be(kind: Kind, element: str) -> None:
    with pytest.raises(FileError, match="can't be stored as"):
        tensors.decode(Cursor(bytes([kind]) + b"\0" * 20, "x"), Layout(ELEMENTS[element], (3,)))


@given(st.binary(max_size=60), st.sampled_from(["float32", "int8", "int64", "float16", "bytes"]))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_are_a_tensor_or_an_error(data: bytes, element: str) -> None:
    layout = Layout(ELEMENTS[element], (3, 5))
    with contextlib.suppress(FileError):
        assert len(tensors.decode(Cursor(data, "x"), layout)) == layout.size


def test_huffman_is_larger_than_static_coding_where_zeros_are_many() -> None:
    rng = np.random.default_rng(0)
    array = ((rng.random((100, 100)) < 0.04) * rng.integers(1, 9, (100, 100))).astype(np.float32)
    sizes = {prefer: len(tensors.encode(array.tobytes(), layout_of(array), prefer)) for prefer in ("static", "huffman", "smallest")}
    assert sizes["smallest"] <= sizes["static"] < sizes["huffman"]
    assert math.isfinite(entropy(array.astype(np.int64)))


def test_meanings_of_one_value() -> None:
    layout = Layout(ELEMENTS["int8"], (4,))
    found = [meaning.kind for meaning in values.meanings(np.zeros(4, np.uint8), layout)]
    assert found == [Kind.INTEGERS]
