"""All mutable state of the model: named one-dimensional numpy columns.

A column is zero wherever nothing was ever written, and zero always means "absent": an empty
page-table word, a free VMA row, an unlocked lock. So a column has no length that counts, its
storage grows when a row beyond its end is written, and two states are equal when they agree on
the blocks that either has touched. Columns of one table, which is what stands before the dot of
their names, grow together: who finds a row in one may read it in all.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hmmlab.model.alike import alike
from hmmlab.model.names import Names
from hmmlab.model.rows import Rows, first_and_last, unique_rows

__all__ = ["State"]

_BLOCK_SHIFT = 12
_BLOCK = 1 << _BLOCK_SHIFT
#: Bytes from which an array has a mapping of its own.
_LARGE = 1 << 18

# glibc's malloc keeps freed memory up to a threshold that rises to the largest mapping it was ever
# given back (mallopt(3)). It starts at the size of the blocks in which long passes go, so that each
# pass would ask the system for its arrays anew: a third of the time of a snapshot.
np.empty(1 << 24, np.uint8)


def _zeros(rows: int, dtype: DTypeLike) -> NDArray[Any]:
    """Zeros, of which only what is written takes memory.

    What malloc has been given back it hands out again, and numpy must write zeros over it; and it
    is madvised to be huge pages, of which one written row takes 2 MiB. A mapping is neither.
    """
    size = rows * np.dtype(dtype).itemsize
    if size < _LARGE or not hasattr(mmap, "MAP_PRIVATE"):
        return np.zeros(rows, dtype)
    fresh = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(fresh, dtype)


class _Column:
    """One array, and which of its blocks may hold something other than zero."""

    __slots__ = ("array", "touched")

    def __init__(self, dtype: DTypeLike, rows: int = _BLOCK) -> None:
        self.array: NDArray[Any] = _zeros(rows, dtype)
        self.touched = np.zeros(-(-rows // _BLOCK), np.bool_)

    def grow(self, rows: int) -> None:
        size = max(2 * self.array.size, -(-rows // _BLOCK) * _BLOCK)
        grown = _Column(self.array.dtype, size)
        for part in self.parts():
            grown.array[part] = self.array[part]
        grown.touched[: self.touched.size] = self.touched
        self.array, self.touched = grown.array, grown.touched

    def parts(self) -> Iterator[slice]:
        """Slices that cover the touched blocks, neighbours joined."""
        edges = np.flatnonzero(np.diff(self.touched, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2).tolist():
            yield slice(start << _BLOCK_SHIFT, min(stop << _BLOCK_SHIFT, self.array.size))

    def copy(self) -> _Column:
        twin = _Column(self.array.dtype, self.array.size)
        for part in self.parts():
            twin.array[part] = self.array[part]
        twin.touched = self.touched.copy()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What a copy in a file needs: the touched blocks, without the zeros at their ends."""
        values = [np.trim_zeros(self.array[part], "b") for part in self.parts()]
        return {
            "rows": self.array.size,
            "touched": self.touched,
            "sizes": [part.size for part in values],
            "values": np.concatenate([self.array[:0], *values]),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        values: NDArray[Any] = state["values"]
        self.array, self.touched = _zeros(state["rows"], values.dtype), state["touched"]
        at = 0
        for part, size in zip(self.parts(), state["sizes"], strict=True):
            self.array[part.start : part.start + size] = values[at : at + size]
            at += size

    def difference(self, other: _Column) -> NDArray[np.int64]:
        """Rows at which the two columns hold different values."""
        found = []
        for part in (*self.parts(), *other.parts()):
            rows = np.arange(part.start, part.stop)
            mine, theirs = np.zeros((2, rows.size), self.array.dtype)
            for column, values in ((self, mine), (other, theirs)):
                held = column.array[part.start : part.stop]
                values[: held.size] = held
            found.append(rows[mine != theirs])
        return unique_rows(np.concatenate(found)) if found else np.zeros(0, np.int64)


class State(Mapping[str, NDArray[Any]]):
    """A mapping from column names to arrays.

    Reading is free (``state["page.refcount"][rows]``); the arrays are longer than what is used and
    are replaced when a column grows, so fetch them anew after a write. Changing is the business of
    :class:`~hmmlab.model.machine.Machine`, which keeps a record of it, and of
    :class:`~hmmlab.model.trace.Replay`, which follows that record.

    Attributes
    ----------
    ram_pages
        Pages of RAM; where device memory has its rows follows from it.
    names
        The reader's names, which copies share.
    """

    def __init__(self, dtypes: Mapping[str, DTypeLike], ram_pages: int) -> None:
        self._columns = {name: _Column(dtype) for name, dtype in dtypes.items()}
        self.ram_pages = ram_pages
        self.names = Names()

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name].array

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        return self._columns.keys() == other._columns.keys() and not self.difference(other)

    __hash__ = None  # type: ignore[assignment]  # a state is mutable

    def is_blank(self, name: str, rows: Rows) -> bool:
        """Whether a column has ``rows``, and nothing was ever written near them: all are zero."""
        column = self._columns[name]
        first, last = first_and_last(rows)
        blocks = column.touched[first >> _BLOCK_SHIFT : (last >> _BLOCK_SHIFT) + 1]
        return first <= last < column.array.size and not np.count_nonzero(blocks)

    def alike(self, name: str, rows: Rows) -> NDArray[Any]:
        """``rows`` of a column, one for all where they are alike; not looked at where blank."""
        if self.is_blank(name, rows):
            return np.zeros(1, self._columns[name].array.dtype)
        return alike(self[name][rows])

    def put(self, name: str, rows: Rows, values: Any) -> None:
        """Set ``rows`` of the column ``name``, with no record of it."""
        self.reserve(name, rows)[rows] = values

    def reserve(self, name: str, rows: Rows) -> NDArray[Any]:
        """Make room for ``rows`` of the column ``name``, which are about to change; its array."""
        column = self._columns[name]
        first, last = (rows, rows) if type(rows) is int else first_and_last(rows)
        if last >= column.array.size:
            self._grow(name, last + 1)
        if first == last:
            column.touched[first >> _BLOCK_SHIFT] = True
        else:
            column.touched[first >> _BLOCK_SHIFT : (last >> _BLOCK_SHIFT) + 1] = True
        return column.array

    def _grow(self, name: str, rows: int) -> None:
        """Make room for ``rows`` rows in a column, and in the others of its table."""
        table, dot, _ = name.partition(".")
        for other, column in self._columns.items():
            if other == name or (dot and other.startswith(table + dot)):
                column.grow(rows)

    def copy(self) -> State:
        """A state of its own with the same values."""
        twin = State({}, self.ram_pages)
        twin.names = self.names
        twin._columns = {name: column.copy() for name, column in self._columns.items()}
        return twin

    def difference(self, other: State) -> dict[str, NDArray[np.int64]]:
        """Names of the columns that differ, each with its differing rows."""
        rows = {n: c.difference(other._columns[n]) for n, c in self._columns.items()}
        return {name: found for name, found in rows.items() if found.size}

    def used(self, name: str) -> int:
        """One more than the last touched row of a column, in whole blocks."""
        stops = [part.stop for part in self._columns[name].parts()]
        return stops[-1] if stops else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all touched blocks."""
        return sum(
            (part.stop - part.start) * column.array.itemsize
            for column in self._columns.values()
            for part in column.parts()
        )
