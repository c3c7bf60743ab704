"""Reverse mapping: how many entries map a frame, and where they are.

A page of private memory remembers its anon_vma and its offset in it, a page of a file the file and
its offset there; every mapping that belongs to either may hold the page at one address. Walks go
page by page and mapping by mapping as the kernel's do, in arrays.

Source: mm/rmap.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import all_of, any_of, some
from hmmlab.model.anon_vma import find_vmas_of_anon_vma, root_anon_vma
from hmmlab.model.entry import (
    Pfns,
    Words,
    has_pfn,
    is_present,
    is_swap_type,
    pfn_of,
    swap_offset_pfn,
)
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.lru import mlock_pages, wait_for_lru
from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import VM_LOCKED, Vma, find_vmas_of_file, mm_root, vma_at
from hmmlab.model.page import (
    PG_ANON,
    PG_ANON_EXCLUSIVE,
    PG_KSM,
    PG_LRU,
    PG_SWAPBACKED,
    page_rows,
    pfn_to_page,
    set_flags,
)
from hmmlab.model.page_table import walk, word_row
from hmmlab.model.rows import Rows, unique_rows
from hmmlab.model.state import State

__all__ = [
    "Mappings",
    "huge_page_mappings",
    "hugepage_add_new_anon_rmap",
    "ksm_migrate_page",
    "page_add_anon_rmap",
    "page_add_file_rmap",
    "page_add_new_anon_rmap",
    "page_dup_rmap",
    "page_remove_rmap",
    "rmap_walk",
]


Machine.declare("ksm_item.mm", np.int32, "address space of a page that KSM visits; 0 is free")
Machine.declare("ksm_item.vpn", np.int64, "the page")
Machine.declare("ksm_item.node", np.int32, "merged page that it shares; 0 for none")
Machine.declare("ksm_item.anon_vma", np.int32, "anon_vma of its mapping when it was merged")
Machine.declare("ksm_item.order", np.int64, "place among those that share it, latest first")
Machine.declare("ksm_item.seen", np.uint64, "checksum of its content at the last scan; 0 for none")
Machine.declare("ksm_node.pfn", np.int64, "frame of a merged page; 0 is a free row")


class Mappings(NamedTuple):
    """Where some frames may be mapped: arrays of one shape, frame by frame in the kernel's order.

    ``which`` is the index of the frame in those asked for, ``vma`` the row of a mapping that covers
    the frame's place, ``vpn`` the page number there, ``row`` the row of its word in the ``pte``
    column (-1 where no table is), ``maps`` whether that word names the frame and was not visited
    before, and ``rank`` the place of the mapping in the order of visits.
    """

    which: NDArray[np.int64]
    vma: NDArray[np.int64]
    vpn: NDArray[np.int64]
    row: NDArray[np.int64]
    maps: NDArray[np.bool_]
    rank: NDArray[np.int64]

    def only(self, chosen: NDArray[np.bool_]) -> Mappings:
        """Some of them."""
        if all_of(chosen):
            return self
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

    def by_vma(self) -> Iterator[tuple[int, Mappings]]:
        """Each mapping with its places; mappings come in an order that is every frame's own.

        Frames of different families may be visited in orders that have no common one; then it goes
        place by place, and a mapping comes again.
        """
        rows = list(dict.fromkeys(self.vma.tolist()))
        if len(rows) > 1:
            same = (self.which[1:] == self.which[:-1]) & (self.vma[1:] != self.vma[:-1])
            after = TopologicalSorter[int]({row: () for row in rows})
            pairs = unique_rows((self.vma[:-1][same] << 32) | self.vma[1:][same])
            for pair in pairs.tolist():
                after.add(pair & 0xFFFFFFFF, pair >> 32)
            try:
                rows = list(after.static_order())
            except CycleError:
                changes = np.flatnonzero(np.diff(self.vma) | np.diff(self.which)) + 1
                at = np.arange(self.vma.size)
                for first, last in pairwise([0, *changes.tolist(), at.size]):
                    yield int(self.vma[first]), self.only((at >= first) & (at < last))
                return
        for row in rows:
            yield row, self.only(self.vma == row)


def page_add_new_anon_rmap(
    machine: Machine,
    pfns: Pfns,
    vma: Vma,
    vpns: Pfns,
    *,
    huge: bool = False,
    noted: bool = False,
    lru: bool = True,
    rows: Rows | None = None,
) -> None:
    """Let new frames be mapped once, by ``vma`` at pages ``vpns``; it owns them alone.

    They go on to the ``lru`` lists, as their flags change but once then. ``huge`` pages are one
    call each; ``noted`` says that the caller has noted the calls, among others.
    """
    calls = pfns.size // PMD_PAGES if huge else pfns.size
    machine.called("page_add_new_anon_rmap", 0 if noted else calls)
    _own_alone(machine, pfns, vma, vpns, rows, PG_LRU if lru else 0)
    if lru:
        wait_for_lru(machine, pfns, huge=huge)


def hugepage_add_new_anon_rmap(machine: Machine, pfns: Pfns, vma: Vma, vpns: Pfns) -> None:
    """The same for huge pages of a pool."""
    machine.called("hugepage_add_new_anon_rmap", pfns.size // PMD_PAGES)
    _own_alone(machine, pfns, vma, vpns)


def _own_alone(
    machine: Machine,
    pfns: Pfns,
    vma: Vma,
    vpns: Pfns,
    rows: Rows | None = None,
    flags: int = 0,
) -> None:
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    machine.write("page.mapcount", rows, 1)
    machine.write("page.mapping", rows, vma.anon_vma)
    machine.write("page.index", rows, vma.pgoff_of(0) + vpns)
    set_flags(machine, pfns, PG_ANON | PG_ANON_EXCLUSIVE | PG_SWAPBACKED | flags, rows=rows)


def page_add_anon_rmap(
    machine: Machine,
    pfns: Pfns,
    vma: Vma,
    vpns: Pfns,
    exclusive: NDArray[np.bool_],
    rows: Rows | None = None,
) -> None:
    """Let frames be mapped once more, by ``vma`` at pages ``vpns``; some by their only owner.

    ``exclusive`` says which, or one for all.

    A frame that has no anon_vma yet gets the mapping's, or the oldest of its family when it is not
    the mapping's alone.
    """
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    machine.add("page.mapcount", rows, 1)
    fresh = (machine.alike("page.flags", rows) & np.uint32(PG_ANON)) == 0
    if any_of(fresh):
        root = root_anon_vma(machine, vma.anon_vma)
        mapping = np.where(some(exclusive, fresh), vma.anon_vma, root)
        frames = some(pfns, fresh)
        new = pfn_to_page(machine, frames)
        machine.write("page.mapping", new, mapping)
        machine.write("page.index", new, vma.pgoff_of(0) + some(vpns, fresh))
        set_flags(machine, frames, PG_ANON, rows=new)
    if all_of(exclusive) and isinstance(rows, slice):
        set_flags(machine, pfns, PG_ANON_EXCLUSIVE, rows=rows)
    elif any_of(exclusive):
        set_flags(machine, unique_rows(some(pfns, exclusive)), PG_ANON_EXCLUSIVE)
    if vma.flags & VM_LOCKED:
        mlock_pages(machine, pfns)


def page_dup_rmap(machine: Machine, pfns: Pfns, rows: Rows | None = None) -> None:
    """Let a child map frames, which may repeat, too: nobody owns them alone from now on."""
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    machine.add("page.mapcount", rows, 1)
    if isinstance(rows, slice):
        set_flags(machine, pfns, off=PG_ANON_EXCLUSIVE, rows=rows)
    else:
        set_flags(machine, unique_rows(pfns), off=PG_ANON_EXCLUSIVE)


def page_add_file_rmap(machine: Machine, pfns: Pfns, vma: Vma) -> None:
    """Let frames of a file, which may repeat, be mapped once more, by ``vma``."""
    machine.add("page.mapcount", pfn_to_page(machine, pfns), 1)
    if vma.flags & VM_LOCKED:
        mlock_pages(machine, pfns)


def page_remove_rmap(
    machine: Machine,
    pfns: Pfns,
    *,
    huge: bool = False,
    noted: bool = False,
    rows: Rows | None = None,
) -> None:
    """Let frames, which may repeat, be mapped once less.

    ``huge`` pages are one call each; ``noted`` says that the caller has noted the calls, among
    others.
    """
    if pfns.size:
        calls = pfns.size // PMD_PAGES if huge else pfns.size
        machine.called("page_remove_rmap", 0 if noted else calls)
        rows = pfn_to_page(machine, pfns) if rows is None else rows
        machine.add("page.mapcount", rows, -1)


def rmap_walk(state: State, pfns: Pfns) -> Mappings:
    """Every place at which one of ``pfns`` may be mapped, whether it is or not.

    A private page may be wherever a mapping belongs to its anon_vma and covers its offset, a page
    of a file wherever the file is mapped there. Mappings are visited in the order of the interval
    tree that holds them.
    """
    rows = page_rows(state, pfns)
    mapping, index = state["page.mapping"][rows], state["page.index"][rows]
    flags = state["page.flags"][rows]
    merged = (flags & PG_KSM) != 0
    anon = ((flags & PG_ANON) != 0) & ~merged
    found: list[tuple[NDArray[np.int64], ...]] = []
    for number in np.flatnonzero(merged).tolist():  # over merged pages
        found.append(_places_of_merged(state, number, int(mapping[number])))
    for kind, find in ((anon, find_vmas_of_anon_vma), (~anon & ~merged, find_vmas_of_file)):
        for number in unique_rows(mapping[kind & (mapping != 0)]).tolist():
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
    if len(found) > 1:
        order = np.lexsort((ranks, which))
        which, words = which[order], words[order]
        vmas, vpns, ranks = vmas[order], vpns[order], ranks[order]
    named = _frames_named(np.where(words >= 0, state["pte"][words], np.uint64(0)))
    maps = named == pfns[which]
    if merged.any():  # a child's page is visited for itself, and again for its parent's
        visits = np.flatnonzero(maps)
        pairs = np.stack([which[visits], words[visits]])
        maps[visits] = False
        maps[visits[np.unique(pairs, axis=1, return_index=True)[1]]] = True
    return Mappings(which, vmas, vpns, words, maps, ranks)


def huge_page_mappings(state: State, pfns: Pfns) -> Iterator[tuple[Vma, int, int]]:
    """Mappings that may hold a huge page, of whose frames ``pfns`` are in use.

    In the order of visits, each with the first page of its part, and the page past the last.
    """
    one = int(pfns[0])
    low = int(state["page.index"][one]) - (one - int(state["page.compound"][one]))
    for row in find_vmas_of_anon_vma(state, int(state["page.mapping"][one])):
        vma = vma_at(state, row)
        first = max(low - vma.pgoff_of(0), vma.start)
        last = min(low + PMD_PAGES - vma.pgoff_of(0), vma.end)
        if first < last:
            yield vma, first, last


def _places_of_merged(state: State, number: int, node: int) -> tuple[NDArray[np.int64], ...]:
    """Places of one merged page: its users', latest first, then those of their children.

    Source: mm/ksm.c (``rmap_walk_ksm``).
    """
    users = np.flatnonzero(state["ksm_item.node"] == node)
    users = users[np.argsort(-state["ksm_item.order"][users])]
    places: list[tuple[int, int, int]] = []
    for forks in (False, True):
        for user in users.tolist():
            vpn, mm = int(state["ksm_item.vpn"][user]), int(state["ksm_item.mm"][user])
            for row in find_vmas_of_anon_vma(state, int(state["ksm_item.anon_vma"][user])):
                vma = vma_at(state, row)
                if vma.start <= vpn < vma.end and (vma.mm != mm) == forks:
                    places.append((row, vpn, word_row(state, mm_root(state, vma.mm), vpn)))
    table = np.array(places, np.int64).reshape(-1, 3)
    which = np.full(len(places), number)
    return which, table[:, 0], table[:, 1], table[:, 2], np.arange(len(places))


def ksm_migrate_page(machine: Machine, old: Pfns, new: Pfns, rows: Rows | None = None) -> None:
    """Let merged pages be found at their new frames; ``rows`` are those of ``old``, if known."""
    rows = pfn_to_page(machine, old) if rows is None else rows
    merged = (machine.alike("page.flags", rows) & np.uint32(PG_KSM)) != 0
    if any_of(merged):
        nodes = machine["page.mapping"][page_rows(machine, some(old, merged))]
        machine.write("ksm_node.pfn", nodes.astype(np.int64), some(new, merged))


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
