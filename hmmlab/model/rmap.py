"""Reverse mapping: how many entries map a frame, and where they are.

A page of private memory remembers its anon_vma and its offset in it, a page of a file the file and
its offset there; every mapping that belongs to either may hold the page at one address. Walks go
page by page and mapping by mapping as the kernel's do, in arrays.

Source: mm/rmap.c.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import (
    Pfns,
    Words,
    has_pfn,
    is_present,
    is_swap_type,
    pfn_of,
    swap_offset_pfn,
)
from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import (
    Vma,
    find_vmas_of_anon_vma,
    find_vmas_of_file,
    mm_root,
    root_anon_vma,
    vma_at,
)
from hmmlab.model.page import (
    PG_ANON,
    PG_ANON_EXCLUSIVE,
    PG_SWAPBACKED,
    as_rows,
    page_rows,
    set_flags,
)
from hmmlab.model.page_table import walk
from hmmlab.model.state import State, unique_rows

__all__ = [
    "Mappings",
    "page_add_anon_rmap",
    "page_add_file_rmap",
    "page_add_new_anon_rmap",
    "page_dup_rmap",
    "page_remove_rmap",
    "rmap_walk",
]


class Mappings(NamedTuple):
    """Where some frames may be mapped: arrays of one shape, frame by frame in the kernel's order.

    ``which`` is the index of the frame in those asked for, ``vma`` the row of a mapping that covers
    the frame's place, ``vpn`` the page number there, ``row`` the row of its word in the ``pte``
    column (-1 where no table is), ``maps`` whether that word names the frame, and ``rank`` the
    place of the mapping in the order of visits.
    """

    which: NDArray[np.int64]
    vma: NDArray[np.int64]
    vpn: NDArray[np.int64]
    row: NDArray[np.int64]
    maps: NDArray[np.bool_]
    rank: NDArray[np.int64]

    def only(self, chosen: NDArray[np.bool_]) -> Mappings:
        """Some of them."""
        which, vma, vpn, row, maps, rank = self
        return Mappings(
            which[chosen], vma[chosen], vpn[chosen], row[chosen], maps[chosen], rank[chosen]
        )

    def until_unmapped(self) -> Mappings:
        """As far as a walk goes that ends when the frame has lost its last mapping."""
        position = np.arange(self.which.size)
        last = np.full(self.which.max(initial=-1) + 1, -1)
        np.maximum.at(last, self.which[self.maps], position[self.maps])
        return self.only(position <= last[self.which])


def page_add_new_anon_rmap(machine: Machine, pfns: Pfns, vma: Vma, vpns: Pfns) -> None:
    """Let new frames be mapped once, by ``vma`` at pages ``vpns``; it owns them alone."""
    machine.called("page_add_new_anon_rmap", pfns.size)
    rows = as_rows(page_rows(machine, pfns))
    machine.write("page.mapcount", rows, 1)
    machine.write("page.mapping", rows, vma.anon_vma)
    machine.write("page.index", rows, vma.pgoff_of(0) + vpns)
    set_flags(machine, pfns, PG_ANON | PG_ANON_EXCLUSIVE | PG_SWAPBACKED)


def page_add_anon_rmap(
    machine: Machine, pfns: Pfns, vma: Vma, vpns: Pfns, exclusive: NDArray[np.bool_]
) -> None:
    """Let frames be mapped once more, by ``vma`` at pages ``vpns``; some by their only owner.

    A frame that has no anon_vma yet gets the mapping's, or the oldest of its family when it is not
    the mapping's alone.
    """
    rows = page_rows(machine, pfns)
    machine.add("page.mapcount", as_rows(rows), 1)
    fresh = (machine["page.flags"][rows] & PG_ANON) == 0
    if fresh.any():
        root = root_anon_vma(machine, vma.anon_vma)
        mapping = np.where(exclusive[fresh], vma.anon_vma, root)
        machine.write("page.mapping", as_rows(rows[fresh]), mapping)
        machine.write("page.index", as_rows(rows[fresh]), vma.pgoff_of(0) + vpns[fresh])
        set_flags(machine, pfns[fresh], PG_ANON)
    if exclusive.any():
        set_flags(machine, unique_rows(pfns[exclusive]), PG_ANON_EXCLUSIVE)


def page_dup_rmap(machine: Machine, pfns: Pfns) -> None:
    """Let a child map frames, which may repeat, too: nobody owns them alone from now on."""
    machine.add("page.mapcount", as_rows(page_rows(machine, pfns)), 1)
    set_flags(machine, unique_rows(pfns), off=PG_ANON_EXCLUSIVE)


def page_add_file_rmap(machine: Machine, pfns: Pfns) -> None:
    """Let frames of a file, which may repeat, be mapped once more."""
    machine.add("page.mapcount", as_rows(page_rows(machine, pfns)), 1)


def page_remove_rmap(machine: Machine, pfns: Pfns) -> None:
    """Let frames, which may repeat, be mapped once less."""
    if pfns.size:
        machine.called("page_remove_rmap", pfns.size)
        machine.add("page.mapcount", as_rows(page_rows(machine, pfns)), -1)


def rmap_walk(state: State, pfns: Pfns) -> Mappings:
    """Every place at which one of ``pfns`` may be mapped, whether it is or not.

    A private page may be wherever a mapping belongs to its anon_vma and covers its offset, a page
    of a file wherever the file is mapped there. Mappings are visited in the order of the interval
    tree that holds them.
    """
    rows = page_rows(state, pfns)
    mapping, index = state["page.mapping"][rows], state["page.index"][rows]
    anon = (state["page.flags"][rows] & PG_ANON) != 0
    found: list[tuple[NDArray[np.int64], ...]] = []
    for kind, find in ((anon, find_vmas_of_anon_vma), (~anon, find_vmas_of_file)):
        for number in np.unique(mapping[kind & (mapping != 0)]).tolist():
            members = np.flatnonzero(kind & (mapping == number))
            for rank, vma_row in enumerate(find(state, number)):
                vma = vma_at(state, vma_row)
                found.append(_places_in(state, vma, rank, members, index[members]))
    if not found:
        empty = np.zeros(0, np.int64)
        return Mappings(empty, empty, empty, empty, empty.astype(np.bool_), empty)
    which, vmas, vpns, words, ranks = (
        np.concatenate(column) for column in zip(*found, strict=True)
    )
    order = np.lexsort((ranks, which))
    which, words = which[order], words[order]
    named = _frames_named(np.where(words >= 0, state["pte"][words], np.uint64(0)))
    return Mappings(which, vmas[order], vpns[order], words, named == pfns[which], ranks[order])


def _frames_named(words: Words) -> Pfns:
    """Frame that each word names, -1 for none."""
    return np.where(
        is_present(words),
        pfn_of(words),
        np.where(is_swap_type(words) & has_pfn(words), swap_offset_pfn(words), -1),
    )


def _places_in(
    state: State, vma: Vma, rank: int, members: NDArray[np.int64], index: Pfns
) -> tuple[NDArray[np.int64], ...]:
    """Places in one mapping of pages ``members`` with offsets ``index``."""
    vpns = index - vma.pgoff_of(0)
    inside = (vpns >= vma.start) & (vpns < vma.end)
    members, vpns = members[inside], vpns[inside]
    rows = np.full(vpns.size, -1, np.int64)
    if vpns.size:
        low, high = int(vpns.min()), int(vpns.max()) + 1
        for run in walk(state, mm_root(state, vma.mm), low, high):
            if run.row >= 0:
                there = (vpns >= run.start) & (vpns < run.stop)
                rows[there] = run.row + vpns[there] - run.start
    return members, np.full(vpns.size, vma.row), vpns, rows, np.full(vpns.size, rank)
