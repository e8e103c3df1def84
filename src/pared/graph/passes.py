"""The pass over a graph that a rule talks to.

The analysis (`analysis_pass.py`) gives out atoms and notes what rules say of them. The cutter (`cut_pass.py`) runs the same
rules on what is left of the atoms, and checks that what they say still holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from torch import fx

from pared.core.errors import ModelError
from pared.graph.labels import Atoms

T = TypeVar("T")


class Violation(ModelError):
    """A choice of what to remove that the graph can't follow; `node` is where it was noticed."""

    def __init__(self, node: fx.Node, message: str) -> None:
        self.node = node
        super().__init__(f"{node.name}: {message}")


class Emptied(Violation):
    """An axis from which everything would be removed; `atoms` are those of the axis."""

    def __init__(self, node: fx.Node, atoms: Atoms) -> None:
        self.atoms = atoms
        super().__init__(node, "all indices of an axis would be removed")


class Pass(ABC):
    """What a rule may ask while it handles `node`."""

    node: fx.Node
    cutting: bool

    def __init__(self) -> None:
        self._memory: dict[tuple[fx.Node, str], Any] = {}

    def memo(self, key: str, compute: Callable[[], T]) -> T:
        """A decision about this node: taken by the analysis, repeated by the cutter."""
        if (self.node, key) not in self._memory:
            self._memory[self.node, key] = compute()
        return self._memory[self.node, key]

    def violate(self, message: str) -> NoReturn:
        """Stop: the graph can't be followed here."""
        raise Violation(self.node, message)

    @abstractmethod
    def shape(self) -> Any:
        """Shape of the node's output (a list of shapes for several outputs)."""

    @abstractmethod
    def fresh(self, shape: Sequence[int]) -> Atoms:
        """New atoms."""

    @abstractmethod
    def tie(self, left: Atoms, right: Atoms) -> None:
        """Atoms at equal places live and die together."""

    @abstractmethod
    def link(self, cells: Atoms, rows: Atoms | None) -> None:
        """Row i of `cells` vanishes as a whole exactly when `rows[i]` does (None: never)."""

    @abstractmethod
    def grid(self, cells: Atoms) -> None:
        """The rows of `cells` that stay keep equally many cells."""

    @abstractmethod
    def freeze(self, atoms: Atoms, why: str) -> None:
        """These atoms stay."""

    @abstractmethod
    def inexact(self, atoms: Atoms, why: str) -> None:
        """Removing some of these atoms changes what the others compute."""

    @abstractmethod
    def position(self, argument: int, axis: int, position: int) -> int:
        """Where the index `position` of the uncut argument lies now (the number of kept indices before it)."""

    @abstractmethod
    def rewrite(self, name: int | str, value: Any) -> None:
        """Change a literal argument of the node (by place or keyword); the analysis ignores it."""

    @abstractmethod
    def rewrite_sizes(self, argument: int, sizes: Sequence[int], first: int = 0) -> None:
        """Change the list of sizes of a reshape, expand or constructor; `first` is the axis that the list begins with."""

    @abstractmethod
    def retarget(self, name: str, *arguments: Any) -> None:
        """Replace the operator by another that takes its first argument and these."""

    def free_axes(self, argument: int, sizes: Sequence[int]) -> list[int]:
        """Axes whose size is a number written in the graph (not the batch, not -1)."""
        given = self.node.args[argument] if argument < len(self.node.args) else ()
        literal = given if isinstance(given, list | tuple) else ()
        return [axis for axis, entry in enumerate(literal) if isinstance(entry, int) and entry >= 0 and axis < len(sizes)]

    @abstractmethod
    def is_parameter(self, argument: int) -> bool:
        """Whether an argument is a parameter or buffer itself, not something computed."""

    @abstractmethod
    def producer(self, argument: int | tuple[int, int], atoms: Atoms, view: Callable[[Any], Any]) -> None:
        """`view(parameter)` has one row for each of `atoms`: the weights that make that index. A pair names an entry of a list."""

    @abstractmethod
    def places(self, atoms: Atoms, original: Atoms) -> Atoms:
        """Where each of `atoms` stood in `original`, the same axis before the cut."""

    @abstractmethod
    def gather_blocks(self, argument: int, rows: Atoms, columns: Atoms) -> None:
        """Cut a grouped weight whose groups keep different columns: group k takes `rows` (in equal shares) and `columns[k]`."""
