"""A file taken apart: its program, and the tensors that were in it."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pared.codec.elements import Layout


class Tensor(NamedTuple):
    """A tensor of a file by its name.

    `name` is that in the file, or made up where the file has none or has it twice; `layout` is what it is made of.
    """

    name: str
    layout: Layout


@dataclass(frozen=True)
class Split:
    """What packing starts from.

    Args:
        program: all of the file but the tensors' entries.
        tensors: in the order in which `program` names them.
        data: the entries of each.
    """

    program: bytes
    tensors: Sequence[Tensor]
    data: Sequence[bytes | memoryview]


def mapped(path: Path) -> memoryview:
    """The bytes of a file, read as they are looked at."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b"")


def unique_names(names: Sequence[str]) -> list[str]:
    """Names in the same order, none empty and none twice.

    >>> unique_names(["a", "", "a", ""])
    ['a', '#1', 'a#2', '#3']
    """
    longest = max((len(run) for name in names for run in re.findall("#+", name)), default=0)
    mark = "#" * (longest + 1)  # longer than in any name, so that no name is made twice
    seen: set[str] = set()
    out: list[str] = []
    for index, name in enumerate(names):
        fresh = name if name and name not in seen else f"{name}{mark}{index}"
        seen.add(fresh)
        out.append(fresh)
    return out
