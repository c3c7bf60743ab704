"""A fault on a swap-type entry: what is elsewhere comes back.

Device memory comes home, and its driver brings it; a page that a device has to itself is taken
back; a migration is waited for; what is in swap is read.

Source: mm/memory.c (``do_swap_page``), mm/migrate.c (``migration_entry_wait``).
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.alike import all_of, any_of, some
from hmmlab.model.copy_on_write import VmFault, do_wp_page
from hmmlab.model.entry import (
    DIRTY,
    RW,
    SOFT_DIRTY,
    SWP_EXCLUSIVE,
    SWP_SOFT_DIRTY,
    Pfns,
    Words,
    is_device_exclusive,
    is_device_private,
    is_migration,
    is_swapped,
    marks_and_pfns,
    present_word,
    repeats_device_private,
    swap_offset,
    swap_offset_pfn,
)
from hmmlab.model.exclusive import remove_device_exclusive_entries
from hmmlab.model.lru import folio_add_lru, lru_add_drain
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.memremap import pagemap_of
from hmmlab.model.mm_types import VM_LOCKED, VM_WRITE, Vma, mm_root, vm_page_prot
from hmmlab.model.page import PG_SWAPBACKED, pfn_to_page
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.page_table import read_range
from hmmlab.model.rmap import page_add_anon_rmap
from hmmlab.model.rows import Rows, are_unique, as_rows, row_numbers, unique_rows
from hmmlab.model.swap import (
    folio_free_swap,
    give_up_swap,
    note_swap_cache_hits,
    swap_free,
    swap_vma_window,
    swapin_readahead,
)

__all__ = ["FAULT_FLAG_REMOTE", "FAULT_FLAG_WRITE", "do_swap_page"]

#: What a driver is told of the fault that brings its page home (``enum fault_flag``).
FAULT_FLAG_WRITE, FAULT_FLAG_REMOTE = 1 << 0, 1 << 7


@kernel("mm/memory.c")
def do_swap_page(
    machine: Machine,
    vma: Vma,
    vpns: Pfns,
    rows: Rows,
    words: Words,
    marks: Words,
    write: bool,
    remote: bool = False,
) -> Routine[None]:
    """A fault on entries that are neither empty nor present; ``marks`` are theirs."""
    private = is_device_private(marks)
    if not all_of(private):
        words = yield from _migration_entry_wait(machine, vma, vpns, rows, words)
        exclusive = is_device_exclusive(words)
        if any_of(exclusive):
            yield from remove_device_exclusive_entries(
                machine, vma, vpns[exclusive], row_numbers(rows)[exclusive]
            )
        private = is_device_private(words)
    pfns, at = swap_offset_pfn(some(words, private)), some(vpns, private)
    pages = pfn_to_page(machine, pfns)
    if not isinstance(pages, slice) and not are_unique(pfns):
        # The first fault brings a shared page home for all.
        first = ~some(repeats_device_private(words, words), private)
        pfns, at = some(pfns, first), some(at, first)
        pages = pfn_to_page(machine, pfns)
    if pfns.size:
        maps = pagemap_of(machine, pfns, pages)
        for pagemap in unique_rows(maps).tolist():
            mine = maps == pagemap
            theirs = some(pfns, mine)
            if theirs is not pfns:
                pages = pfn_to_page(machine, theirs)
            get_page(machine, theirs, pages)
            ops = machine.objects["pagemap"][pagemap]
            try:
                flags = (FAULT_FLAG_WRITE if write else 0) | (FAULT_FLAG_REMOTE if remote else 0)
                yield from ops.migrate_to_ram(machine, vma, some(at, mine), theirs, flags)
            finally:
                put_page(machine, theirs, pages)
    if all_of(private):
        return
    swapped = is_swapped(words)
    if any_of(swapped):
        at = row_numbers(rows)[swapped]
        yield from _swap_in(machine, vma, vpns[swapped], at, words[swapped], write)


def _migration_entry_wait(
    machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, words: Words
) -> Routine[Words]:
    """Wait until none of some words is a migration entry; returns the words then."""
    moving = is_migration(words)
    while any_of(moving):
        yield machine.step(
            "It waits until the migration of {range} ends.",
            vma.mm,
            int(vpns[moving][0]),
            int(vpns[moving][-1]) + 1,
            lock="migration_entry_wait",
        )
        words = machine["pte"][rows].copy()
        moving = is_migration(words)
    return words


def _swap_in(
    machine: Machine, vma: Vma, vpns: Pfns, rows: Pfns, words: Words, write: bool
) -> Routine[None]:
    """Map what is in swap, as far as one read from swap goes, and then as far as the next.

    A page must be read into the swap cache when others share its slot; how far such a read goes
    ahead depends on what became of the reads before it, so they follow one another.
    """
    at = 0
    while at < vpns.size:
        slots = swap_offset(words[at:])
        shared = (machine["swap.count"][slots] > 1) & (machine["swap.cache"][slots] == 0)
        ready = int(np.argmax(shared)) if any_of(shared) else slots.size
        if ready:
            part = slice(at, at + ready)
            hits = machine["swap.cache"][slots[:ready]]
            if any_of(hits):
                last = int(vpns[part][hits > 0][-1])
                note_swap_cache_hits(machine, hits[hits > 0], vma.row, last)
            yield from _map_swapped(machine, vma, vpns[part], rows[part], words[part], write)
        else:
            low, high = swap_vma_window(machine, vma.row, int(vpns[at]))
            around = read_range(machine, mm_root(machine, vma.mm), low, high)
            ahead = swap_offset(around[is_swapped(around)])
            swapin_readahead(machine, np.append(ahead, slots[0]), int(slots[0]))
            if ahead.size:
                lru_add_drain(machine)
            part = slice(at, at + 1)
            yield from _map_swapped(machine, vma, vpns[part], rows[part], words[part], write)
        at = part.stop


def _map_swapped(
    machine: Machine, vma: Vma, vpns: Pfns, rows: Pfns, words: Words, write: bool
) -> Routine[None]:
    """Map pages from the swap cache, or read them into frames of their own."""
    slots = swap_offset(words)
    pfns = machine["swap.cache"][slots]
    fresh = pfns == 0
    if any_of(fresh):
        content = machine["swap.content"][slots[fresh]]
        new, pages = alloc_pages(machine, content.size, content=content)
        folio_add_lru(machine, new, PG_SWAPBACKED, rows=pages)
        pfns[fresh] = new
    get_page(machine, pfns[~fresh])  # the mapping's; a fresh frame has it from the start
    swap_free(machine, slots)
    if vma.flags & VM_LOCKED:  # what stays in RAM needs no place in swap
        folio_free_swap(machine, unique_rows(pfns[~fresh]))
    elif write:
        give_up_swap(machine, pfns)
    alone = fresh | ((words & SWP_EXCLUSIVE) != 0) | (machine["page.refcount"][pfns] == 1)
    mapped = present_word(pfns, vm_page_prot(vma.flags))
    mapped |= np.where((words & SWP_SOFT_DIRTY) != 0, np.uint64(SOFT_DIRTY), np.uint64(0))
    if write:
        marks = DIRTY | SOFT_DIRTY | (RW if vma.flags & VM_WRITE else 0)
        mapped |= np.where(alone, np.uint64(marks), np.uint64(0))
    page_add_anon_rmap(machine, pfns, vma, vpns, alone)
    machine.write("pte", as_rows(rows), mapped)
    yield machine.step("{range} come{s} back from swap.", vma.mm, int(vpns[0]), int(vpns[-1]) + 1)
    if write and not all_of(alone):
        faults = VmFault(vpns, rows, mapped, *marks_and_pfns(mapped))
        yield from do_wp_page(machine, vma, faults.only(~alone))
