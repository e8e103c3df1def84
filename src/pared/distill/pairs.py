"""Pairs of layers: what a student's layer is to learn from, by name, or found by what the layers say."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.core.errors import SettingsError
from pared.core.problems import Problems
from pared.training import evaluating
from pared.training.check import run

_DEPTH, _SIZE, _PATH = 0.5, 0.1, 0.05
"""What a pair loses by lying at different depths (of a whole network), and gains by maps of one size, and by one name."""


class Feature(Protocol):
    """A loss on inner layers; its settings are a frozen dataclass.

    Attributes:
        layers: paths of the student's modules, each with that of the teacher's; None: found.
        weight: of the loss.
        adapts: whether both must have one shape, so that an adapter is needed.
        maps: whether layers must have places.
        most: how many pairs are taken where they are found; the last ones.
    """

    adapts: ClassVar[bool]
    maps: ClassVar[bool]
    most: ClassVar[int]

    @property
    def layers(self) -> Mapping[str, str] | None:
        """See above."""
        ...

    @property
    def weight(self) -> float:
        """See above."""
        ...

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair."""
        ...


class Pair(NamedTuple):
    """Two layers that belong together.

    Attributes:
        student, teacher: paths of modules.
        similarity: linear CKA of their outputs, 1 for outputs that are equal up to rotation, scale and shift.
    """

    student: str
    teacher: str
    similarity: float


class _Said(NamedTuple):
    """What a module said: its path, and its output."""

    path: str
    output: Tensor


def check_feature(problems: Problems, feature: Any) -> None:
    """Note what is wrong with the two settings that every feature loss has."""
    layers = feature.layers
    words = layers is None or (
        isinstance(layers, Mapping) and layers and all(isinstance(word, str) for pair in layers.items() for word in pair)
    )
    problems.check(bool(words), "layers", "a mapping of the student's module paths to the teacher's, or None", layers)
    problems.number("weight", feature.weight, low=0, high=1e9)


def match_layers(teacher: nn.Module, student: nn.Module, inputs: tuple[Tensor, ...], count: int = 3, *, maps: bool = False) -> list[Pair]:
    """Find which layer of the student belongs to which of the teacher.

    Both run once on the inputs. The student's modules, in the order in which they are called, are split into `count` parts of the same
    length; from each the pair is taken whose outputs are most alike (linear CKA of Kornblith et al. 2019, 1905.00414, without bias as in
    Nguyen et al. 2021, 2010.15327), less for layers at different depths, more for maps of one size. Pairs don't cross, and outputs of the
    whole networks are left out: `Teach` compares them anyway.

    Args:
        teacher, student: any modules; modes are put back.
        inputs: prepared, 32 samples or more; with fewer, similarities are mostly chance. At least 4.
        count: how many pairs; fewer, if there aren't so many.
        maps: only layers with places, (batch, channels, …).

    Returns:
        Pairs from the first to the last.

    Raises:
        SettingsError: if no two layers fit, or there are fewer than 4 samples.

    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> pairs = match_layers(teacher, teacher, (torch.randn(64, 4),), count=2)
    >>> all(pair.student == pair.teacher for pair in pairs), len(pairs)
    (True, 2)
    """
    if len(inputs[0]) < 4:
        raise SettingsError(f"distill.match_layers: inputs must be at least 4 samples. Got {len(inputs[0])}.")
    theirs, ours = (_candidates(model, inputs, maps) for model in (teacher, student))
    score, similarity = _scores(ours, theirs)
    parts = min(count, len(ours))
    cuts = [round(len(ours) * number / parts) for number in range(parts + 1)] if parts else [0]
    pairs = _best(score, cuts)
    if not pairs:
        raise SettingsError(
            "distill.match_layers: student and teacher must have inner layers of the same kind. Got none; name them in layers."
        )
    return [Pair(ours[row].path, theirs[column].path, float(similarity[row, column])) for row, column in pairs]


