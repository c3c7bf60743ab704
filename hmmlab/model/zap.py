"""Emptying a range of a mapping: its words go, and what they named is let go.

Frames that the CPU could reach wait in an ``MmuGather`` until the TLB is flushed.

Source: mm/memory.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import all_of, any_of, how_many, not_zero, part_of, rows_where, some
from hmmlab.model.entry import (
    DIRTY,
    SPECIAL,
    Pfns,
    is_device_exclusive,
    is_device_private,
    is_present,
    is_swapped,
    marks_and_pfns,
    pfn_of,
    swap_offset,
)
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.huge_memory import split_huge_pmds_across
from hmmlab.model.hugetlb import unmap_hugepage_range
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_HUGETLB, Vma, mm_root
from hmmlab.model.page import PG_ANON, PG_DIRTY, page_mapping, page_rows, pfn_to_page, set_flags
from hmmlab.model.page_ref import put_page
from hmmlab.model.page_table import drop_table, walk
from hmmlab.model.rmap import page_remove_rmap
from hmmlab.model.rows import Rows, first_and_last, shifted, unique_rows
from hmmlab.model.swap import free_swap_and_cache
from hmmlab.model.tlb import MmuGather

__all__ = ["unmap_page_range", "unmap_single_vma"]


def unmap_single_vma(
    machine: Machine, tlb: MmuGather, vma: Vma, start: int, stop: int, *, even_cows: bool = True
) -> Routine[None]:
    """Empty a part of one mapping, of huge pages or of others."""
    if vma.flags & VM_HUGETLB:
        yield from unmap_hugepage_range(machine, tlb, vma, start, stop)
    else:
        yield from unmap_page_range(machine, tlb, vma, start, stop, even_cows=even_cows)


@kernel("mm/memory.c")
def unmap_page_range(
    machine: Machine, tlb: MmuGather, vma: Vma, start: int, stop: int, *, even_cows: bool = True
) -> Routine[None]:
    """Empty the words of pages ``start`` to ``stop - 1``; what they mapped waits in ``tlb``.

    Without ``even_cows``, pages of a file go and private copies of them stay.
    """
    root = mm_root(machine, vma.mm)
    yield from split_huge_pmds_across(machine, vma, (start, stop))
    for run in list(walk(machine, root, start, stop)):
        if run.row < 0:
            continue
        words = machine["pte"][run.row : run.row + run.stop - run.start]
        chosen = not_zero(words)
        if not even_cows:
            frames = page_rows(machine, np.where(is_present(words), pfn_of(words), 0))
            anon = (machine["page.flags"][frames] & PG_ANON) != 0
            chosen = chosen & is_present(words) & ~anon
        used, count = rows_where(chosen, words.size), how_many(chosen, words.size)
        parts = [(0, count)] if run.huge and count else machine.chunks(0, count)
        table, written = -1, False
        for first, last in parts:
            part = part_of(used, first, last)
            low, high = (run.start + at for at in first_and_last(part))
            if written and table != low // PMD_PAGES:
                tlb.flush()
                written = False
            table = high // PMD_PAGES
            written |= yield from _zap(machine, tlb, vma, run.row, run.start, part, huge=run.huge)
        if written:
            tlb.flush()
        if run.huge:
            for first in np.arange(run.start, run.stop, PMD_PAGES).tolist():  # over page tables
                drop_table(machine, root, first)


def _zap(
    machine: Machine,
    tlb: MmuGather,
    vma: Vma,
    row: int,
    start: int,
    used: slice | NDArray[np.int64],
    *,
    huge: bool,
) -> Routine[bool]:
    """Empty the words of pages ``start + used``, whose rows are ``row + used``.

    Of ``huge`` words these are whole PMD words, which have one mapping each. Returns whether a page
    of a file was written through them: nobody may write to it any more before its lock is given up.
    """
    rows = shifted(used, row)
    words = machine["pte"][rows]  # no copy: all that they say is asked before they are emptied
    marks, named = marks_and_pfns(words)
    present = is_present(marks)
    normal = present & ((marks & np.uint64(SPECIAL)) == 0)
    dirty = some(named, normal & ((marks & np.uint64(DIRTY)) != 0))
    private, held, slots = np.array([False]), named[:0], named[:0]
    if not all_of(present):
        private = ~present & is_device_private(marks)
        held = some(named, ~present & is_device_exclusive(marks))  # mapped nowhere
        slots = swap_offset(some(words, is_swapped(marks)))
    machine.write("pte", rows, 0)
    mapped = some(named, normal | private)
    at = pfn_to_page(machine, mapped)

    def pages_of(some_of_them: Pfns) -> Rows:
        all_of_them = some_of_them.size == mapped.size
        return at if all_of_them else pfn_to_page(machine, some_of_them)

    dirty_rows = pages_of(dirty)
    flags = machine.alike("page.flags", dirty_rows)
    written = any_of((flags & np.uint32(PG_ANON)) == 0)
    cached = page_mapping(machine, dirty, dirty_rows, flags)
    if any_of(cached):
        set_flags(machine, unique_rows(some(dirty, cached)), PG_DIRTY)
    page_remove_rmap(machine, mapped, huge=huge, rows=at)
    if any_of(present):
        freed = some(named, normal)
        tlb.remove_pages(freed, pages_of(freed), huge=huge)
    if any_of(private):
        put_page(machine, some(named, private))
    put_page(machine, held)
    if slots.size:
        free_swap_and_cache(machine, slots)
    first, last = first_and_last(used)
    yield machine.step("{range}: no longer mapped.", vma.mm, start + first, start + last + 1)
    return written
