"""Every column, the one door through which they change, and who listens at it.

Rooms declare their columns with :meth:`Door.declare`, by the name ``Machine.declare``, when they
are imported; a new machine has them all.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hmmlab.model.alike import alike
from hmmlab.model.rows import Rows, ascend, descend, unique_rows
from hmmlab.model.state import State
from hmmlab.model.trace import Observer, Trace

__all__ = ["Door"]

#: Values that take a page or more.
_MANY = 1024


def _kept(values: NDArray[Any], *, same: bool = False) -> NDArray[Any]:
    """A copy of some values for whoever listens; of many that are the same, one stands for all."""
    if values.size < _MANY:
        return np.array(values)
    one = values[:1].copy() if same else alike(values)
    return np.broadcast_to(one, values.shape) if one.size == 1 else one.copy()


def _upwards(rows: Rows, values: Any) -> Rows:
    """The same rows, from low to high if one value is for all: half the time to change a slice."""
    if isinstance(rows, slice) and rows.step == -1 and np.size(values) == 1:
        return slice(rows.stop + 1, rows.start + 1)
    return rows


class Door(State):
    """Columns that change by :meth:`write` and :meth:`add` only; observers hear of each change."""

    _declared: ClassVar[dict[str, tuple[DTypeLike, str]]] = {}

    def __init__(self, ram_pages: int) -> None:
        super().__init__({name: dtype for name, (dtype, _) in self._declared.items()}, ram_pages)
        self._observers: list[Observer] = []

    # --- what rooms say when they are imported ----------------------------------------------------
    @classmethod
    def declare(cls, name: str, dtype: DTypeLike, meaning: str) -> str:
        """Give every machine a column ``name``; zero must mean "absent". Returns the name."""
        cls._declared[name] = (dtype, meaning)
        return name

    @classmethod
    def meaning(cls, column: str) -> str:
        """What a column holds, in words."""
        return cls._declared[column][1]

    # --- changing ---------------------------------------------------------------------------------
    def write(self, column: str, rows: Rows, values: Any) -> None:
        """Set ``rows`` (unique) of ``column`` to ``values``. The only way to change a column.

        Where nothing was ever written, 0 is there already, and is not written.
        """
        zero = type(values) is int and not values
        if zero and type(rows) is not int and self.is_blank(column, rows):
            return
        array = self.reserve(column, rows)
        if not self._observers:
            array[_upwards(rows, values)] = values
            return
        old = _kept(array[rows])
        array[rows] = values
        self.tell("wrote", column, rows, old, _kept(array[rows], same=not np.ndim(values)))

    def add(self, column: str, rows: Rows, delta: Any) -> None:
        """Add ``delta`` to ``rows`` of ``column``, once for each time that a row stands there."""
        array = self.reserve(column, rows)
        if isinstance(rows, (slice, int, np.integer)):
            if self._observers:
                self.write(column, rows, array[rows] + delta)
            else:
                array[_upwards(rows, delta)] += delta
            return
        amount = np.asarray(delta).astype(array.dtype)  # another dtype is two hundred times slower
        if not amount.ndim and (ascend(rows) or descend(rows)):
            self.write(column, rows, array[rows] + amount)
            return
        if not self._observers:
            np.add.at(array, rows, amount)
            return
        unique = unique_rows(rows)
        old = array[unique]
        np.add.at(array, rows, amount)
        self.tell("wrote", column, unique, old, array[unique])

    def take(self, column: str) -> int:
        """First row of ``column`` that is zero: a free place in a table of records."""
        free = self[column][1:] == 0
        first = int(free.argmax())
        return 1 + (first if free[first] else free.size)

    # --- who listens ------------------------------------------------------------------------------
    def tell(self, what: str, *args: Any) -> None:
        """Tell every observer."""
        for observer in self._observers:
            getattr(observer, what)(*args)

    def tell_called(self, number: int, calls: tuple[tuple[int, str], ...]) -> None:
        """Tell who wants to know what an operation called after its last step (``called``)."""
        for observer in self._observers:
            if hook := getattr(observer, "called", None):
                hook(number, calls)

    @property
    def observed(self) -> bool:
        """Whether anybody listens; nobody needs a record otherwise."""
        return bool(self._observers)

    def attach(self, observer: Observer) -> None:
        """Let an observer hear all that happens from now on."""
        self._observers.append(observer)

    def detach(self, observer: Observer) -> None:
        """Let an observer hear no more."""
        self._observers.remove(observer)

    def record(self) -> Trace:
        """Record from now on. Returns the trace, which grows with every operation."""
        trace = Trace(self.copy())
        self.attach(trace)
        return trace
