"""What the rows say, and the tables of the card."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from pared.lab.claims import judged
from pared.lab.experiment import Row, Verdict

LOST, SAME, FASTER, AGREEMENT = 0.1, 0.999, 1.5, 0.95
FOUR_BITS_LOST, TWO_BITS_BEHIND = 0.2, 0.1

Line = tuple[str, ...]


def judge(rows: Sequence[Row]) -> Verdict:
    """Every part of the claim whose rows are there."""
    small = [row for row in rows if "test" in row]
    claims: dict[str, bool] = {}
    for net in dict.fromkeys(row["net"] for row in small):
        change = statistics.fmean(row["test"]["int8"] - row["test"]["float"] for row in small if row["net"] == net)
        claims[f"{net} loses at most {LOST:g} points with int8 ({change:+.2f} points of test error)"] = round(change, 3) <= LOST
    if small:
        same = min(row["same"] for row in small)
        claims[f"file and simulation say the same for at least 99.9 % of test pictures ({100 * same:.2f} %)"] = same >= SAME
    for row in rows:
        claims |= _of_photos(row) | _of_convolutions(row)
    claims |= _of_few_bits(rows)
    found = judged(claims, tuple(line for row in rows for line in _table(row)))
    return dataclasses.replace(found, text=found.text + _remarks(rows))


def _of_few_bits(rows: Sequence[Row]) -> dict[str, bool]:
    """On means over seeds; of rounding, on every layer of every seed."""
    few = [row for row in rows if row.get("layers")]
    if not few:
        return {}
    pairs = ("lsq 4", "float"), ("lsq 2", "pact 2")
    four, behind = (statistics.fmean(row["test"][one] - row["test"][other] for row in few) for one, other in pairs)
    cases = [each for row in few for each in row["layers"]]
    worse = [each for each in cases if not max(each["gptq"], each["adaround"]) < each["nearest"]]
    net = few[0]["net"]
    return {
        f"{net} with 4 bits is within {FOUR_BITS_LOST:g} points of float ({four:+.2f})": round(four, 3) <= FOUR_BITS_LOST,
        f"with 2 bits LSQ is at most {TWO_BITS_BEHIND:g} points behind PACT ({behind:+.2f})": round(behind, 3) <= TWO_BITS_BEHIND,
        f"GPTQ and AdaRound are below nearest in all {len(cases)} cases of layers and bits ({len(worse)} are not)": not worse,
    }


def _of_photos(row: Row) -> dict[str, bool]:
    if "arms" not in row:
        return {}
    # a tool that left the convolutions in float didn't make the network int8
    shares = {name: arm["agreement"] for name, arm in row["arms"].items() if "agreement" in arm and arm.get("layers") != 0}
    chosen = max((name for name in shares if name.startswith("pared")), key=lambda name: row["arms"][name]["valid"])
    ours = shares[chosen]
    claims = {f"EfficientNet-Lite0 keeps {100 * AGREEMENT:g} % of its answers ({chosen}: {100 * ours:.1f} %)": ours >= AGREEMENT}
    others = [(share, name) for name, share in shares.items() if not name.startswith("pared")]
    if others:
        best = max(others)
        claims[f"no other tool's network keeps more ({best[1]}: {100 * best[0]:.1f} %)"] = best[0] <= ours
    return claims


def _of_convolutions(row: Row) -> dict[str, bool]:
    if row["net"] != "convolutions":
        return {}
    least = min(each["float"] / each["int8"] for each in row["ms"].values())
    return {f"convolutions of the sizes of ResNet-18 are at least {FASTER:g} times as fast in int8 ({least:.2f} times)": least >= FASTER}


def _remarks(rows: Sequence[Row]) -> str:
    few = [row["same few"] for row in rows if "same few" in row]
    return f" With 4 and 2 bits file and simulation say the same for at least {100 * min(few):.2f} % of test pictures." if few else ""


def _table(row: Row) -> tuple[Line, ...]:
    if row["net"] == "convolutions":
        return tuple((f"3x3 convolutions, {name}", "float, int8, ms", *_ratio(each)) for name, each in row["ms"].items())
    if "arms" in row:
        return tuple((f"EfficientNet-Lite0, {name}", _share(arm), _cost(arm), "") for name, arm in row["arms"].items())
    key, lines = row["key"], []
    for name, error in row["test"].items():
        size = f"{row['bytes'][name]:,} bytes, file"
        time = f"{row['ms'][name]:.3f} ms" if name in row["ms"] else ""
        lines.append((f"{key}, {name}", f"{error:.2f} % test error", size, time))
    for each in row["layers"]:
        errors = (f"{way} {100 * each[way]:.3g}" for way in ("nearest", "adaround", "gptq"))
        lines.append((f"{key}, {each['layer']}, {each['bits']} bits", "squared error of outputs, %", ", ".join(errors), ""))
    return tuple(lines)


def _ratio(times: dict[str, float]) -> tuple[str, str]:
    return f"{times['float']:.2f}, {times['int8']:.2f}", f"{times['float'] / times['int8']:.2f} times"


def _share(arm: dict[str, Any]) -> str:
    return f"{100 * arm['agreement']:.1f} % as the original" if "agreement" in arm else ""


def _cost(arm: dict[str, Any]) -> str:
    size = f"{arm['bytes']:,.0f} bytes" if "bytes" in arm else "simulated, no file"
    size += f", {arm['layers']:.0f} of 49 convolutions in int8" if "layers" in arm else ""
    return f"{size}, {arm['ms']:.1f} ms" if "ms" in arm else size
