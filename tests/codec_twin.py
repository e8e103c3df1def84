"""A slow reader of `.pared` files, written from FORMAT.md alone, in plain Python: no code of the package is used."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections import defaultdict
from decimal import Decimal, getcontext
from typing import Any

import numpy as np
import onnx
import zstandard

getcontext().prec = 60


def squash_and_stretch() -> tuple[list[int], list[int]]:
    """The two tables, from decimal arithmetic."""
    upper = [min(int((Decimal(65536) / (1 + (Decimal(-x) / 256).exp())).to_integral_value()), 65535) for x in range(3073)]
    squash = [max(65536 - value, 1) for value in reversed(upper[1:])] + upper
    stretch, last = [], -1
    for q in range(65536):
        while last + 1 < len(squash) and squash[last + 1] <= q:
            last += 1
        first = last
        while first > 0 and squash[first - 1] == squash[last]:
            first -= 1
        stretch.append(max((first + last) // 2, 0) - 3072 if last >= 0 else -3072)
    return squash, stretch


SQUASH, STRETCH = squash_and_stretch()


class Bytes:
    """Bytes with a place."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        assert self.place + count <= len(self.data)
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def clamp(x: int) -> int:
    return min(max(x, -3072), 3072)


class Adaptive:
    """Section 8; counters and weights are found by what they are about instead of by place."""

    def __init__(self, code: bytes) -> None:
        self.stream = iter(code)
        self.low, self.high, self.code = 0, 2**32 - 1, 0
        for _ in range(4):
            self.code = self.code << 8 | next(self.stream, 0)
        self.counters: dict[Any, list[int]] = defaultdict(lambda: [1 << 23, 0])
        self.weights: dict[Any, list[int]] = defaultdict(lambda: [21845] * 9)
        self.uses: dict[Any, int] = defaultdict(int)

    def bit(self, about: list[Any], first: Any, second: Any) -> int:
        counters = [self.counters[key] for key in about]
        u, v = self.weights[first], self.weights[second]
        t = [STRETCH[c >> 8] for c, _ in counters]
        a, b = sum(x * w for x, w in zip(t, u, strict=False)), sum(x * w for x, w in zip(t, v, strict=False))
        p = SQUASH[clamp((a + b) >> 17) + 3072]
        span = self.high - self.low
        middle = self.low + (span >> 16) * p + ((span & 65535) * p >> 16)
        y = int(self.code <= middle)
        if y:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 24 == self.high >> 24:
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = (self.high << 8 & 0xFFFFFFFF) | 255
            self.code = (self.code << 8 & 0xFFFFFFFF) | next(self.stream, 0)
        for total, weights, name in ((a, u, first), (b, v, second)):
            error = (65536 * y - SQUASH[clamp(total >> 16) + 3072]) * (6 + 2816 // (32 + min(self.uses[name], 1023)))
            self.uses[name] += 1
            for i, x in enumerate(t):
                weights[i] += (x * error + 2**19) >> 20
        for counter in counters:
            c, s = counter
            c += ((2**24 * y - c) * (2**17 // (2 * s + 3))) >> 16
            counter[:] = [min(max(c, 256), 2**24 - 256), min(s + 1, 255)]
        return y


def small(x: int) -> int:
    return min(abs(x), 2)


def sign(x: int) -> int:
    return (x > 0) - (x < 0)


def length(x: int) -> int:
    return abs(x).bit_length()


def density(count: int, places: int) -> int:
    if count == 0:
        return 3 - (places > 2) - (places > 8) - (places > 32)
    return min(4 + ((count << 6) // (places + 1)).bit_length(), 11)


def adaptive(code: bytes, rows: int, columns: int, width: int, period: int) -> list[list[int]]:
    """The matrix of section 8."""
    v = [[0] * columns for _ in range(rows)]
    if rows * columns == 0:
        return v
    m = Adaptive(code)

    def flags(count: int, kind: str, lag: int) -> list[int]:
        out: list[int] = []
        for n in range(count):
            at = lambda k: out[k] if 0 <= k < len(out) else 0  # noqa: E731
            b, b2 = at(n - 1), at(n - 2)
            g = at(n - lag) if lag else 0
            g1 = at(n - lag + 1) if lag > 1 and n >= lag else 0
            about = [(kind, 0, b, b2, g, g1), (kind, 1, b, b2, g), (kind, 2, g, g1, b), (kind, 3)]
            out.append(m.bit(about, (kind, "a"), (kind, "b")))
        return out

    full_columns, full_rows = flags(columns, "column", width), flags(rows, "row", 0)
    count, signs, lengths = [0] * columns, [0] * columns, [0] * columns
    for i in range(rows):
        in_row = last_length = last_sign = 0
        for j in range(columns):
            if not (full_rows[i] and full_columns[j]):
                continue
            at = lambda r, c: v[r][c] if r >= 0 and 0 <= c < columns else 0  # noqa: E731
            left, left_2, up, up_2 = at(i, j - 1), at(i, j - 2), at(i - 1, j), at(i - 2, j)
            ul, ur = at(i - 1, j - 1), at(i - 1, j + 1)
            px = at(i, j - width) if width and j >= width else 0
            pl = at(i, j - width - 1) if width and j > width else 0
            pr = at(i, j - width + 1) if width > 1 and j >= width else 0
            ch = at(i, j - period) if period and j >= period else 0
            own = j if rows >= 8 else 0
            near_p = (pl != 0) + (px != 0) + (pr != 0)
            above = min((ul != 0) + (up != 0) + (ur != 0), 2)
            d, e = density(count[j], i), density(in_row, j)
            history = 0 if count[j] == 0 else 1 + (up_2 != 0)
            about = [
                ("z0", small(left), small(left_2), small(up), small(px)), ("z1", small(left), near_p, above, ch != 0),
                ("z2", d, small(left), small(px)), ("z3", e, small(up), px != 0, ch != 0), ("z4", d, e),
                ("z5", history, near_p, small(up)), ("z6", i, small(left)), ("z7", j % period if period else 0, small(ch)), ("z8", own),
            ]  # fmt: skip
            if not m.bit(about, ("za", small(left), small(up), small(px)), ("zb", d)):
                continue
            balance = min(max(signs[j], -2), 2)
            about = [
                ("s0", sign(left), sign(up), sign(px)), ("s1", balance, sign(px)), ("s2", last_sign, sign(ch)),
                ("s3", sign(ul), sign(ur)), ("s4", own),
            ]  # fmt: skip
            negative = m.bit(about, "sa", "sb")
            n = 1
            while n < 31:
                about = [
                    ("l0", n, min(length(left), 3), min(length(up), 3)), ("l1", n, min(length(px), 3)),
                    ("l2", n, min(last_length, 3), min(length(ch), 3)), ("l3", n, min(lengths[j], 3)), ("l4", n),
                    ("l5", own, min(n - 1, 7)),
                ]  # fmt: skip
                if not m.bit(about, ("la", n), ("lb", n)):
                    break
                n += 1
            value = 1
            for depth in range(n - 1):
                tree = (min(n, 15), 1 << depth | (value & ((1 << depth) - 1))) if depth < 6 else 0
                about = [("b0", tree), ("b1", n, depth), ("b2", min(length(up), 15), tree)]
                value = value << 1 | m.bit(about, "ba", "bb")
            v[i][j] = -value if negative else value
            in_row += 1
            count[j] += 1
            last_sign, last_length = sign(v[i][j]), n
            signs[j] += last_sign
            lengths[j] = n
    return v


LOGARITHM = [int((32 * (1 + Decimal(m) / 256).ln() / Decimal(2).ln()).to_integral_value()) for m in range(256)]
ROOT = [int((65536 * Decimal(2) ** (-Decimal(2 * m + 1) / 16)).to_integral_value()) for m in range(8)]


def logarithm(x: int) -> int:
    n = x.bit_length() - 1
    return 32 * n + LOGARITHM[(x * 256 >> n) - 256]


def scaled_table(shape: list[int], scale: int, most: int, rare: int) -> list[int]:
    """Section 9.2."""
    sums = [sum(shape[:n]) * 2**24 // sum(shape) for n in range(113)]
    table = [0]
    for integer in range(1 - most, most + 1):
        h = 2 * integer - 1
        x = abs(h) * ROOT[scale % 8] >> (5 + scale // 8)
        k = max(x.bit_length() - 9, 0)
        position = min(8 * x if x < 256 else 2048 * k + (8 * x >> k), 14336)
        place = 14336 + (position if h > 0 else -position)
        n = min(place >> 8, 111)
        below = sums[n] + ((sums[n + 1] - sums[n]) * (place - 256 * n) >> 8)
        table.append(len(table) + (below * (2**20 - 2 * most - 1 - rare) >> 24))
    return [*table, 2**20 - rare, 2**20]


def scaled(source: Bytes, rows: int, columns: int) -> list[int]:
    """Section 9."""
    mean, by_row, by_column, most, lowest, classes, rare = (source.number() for _ in range(7))
    shape = adaptive(source.take(source.number()), 1, 112, 0, 0)[0]
    coded = source.take(source.number())
    larger = iter(tokens(source, source.number(), "static"))
    tables = [scaled_table(shape, lowest + c, most, rare) for c in range(classes)]
    lanes = 2 if rows * columns >= 4096 else 1
    states = list(struct.unpack(f"<{lanes}Q", coded[: 8 * lanes]))
    words = iter(struct.unpack(f"<{(len(coded) - 8 * lanes) // 4}I", coded[8 * lanes :]))
    relative = lambda total, count: logarithm(16 * total + 4 * mean) - logarithm((count + 4) * mean)  # noqa: E731
    out: list[int] = []
    totals, of_column = [0] * columns, [0] * columns
    for i in range(rows):
        if i < 8 or i % 8 == 0:
            of_column = [relative(total, i) for total in totals]
        total = of_row = 0
        for j in range(columns):
            if j < 8 or j % 8 == 0:
                of_row = relative(total, j)
            scale = min(max(logarithm(mean) + (by_column * of_column[j] >> 2) + (by_row * of_row >> 2), 0) >> 2, 191)
            table = tables[min(max(scale - lowest, 0), classes - 1)]
            x = states[len(out) % lanes]
            slot = x % 2**20
            symbol = next(s for s in range(len(table)) if table[s + 1] > slot)
            x = (table[symbol + 1] - table[symbol]) * (x >> 20) + slot - table[symbol]
            states[len(out) % lanes] = x << 32 | next(words) if x < 2**31 else x
            out.append(symbol - most if symbol <= 2 * most else next(larger))
            total += abs(out[-1])
            totals[j] += abs(out[-1])
    assert states == [2**31] * lanes
    assert next(words, None) is None
    assert next(larger, None) is None
    return out


def static(data: bytes, count: int, table: list[int]) -> list[int]:
    """Section 7."""
    if count == 0 or 16384 in table:
        return [table.index(16384)] * count if count else []
    owner = [symbol for symbol, frequency in enumerate(table) for _ in range(frequency)]
    starts = [sum(table[:symbol]) for symbol in range(len(table))]
    lanes = 4 if count >= 4096 else 1
    states = list(struct.unpack(f"<{lanes}I", data[: 4 * lanes]))
    words = iter(struct.unpack(f"<{(len(data) - 4 * lanes) // 2}H", data[4 * lanes :]))
    out = []
    for i in range(count):
        x = states[i % lanes]
        slot = x & 16383
        symbol = owner[slot]
        x = table[symbol] * (x >> 14) + slot - starts[symbol]
        states[i % lanes] = x << 16 | next(words) if x < 65536 else x
        out.append(symbol)
    assert states == [65536] * lanes
    assert next(words, None) is None
    return out


def huffman(data: bytes, count: int, lengths: list[int]) -> list[int]:
    """Section 6."""
    code, previous, codes = 0, 0, {}
    for size, symbol in sorted((size, symbol) for symbol, size in enumerate(lengths) if size):
        code <<= size - previous
        codes[f"{code:0{size}b}"] = symbol
        code, previous = code + 1, size
    bits, out, word = iter("".join(f"{byte:08b}" for byte in data)), [], ""
    while len(out) < count:
        word += next(bits)
        if word in codes:
            out.append(codes[word])
            word = ""
    return out


def tokens(source: Bytes, count: int, coding: str) -> list[int]:
    """Section 6."""
    size = source.number()
    table = adaptive(source.take(source.number()), 1, size, 0, 0)[0]
    coded = source.take(source.number())
    found = (static if coding == "static" else huffman)(coded, count, table)
    open_bits = [(token - 256) // 8 + 9 - 4 if token >= 256 else 0 for token in found]
    bits = iter("".join(f"{byte:08b}" for byte in source.take((sum(open_bits) + 7) // 8)))
    out = []
    for token, width in zip(found, open_bits, strict=True):
        folded = token if token < 256 else int(f"1{(token - 256) % 8:03b}" + "".join(next(bits) for _ in range(width)), 2)
        out.append(-(folded + 1) // 2 if folded % 2 else folded // 2)
    return out


def integers(source: Bytes, rows: int, columns: int, coding: int) -> list[int]:
    """The integers of a matrix, row by row."""
    if coding == 0:
        return [0] * (rows * columns)
    kind = "static" if coding in (1, 3) else "huffman"
    if coding in (1, 2):
        return tokens(source, rows * columns, kind)
    if coding in (3, 4):
        count = source.number()
        gaps, values = tokens(source, count, kind), tokens(source, count, kind)
        out = []
        for gap, value in zip(gaps, values, strict=True):
            out += [0] * (2 * gap if gap >= 0 else -2 * gap - 1) + [value]
        return out + [0] * (rows * columns - len(out))
    if coding == 6:
        return scaled(source, rows, columns)
    turned, width, period = source.number(), source.number(), source.number()
    code = source.take(source.number())
    if turned:
        matrix = adaptive(code, columns, rows, width, period)
        return [matrix[j][i] for i in range(rows) for j in range(columns)]
    return [value for row in adaptive(code, rows, columns, width, period) for value in row]


def tensor(source: Bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Section 4."""
    kind = np.dtype(dtype)
    count, size = math.prod(shape), kind.itemsize
    (code,) = source.take(1)
    what, coding = code & 15, code >> 4
    if what == 0:
        return source.take(count * size)
    if what == 2:
        return zstandard.ZstdDecompressor().decompress(source.take(source.number()), max_output_size=count * size)
    if what == 1:
        return planes(source, kind, count)
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, count)
    if what == 3:
        offset = int.from_bytes(source.take(size), "little")
        return b"".join(((k + offset) % 2 ** (8 * size)).to_bytes(size, "little") for k in integers(source, rows, columns, coding))
    if what == 4:
        (offset,) = source.take(1)
        halves = [k + offset for k in integers(source, rows, 2 * columns, coding)]
        return bytes(low | high << 4 for low, high in zip(halves[::2], halves[1::2], strict=True))
    if what == 5:
        entries, centre = source.number(), source.number()
        table = [source.take(size) for _ in range(entries)]
        return b"".join(table[k + centre] for k in integers(source, rows, columns, coding))
    length = source.number() if what > 11 else max(columns, 1)
    groups = -(-columns // length)
    layout = {0: 1, 1: rows, 2: columns, 3: rows * groups, 4: columns * -(-rows // length)}
    order = (what - 6) % 3 if what < 12 else what // 2 - 3
    steps = np.frombuffer(source.take(size * layout[order]), kind)
    found = []
    for place, k in enumerate(integers(source, rows, columns, coding)):
        row, column = divmod(place, columns)
        step = steps[{0: 0, 1: row, 2: column, 3: row * groups + column // length, 4: row // length * columns + column}[order]]
        minus = (8 < what < 12 or what in (13, 15)) and k < 0
        found.append(-(kind.type(-k - 1) * step) if minus else kind.type(k) * step)
    return np.array(found, kind).tobytes()


def planes(source: Bytes, kind: np.dtype, count: int) -> bytes:
    """Section 5."""
    size, parts = kind.itemsize, []
    for _ in range(size):
        entries = source.number()
        if entries == 0:
            parts.append(source.take(count))
            continue
        table = adaptive(source.take(source.number()), 1, entries, 0, 0)[0]
        parts.append(bytes(static(source.take(source.number()), count, table)))
    out = b""
    for each in zip(*parts, strict=True):
        entry = int.from_bytes(bytes(each), "little")
        if kind.kind == "f":
            entry = entry >> 1 | (entry & 1) << (8 * size - 1)
        out += entry.to_bytes(size, "little")
    return out


def read(data: bytes, dictionary: bytes) -> tuple[bytes, list[bytes]]:
    """Program and tensors of a file whose tensors are of numpy's types."""
    source = Bytes(data)
    assert source.take(5) == b"\x8dPRD\x01"
    (origin,) = source.take(1)
    size, packed = source.number(), source.number()
    unzstd = zstandard.ZstdDecompressor(
        dict_data=zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_AUTO), format=zstandard.FORMAT_ZSTD1_MAGICLESS
    )
    program = unzstd.decompress(source.take(packed), max_output_size=size)
    kinds = of_onnx(program) if origin else of_safetensors(program)
    sizes = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in kinds]
    blocks = [[index] for index, bytes_ in enumerate(sizes) if bytes_ > 65536]
    begun = False
    for index, bytes_ in enumerate(sizes):
        if bytes_ <= 65536:
            if not begun or sum(sizes[member] for member in blocks[-1]) + bytes_ > 65536:
                blocks.append([])
                begun = True
            blocks[-1].append(index)
    listed = [(source.number(), source.take(4)) for _ in blocks]
    covered = source.place
    assert source.take(4) == zlib.crc32(data[:covered]).to_bytes(4, "little")
    out: dict[int, bytes] = {}
    for members, (bytes_, crc) in zip(blocks, listed, strict=True):
        payload = source.take(bytes_)
        assert zlib.crc32(payload).to_bytes(4, "little") == crc
        inner = Bytes(payload)
        for member in members:
            out[member] = tensor(inner, *kinds[member])
        assert inner.place == len(payload)
    least = -(-(16 * len(program) + sum(sizes) - 2**24) // 256)
    assert len(data) == max(source.place, least)
    assert not any(data[source.place :])
    return program, [out[index] for index in range(len(kinds))]


def of_safetensors(program: bytes) -> list[tuple[str, tuple[int, ...]]]:
    names = {"F": "f", "I": "i", "U": "u"}
    header = json.loads(program)
    header.pop("__metadata__", None)
    found = sorted(header.values(), key=lambda entry: entry["data_offsets"])
    return [(f"<{names[entry['dtype'][0]]}{int(entry['dtype'][1:]) // 8}", tuple(entry["shape"])) for entry in found]


def of_onnx(program: bytes) -> list[tuple[str, tuple[int, ...]]]:
    model = onnx.ModelProto.FromString(program)
    found = []
    for each in model.graph.initializer:
        kind = onnx.helper.tensor_dtype_to_np_dtype(each.data_type)
        if len(each.raw_data) == 1 and kind.itemsize * math.prod(each.dims) >= 16:
            found.append((kind.str.replace("|", "<"), tuple(each.dims)))
    return found
