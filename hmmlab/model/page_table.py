"""The four-level page tables, as pools: one flat column of words a level.

Table ``t`` of a level is rows ``512 * t`` to ``512 * t + 511`` of that level's column, so a process
and a device file are just different roots, and a range of pages is a few slices of the ``pte``
column. Table 0 of each level is never used: a word that is 0 points nowhere. A PMD word that maps
2 MiB itself has the HUGE bit and still names the table that waits behind it, as in Linux a table is
deposited with every huge page; here that table holds the 512 words that the huge one stands for.
Tables are allocated when they are first needed and freed as the kernel frees them.

Source: arch/x86/include/asm/pgtable.h; mm/memory.c (``__pte_alloc``, ``free_pgtables``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hmmlab.model.entry import HUGE, TABLE, Words
from hmmlab.model.geometry import (
    ENTRIES,
    LEVEL_PAGES,
    LEVELS,
    PAGE_SHIFT,
    PMD_PAGES,
    PUD_PAGES,
    align_down,
    align_up,
    index,
)
from hmmlab.model.machine import Machine
from hmmlab.model.rows import Rows
from hmmlab.model.state import State

__all__ = [
    "Run",
    "alloc_tables",
    "drop_table",
    "free_pgtables",
    "free_root",
    "has_table",
    "huge_blocks",
    "is_huge",
    "look_at_range",
    "new_root",
    "populated_pmds",
    "read_range",
    "rows_of",
    "rows_of_range",
    "set_huge",
    "table_of",
    "walk",
    "word_row",
]

for _number, _level in enumerate(LEVELS):
    Machine.declare(_level, np.uint64, f"words of the {_level.upper()} tables, 512 a table")
    Machine.declare(f"{_level}.free_list", np.int64, f"free {_level.upper()} tables")
Machine.declare("table.used", np.int64, "tables of a level handed out at least once")
Machine.declare("table.free", np.int64, "tables of a level on its free list")

_BELOW = {"pgd": "pud", "pud": "pmd", "pmd": "pte"}

#: What the PMD word of the next table has more than that of the one before it in the pool.
_NEXT_TABLE = np.uint64(1 << PAGE_SHIFT)


class Run(NamedTuple):
    """Pages ``start`` to ``stop - 1`` of a walk that lie side by side.

    ``row`` is the row of the first page's word in the ``pte`` column, the others follow; -1 where
    no table is, and then ``level`` is the level whose word is empty. ``huge`` says that PMD words
    map the pages, 2 MiB each.
    """

    start: int
    stop: int
    row: int
    level: str
    huge: bool = False


# --- tables ---------------------------------------------------------------------------------------


def _new_tables(machine: Machine, level: str, count: int) -> np.ndarray:
    """Numbers of ``count`` empty tables of ``level``, contiguous where they are fresh."""
    number = LEVELS.index(level)
    free, used = int(machine["table.free"][number]), int(machine["table.used"][number])
    recycled = min(count, free)
    fresh = count - recycled
    tables = np.concatenate(
        [
            machine[f"{level}.free_list"][free - recycled : free],
            np.arange(used + 1, used + 1 + fresh),
        ]
    )
    if recycled:
        machine.write("table.free", number, free - recycled)
    if fresh:
        machine.write("table.used", number, used + fresh)
        machine.write(level, int((used + fresh + 1) * ENTRIES - 1), 0)  # so a replay has room too
    return tables


def _give_back(machine: Machine, level: str, tables: np.ndarray) -> None:
    number = LEVELS.index(level)
    free = int(machine["table.free"][number])
    machine.write(f"{level}.free_list", slice(free, free + tables.size), tables)
    machine.write("table.free", number, free + tables.size)


def _point_to(tables: np.ndarray) -> Words:
    return (tables.astype(np.uint64) << np.uint64(PAGE_SHIFT)) | np.uint64(TABLE)


def _pointed(word: int) -> int:
    """Number of the table that a word points to, 0 for none."""
    return word >> PAGE_SHIFT


def new_root(machine: Machine) -> int:
    """Number of a new, empty PGD table."""
    return int(_new_tables(machine, "pgd", 1)[0])


def free_root(machine: Machine, root: int) -> None:
    """Free an empty PGD table."""
    _give_back(machine, "pgd", np.array([root]))


def table_of(state: State, root: int, vpn: int, level: str) -> int:
    """Number of the table of ``level`` on the way to ``vpn``, 0 where there is none."""
    table = root
    for upper in LEVELS[: LEVELS.index(level)]:
        if not table:
            return 0
        table = _pointed(state[upper].item(table * ENTRIES + index(vpn, upper)))
    return table


def word_row(state: State, root: int, vpn: int, level: str = "pte") -> int:
    """Row of the word for ``vpn`` in the column of ``level``, -1 where no table is."""
    table = table_of(state, root, vpn, level)
    return table * ENTRIES + index(vpn, level) if table else -1


def alloc_tables(machine: Machine, root: int, start: int, stop: int, level: str = "pte") -> None:
    """Make sure that every table down to ``level`` exists for pages ``start`` to ``stop - 1``."""
    if level == "pte" and all(run.row >= 0 for run in walk(machine, root, start, stop)):
        return  # mostly, and seen with one look
    for upper in LEVELS[: LEVELS.index(level)]:
        span = LEVEL_PAGES[upper] * ENTRIES
        at = start
        while at < stop:  # over tables of this level
            end = min(stop, align_down(at, span) + span)
            table = table_of(machine, root, at, upper) * ENTRIES
            rows = slice(table + index(at, upper), table + index(end - 1, upper) + 1)
            words = machine[upper][rows]
            if np.count_nonzero(words) < words.size:
                missing = (words == 0).nonzero()[0]
                tables = _new_tables(machine, _BELOW[upper], missing.size)
                machine.write(upper, rows.start + missing, _point_to(tables))
            at = end


# --- walks ----------------------------------------------------------------------------------------


def walk(state: State, root: int, start: int, stop: int) -> Iterator[Run]:
    """Runs of pages from ``start`` to ``stop``, ascending.

    A run with words ends where the next table does not follow the last one in the pool; a run
    without covers neighbouring empty words of one level.
    """
    at = start
    while at < stop:
        table = root
        for level in ("pgd", "pud"):
            word = state[level].item(table * ENTRIES + index(at, level))
            if not word:
                size = LEVEL_PAGES[level]
                end = min(stop, align_down(at, size) + size)
                yield Run(at, end, -1, level)
                at = end
                break
            table = _pointed(word)
        else:
            end = min(stop, align_down(at, PUD_PAGES) + PUD_PAGES)
            yield from _walk_pmd_table(state, table * ENTRIES + index(at, "pmd"), at, end)
            at = end


def _walk_pmd_table(state: State, row: int, start: int, stop: int) -> Iterator[Run]:
    count = -(-stop // PMD_PAGES) - start // PMD_PAGES
    words = state["pmd"][row : row + count]
    first = words.item(0)
    table = _pointed(first)
    if table and (count == 1 or (words[1:] - words[:-1] == _NEXT_TABLE).all()):  # all in a row
        huge = bool(first & HUGE)
        yield Run(start, stop, table * ENTRIES + index(start, "pte"), "pmd", huge)
        return
    yield from _walk_scattered(words, start, stop)


def _walk_scattered(words: Words, start: int, stop: int) -> Iterator[Run]:
    """Runs among pages whose PMD words are ``words``."""
    huge = (words & HUGE) != 0
    tables = (words >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    step = np.where(tables[1:] == 0, tables[:-1] == 0, tables[1:] == tables[:-1] + 1)
    step &= ((tables[1:] == 0) == (tables[:-1] == 0)) & (huge[1:] == huge[:-1])
    cuts = [0, *(np.flatnonzero(~step) + 1), words.size]
    base = align_down(start, PMD_PAGES)
    for first, last in pairwise(cuts):
        a = max(start, base + int(first) * PMD_PAGES)
        b = min(stop, base + int(last) * PMD_PAGES)
        table = int(tables[first])
        row_of_a = table * ENTRIES + index(a, "pte") if table else -1
        yield Run(a, b, row_of_a, "pmd", bool(huge[first]))


def read_range(state: State, root: int, start: int, stop: int) -> Words:
    """Words of pages ``start`` to ``stop - 1``, uint64 of shape (stop - start,), 0 in holes."""
    return look_at_range(state, root, start, stop).copy()


def look_at_range(state: State, root: int, start: int, stop: int) -> Words:
    """As :func:`read_range`, and maybe a view of the column: good until a word is changed."""
    runs = list(walk(state, root, start, stop))
    if len(runs) == 1 and runs[0].row >= 0:
        return state["pte"][runs[0].row : runs[0].row + stop - start]
    words = np.zeros(max(stop - start, 0), np.uint64)
    for run in runs:
        if run.row >= 0:
            size = run.stop - run.start
            words[run.start - start : run.stop - start] = state["pte"][run.row : run.row + size]
    return words


def rows_of_range(state: State, root: int, start: int, stop: int) -> Rows:
    """Rows in the ``pte`` column of pages ``start`` to ``stop - 1``, all of which have tables."""
    runs = list(walk(state, root, start, stop))
    if len(runs) == 1:
        return slice(runs[0].row, runs[0].row + stop - start)
    return np.concatenate([np.arange(r.row, r.row + r.stop - r.start) for r in runs])


def populated_pmds(state: State, root: int, start: int, stop: int) -> list[tuple[int, int]]:
    """For each 1 GiB run that has one: the first populated PMD's page, and the run's end.

    Both are clipped to the range. "Populated" means that a page table hangs there, even an empty
    one (``change_pmd_range``).
    """
    found = []
    at = start
    while at < stop:
        end = min(stop, align_down(at, PUD_PAGES) + PUD_PAGES)
        first = next((run for run in walk(state, root, at, end) if run.row >= 0), None)
        if first:
            found.append((first.start, end))
        at = end
    return found


# --- huge pages -----------------------------------------------------------------------------------


def is_huge(state: State, root: int, vpn: int) -> bool:
    """Whether a PMD word maps page ``vpn``."""
    row = word_row(state, root, vpn, "pmd")
    return row >= 0 and bool(state["pmd"].item(row) & HUGE)


def huge_blocks(state: State, root: int, vpns: np.ndarray) -> np.ndarray:
    """Which of ``vpns`` (int64, ascending) a PMD word maps, or one for all where it is none."""
    if not vpns.size:
        return np.zeros(0, np.bool_)
    found = np.array([False])
    for run in walk(state, root, int(vpns[0]), int(vpns[-1]) + 1):
        if run.huge:
            found = found if found.size == vpns.size else np.zeros(vpns.size, np.bool_)
            found[np.searchsorted(vpns, run.start) : np.searchsorted(vpns, run.stop)] = True
    return found


def has_table(state: State, root: int, vpn: int) -> bool:
    """Whether the PMD word of ``vpn`` is not empty."""
    return table_of(state, root, vpn, "pte") != 0


def set_huge(machine: Machine, root: int, first: int, huge: bool) -> None:
    """Let the PMD word of the 2 MiB from page ``first`` on map them itself, or its table do so."""
    row = word_row(machine, root, first, "pmd")
    word = int(machine["pmd"][row])
    machine.write("pmd", row, word | HUGE if huge else word & ~HUGE)


def drop_table(machine: Machine, root: int, first: int) -> None:
    """Empty the PMD word of the 2 MiB from page ``first`` on, and free the table behind it."""
    row = word_row(machine, root, first, "pmd")
    table = _pointed(machine["pmd"].item(row))
    machine.write("pmd", row, 0)
    _give_back(machine, "pte", np.array([table]))


# --- freeing --------------------------------------------------------------------------------------


def free_pgtables(
    machine: Machine, root: int, start: int, stop: int, floor: int, ceiling: int
) -> int:
    """Free the tables that only served pages ``start`` to ``stop - 1``. Returns how many.

    ``floor`` is the end of the mapping below and ``ceiling`` the start of the mapping above, in
    pages: a table whose span reaches past either still serves a neighbour (``free_pgd_range``).
    """
    freed = 0
    serving = _tables_of(machine, root, start, stop)
    for level in ("pte", "pmd", "pud"):
        upper = LEVELS[LEVELS.index(level) - 1]
        span = LEVEL_PAGES[upper]
        low, high = align_down(start, span), align_up(stop, span)
        if low < floor:
            low += span
        if high > ceiling:
            high -= span
        for base, table in serving[upper]:
            at, end = max(low, base), min(high, base + span * ENTRIES)
            if at >= end:
                continue
            first = table * ENTRIES + index(at, upper)
            rows = slice(first, first + (end - at) // span)
            tables = (machine[upper][rows] >> np.uint64(PAGE_SHIFT)).view(np.int64)
            tables = tables[tables.nonzero()[0]]
            if tables.size:
                machine.write(upper, rows, 0)
                _give_back(machine, level, tables)
                freed += tables.size
    return freed


def _tables_of(state: State, root: int, start: int, stop: int) -> dict[str, list[tuple[int, int]]]:
    """Tables above the last level that serve pages ``start`` to ``stop - 1``, by level.

    Each is the first page that it serves, and its number.
    """
    found = {"pgd": [(0, root)]}
    for upper, lower in (("pgd", "pud"), ("pud", "pmd")):
        pages = LEVEL_PAGES[upper]
        found[lower] = below = []
        for base, table in found[upper]:
            first = max(start - base, 0) // pages
            last = min(-(-(stop - base) // pages), ENTRIES)
            words = state[upper][table * ENTRIES + first : table * ENTRIES + last]
            for entry in words.nonzero()[0].tolist():
                below.append((base + (first + entry) * pages, _pointed(words.item(entry))))
    return found


def rows_of(state: State, root: int, vpns: np.ndarray) -> Rows:
    """Rows in the ``pte`` column of ``vpns`` (int64, ascending), all of which have tables."""
    if vpns[-1] - vpns[0] == vpns.size - 1:
        return rows_of_range(state, root, int(vpns[0]), int(vpns[-1]) + 1)
    first = np.flatnonzero(np.diff(vpns // PMD_PAGES, prepend=-1))
    tables = [table_of(state, root, vpn, "pte") for vpn in vpns[first].tolist()]
    sizes = np.diff(np.append(first, vpns.size))
    return np.repeat(np.array(tables, np.int64), sizes) * ENTRIES + vpns % PMD_PAGES
