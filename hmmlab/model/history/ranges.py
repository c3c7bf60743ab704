"""Ranges that somebody has looked up and is not done with: the list ``hmm->ranges``, 4.14 to 5.4.

Source: mm/hmm.c, include/linux/hmm.h (``struct hmm_range``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hmmlab.model.entry import Words
from hmmlab.model.machine import Machine
from hmmlab.model.mmu_notifier import MmuNotifierRange
from hmmlab.model.state import State

__all__ = [
    "TrackedRange",
    "invalidate_ranges",
    "is_valid",
    "range_done",
    "ranges_of",
    "track",
    "untrack",
]

Machine.declare("hmm_range.hmm", np.int32, "4.14: struct hmm that tracks the range; 0 is free")
Machine.declare("hmm_range.start", np.int64, "4.14: first page of the range")
Machine.declare("hmm_range.end", np.int64, "4.14: page past the last of the range")
Machine.declare("hmm_range.valid", np.int32, "4.14: 1 while nothing of it has changed")


def _no_pfns() -> Words:
    return np.zeros(0, np.uint64)


@dataclass
class TrackedRange:
    """A looked-up range (``struct hmm_range``).

    Attributes
    ----------
    start, end
        Pages ``start`` to ``end - 1``.
    pfns
        uint64 of shape (end - start,), the driver's array, in the encoding of its kernel.
    row
        Row of the ``hmm_range.*`` columns while it is on the list, else 0.
    """

    start: int = 0
    end: int = 0
    pfns: Words = field(default_factory=_no_pfns)
    row: int = field(default=0, init=False)

    def part(self, start: int, end: int) -> slice:
        """Where pages ``start`` to ``end - 1`` stand in ``pfns``."""
        return slice(start - self.start, end - self.start)


def is_valid(state: State, range: TrackedRange) -> bool:
    """``range->valid``: whether nothing of the range is known to have changed."""
    return bool(range.row and state["hmm_range.valid"][range.row])


def track(machine: Machine, hmm: int, range: TrackedRange, *, valid: bool) -> None:
    """Put a range on the list."""
    range.row = machine.take("hmm_range.hmm")
    for column, value in (
        ("hmm", hmm),
        ("start", range.start),
        ("end", range.end),
        ("valid", int(valid)),
    ):
        machine.write(f"hmm_range.{column}", range.row, value)
    machine.objects.setdefault("hmm_range", {})[range.row] = range


def untrack(machine: Machine, range: TrackedRange) -> bool:
    """Take a range off the list. Returns whether it was valid."""
    valid = is_valid(machine, range)
    if range.row:
        for column in ("hmm", "start", "end", "valid"):
            machine.write(f"hmm_range.{column}", range.row, 0)
        range.row = 0
    return valid


def range_done(machine: Machine, range: TrackedRange) -> bool:
    """Take a range off the list, as ``hmm_vma_range_done`` of 4.14 to 5.1 does.

    Raises
    ------
    ValueError
        For an empty range, where the kernel stops with BUG().
    """
    if range.end <= range.start:
        raise ValueError(f"range of pages {range.start:#x} to {range.end:#x} was never looked up")
    return untrack(machine, range)


def ranges_of(state: State, hmm: int) -> np.ndarray:
    """Rows of the ranges that a struct hmm tracks, int64."""
    return np.flatnonzero(state["hmm_range.hmm"] == hmm)


def invalidate_ranges(machine: Machine, hmm: int, change: MmuNotifierRange, *, wipe: bool) -> None:
    """Mark every range that a change touches, and empty those pfns where ``wipe``.

    A change that ends where the range begins counts as touching it: the kernel compares with
    "less", where "less or equal" was meant.
    """
    rows = ranges_of(machine, hmm)
    start, end = int(change.start[0]), int(change.end[-1])
    touched = (end >= machine["hmm_range.start"][rows]) & (start < machine["hmm_range.end"][rows])
    rows = rows[touched]
    if not rows.size:
        return
    machine.write("hmm_range.valid", rows, 0)
    if wipe:
        for row in rows.tolist():
            range: TrackedRange = machine.objects["hmm_range"][row]
            first = max(start, range.start)
            range.pfns[range.part(first, max(first, min(end, range.end)))] = 0