def cka(left: Tensor, right: Tensor) -> float:
    """Unbiased linear CKA of two layers' outputs for the same samples: near 0 for unrelated ones, 1 for equal ones.

    Args:
        left, right: shape (samples, …), at least 4 samples.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(cka(x, 3 * x + 1), 4)
    1.0
    """
    return float(_normalized_gram(left) @ _normalized_gram(right))


@contextlib.contextmanager
def listening(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, the dict has the output of every module's last call; of several tensors the first, of parts of a tuple too."""
    found: dict[str, Tensor] = {}
    handles = []

    def note(path: str, output: Any) -> None:
        tensor = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if tensor is not None:
            found[path] = tensor

    for path in paths:
        handles.append(model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: note(path, output)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _candidates(model: nn.Module, inputs: tuple[Tensor, ...], maps: bool) -> list[_Said]:
    """Inner layers in the order of their calls; where a container says what its last part said, it stands for both."""
    samples = len(inputs[0])
    with evaluating(model), listening(model, [path for path, _ in model.named_modules() if path]) as found:
        answer = run(model, inputs)
    last = {id(leaf) for leaf in pytree.tree_leaves(answer)}
    said: dict[int, _Said] = {}
    for path, output in found.items():
        fits = output.dim() > (2 if maps else 1) and len(output) == samples and output.is_floating_point() and output[0].numel() > 1
        if fits and id(output) not in last:
            said.pop(id(output), None)
            said[id(output)] = _Said(path, output)
    return list(said.values())


def _scores(ours: list[_Said], theirs: list[_Said]) -> tuple[Tensor, Tensor]:
    """How well each of the student's layers goes with each of the teacher's, and the CKA alone: shape (student's, teacher's)."""
    if not ours or not theirs:
        return torch.zeros(len(ours), len(theirs)), torch.zeros(len(ours), len(theirs))
    grams = [torch.stack([_normalized_gram(each.output) for each in said]) for said in (ours, theirs)]
    similarity = grams[0] @ grams[1].T
    score = similarity.clone()
    for row, one in enumerate(ours):
        for column, other in enumerate(theirs):
            if one.output.dim() != other.output.dim():
                score[row, column] = -torch.inf
                continue
            depth = abs((row + 1) / len(ours) - (column + 1) / len(theirs))
            same = one.output.dim() > 2 and one.output.shape[2:] == other.output.shape[2:]
            score[row, column] += _SIZE * same + _PATH * (one.path == other.path) - _DEPTH * depth
    return score, similarity


def _best(score: Tensor, cuts: list[int]) -> list[tuple[int, int]]:
    """One pair for each part of the rows with the greatest sum, columns ascending; parts that nothing fits have none."""
    columns = score.shape[1]
    # best[c]: the greatest sum so far with all columns before c, and its pairs
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])] * (columns + 1)
    for begin, end in itertools.pairwise(cuts):
        new = [best[0]]
        for column in range(columns):
            row = begin + int(score[begin:end, column].argmax())
            here = (best[column][0] + 2 + float(score[row, column]), [*best[column][1], (row, column)])  # 2: a pair more is always better
            new.append(max(new[-1], best[column + 1], here, key=lambda entry: entry[0]))
        best = new
    return best[-1][1]


def _normalized_gram(output: Tensor) -> Tensor:
    """The Gram matrix of the samples, centred without bias and of length 1, as one row."""
    rows = output.detach().reshape(len(output), -1).to(torch.float64)
    gram = rows @ rows.T
    gram.fill_diagonal_(0)
    count = len(gram)
    sums = gram.sum(1)
    centred = gram - (sums[:, None] + sums[None, :]) / (count - 2) + sums.sum() / ((count - 1) * (count - 2))
    centred.fill_diagonal_(0)
    length = centred.norm()
    return (centred / length if length > 0 else centred).flatten()
