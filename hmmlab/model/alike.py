"""One for all: what is the same for each of many pages, kept once.

In a long range mostly all pages are alike. A value or a mask that is the same for each of n pages
may be an array of shape (1,) instead of (n,): it stands for all, and broadcasts against the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["alike", "all_of", "any_of", "how_many", "not_zero", "part_of", "rows_where", "some"]


def alike(values: NDArray[Any]) -> NDArray[Any]:
    """``values``, of shape (n,), or where all are equal the first of them, of shape (1,)."""
    if values.size > 1 and values[0] == values[-1]:
        upwards = values if values.strides[0] > 0 else values[::-1]  # which is twice as fast
        if np.count_nonzero(upwards == values[0]) == values.size:
            return values[:1].copy()
    return values


def any_of(values: NDArray[Any]) -> bool:
    """Whether any of ``values``, of shape (n,) or one for all, is True, or not zero.

    ``values.any()`` says the same, and takes a microsecond for a single one.
    """
    return bool(values[0]) if values.size == 1 else bool(np.count_nonzero(values))


def all_of(values: NDArray[Any]) -> bool:
    """Whether all of ``values``, of shape (n,) or one for all, are True, or not zero."""
    return bool(values[0]) if values.size == 1 else bool(np.count_nonzero(values) == values.size)


def not_zero(values: NDArray[np.unsignedinteger]) -> NDArray[np.bool_]:
    """Which of some unsigned numbers are not zero, one for all where all are."""
    if values.size and values.min():  # which takes half as long as to compare
        return np.array([True])
    return values != 0


def how_many(mask: NDArray[np.bool_], size: int) -> int:
    """How many of ``size`` rows a mask chooses, of shape (size,) or one for all."""
    return size * bool(mask[0]) if mask.size == 1 else int(np.count_nonzero(mask))


def rows_where(mask: NDArray[np.bool_], size: int) -> slice | NDArray[np.int64]:
    """The rows of ``size`` that a mask chooses, of shape (size,) or one for all.

    A slice where it is all or none.
    """
    count = how_many(mask, size)
    return slice(0, count) if count in (0, size) else np.flatnonzero(mask)


def part_of(rows: slice | NDArray[np.int64], first: int, last: int) -> slice | NDArray[np.int64]:
    """The rows number ``first`` to ``last - 1`` of what :func:`rows_where` says."""
    return rows[first:last] if isinstance(rows, np.ndarray) else slice(first, last)


def some(values: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """The masked ones of ``values``: themselves, and no copy, where all are masked.

    Either may be one for all; values that are so stay so.
    """
    if mask.size == 1 or values.size == 1:
        return values if any_of(mask) else values[:0]
    return values if np.count_nonzero(mask) == mask.size else values[mask]
