"""Reverse mapping: how many entries map a frame, and where they are.

A page of private memory remembers its anon_vma and its offset in it; every mapping that belongs to
that anon_vma may hold it at one address. Walks go page by page as the kernel's do, in arrays.

Source: mm/rmap.c.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import Pfns, is_present, is_swap_type, pfn_of, swap_offset_pfn
from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import Vma, mm_root, vma_at
from hmmlab.model.page import PG_ANON, PG_ANON_EXCLUSIVE, as_rows, page_rows, set_flags
from hmmlab.model.page_table import walk
from hmmlab.model.state import State

__all__ = [
    "Mappings",
    "page_add_anon_rmap",
    "page_add_new_anon_rmap",
    "page_remove_rmap",
    "rmap_walk",
]


class Mappings(NamedTuple):
    """Who maps some frames: int64 arrays of one shape, ordered by page and then by mapping.

    ``which`` is the index of the page in the frames asked for, ``vma`` the row of the mapping,
    ``vpn`` the page number there, and ``row`` the row of the word in the ``pte`` column.
    """

    which: NDArray[np.int64]
    vma: NDArray[np.int64]
    vpn: NDArray[np.int64]
    row: NDArray[np.int64]


def page_add_new_anon_rmap(machine: Machine, pfns: Pfns, vma: Vma, vpns: Pfns) -> None:
    """Let new frames be mapped once, by ``vma`` at pages ``vpns``; it owns them alone."""
    machine.called("page_add_new_anon_rmap", pfns.size)
    rows = as_rows(page_rows(machine, pfns))
    machine.write("page.mapcount", rows, 1)
    machine.write("page.mapping", rows, vma.anon_vma)
    machine.write("page.index", rows, vma.pgoff_of(0) + vpns)
    set_flags(machine, pfns, PG_ANON | PG_ANON_EXCLUSIVE)


def page_add_anon_rmap(machine: Machine, pfns: Pfns, exclusive: NDArray[np.bool_]) -> None:
    """Let frames that have an anon_vma be mapped once more; some by their only owner."""
    machine.add("page.mapcount", as_rows(page_rows(machine, pfns)), 1)
    if exclusive.any():
        set_flags(machine, np.unique(pfns[exclusive]), PG_ANON_EXCLUSIVE)


def page_remove_rmap(machine: Machine, pfns: Pfns) -> None:
    """Let frames, which may repeat, be mapped once less."""
    if pfns.size:
        machine.called("page_remove_rmap", pfns.size)
        machine.add("page.mapcount", as_rows(page_rows(machine, pfns)), -1)


def rmap_walk(state: State, pfns: Pfns) -> Mappings:
    """Every entry that names one of ``pfns``: present, device or migration entry."""
    rows = page_rows(state, pfns)
    anon_vmas, index = state["page.mapping"][rows], state["page.index"][rows]
    found: list[tuple[NDArray[np.int64], ...]] = []
    for anon_vma in np.unique(anon_vmas).tolist():
        if not anon_vma:
            continue
        links = np.flatnonzero(state["avc.anon_vma"] == anon_vma)
        members = np.flatnonzero(anon_vmas == anon_vma)
        for vma_row in state["avc.vma"][links].tolist():
            found.append(_entries_in(state, vma_at(state, vma_row), members, index, pfns))
    if not found:
        empty = np.zeros(0, np.int64)
        return Mappings(empty, empty, empty, empty)
    which, vma, vpn, row = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((vpn, which))
    return Mappings(which[order], vma[order], vpn[order], row[order])


def _entries_in(
    state: State, vma: Vma, members: NDArray[np.int64], index: Pfns, pfns: Pfns
) -> tuple[NDArray[np.int64], ...]:
    """Entries of one mapping that name one of the frames ``pfns[members]``."""
    vpns = index[members] - vma.pgoff_of(0)
    inside = (vpns >= vma.start) & (vpns < vma.end)
    members, vpns = members[inside], vpns[inside]
    rows = np.full(vpns.size, -1, np.int64)
    if vpns.size:
        low, high = int(vpns.min()), int(vpns.max()) + 1
        for run in walk(state, mm_root(state, vma.mm), low, high):
            if run.row >= 0:
                there = (vpns >= run.start) & (vpns < run.stop)
                rows[there] = run.row + vpns[there] - run.start
    words = np.where(rows >= 0, state["pte"][rows], np.uint64(0))
    named = np.where(
        is_present(words), pfn_of(words), np.where(is_swap_type(words), swap_offset_pfn(words), -1)
    )
    mine = named == pfns[members]
    return members[mine], np.full(int(mine.sum()), vma.row), vpns[mine], rows[mine]
