"""/proc/PID/pagemap and clear_refs: what the kernel tells user space about each page.

Source: fs/proc/task_mmu.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import (
    RW,
    SOFT_DIRTY,
    SPECIAL,
    SWP_DEVICE_EXCLUSIVE_READ,
    SWP_MIGRATION_READ,
    SWP_SOFT_DIRTY,
    Words,
    is_migration,
    is_present,
    is_swap_type,
    pfn_of,
    swap_offset_pfn,
    swap_type,
)
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_HUGETLB,
    VM_PFNMAP,
    VM_SOFTDIRTY,
    is_cow_mapping,
    mm_lock,
    mm_root,
    vmas_in,
    vmas_of,
)
from hmmlab.model.mmu_notifier import (
    EVERYTHING,
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import GUP_PIN_COUNTING_BIAS, PG_ANON, ZERO_PFN, page_rows
from hmmlab.model.page_table import huge_blocks, read_range, walk
from hmmlab.model.rows import as_rows
from hmmlab.model.tlb import flush_tlb

__all__ = [
    "PM_FILE",
    "PM_MMAP_EXCLUSIVE",
    "PM_PRESENT",
    "PM_SOFT_DIRTY",
    "PM_SWAP",
    "clear_refs_soft_dirty",
    "read_pagemap",
]

PM_PRESENT = 1 << 63
PM_SWAP = 1 << 62
PM_FILE = 1 << 61
PM_MMAP_EXCLUSIVE = 1 << 56
PM_SOFT_DIRTY = 1 << 55


def read_pagemap(machine: Machine, mm: int, start: int, stop: int) -> Words:
    """Flag bits of pages ``start`` to ``stop - 1``, uint64 of shape (stop - start,).

    Frame numbers are left out, as they are for a reader without privileges.
    """
    root = mm_root(machine, mm)
    words = read_range(machine, root, start, stop)
    present = is_present(words)
    swap = is_swap_type(words)
    kind = np.where(swap, swap_type(words), -1)
    # Migration and device entries name a frame; a page in swap has none.
    named = (present & ((words & SPECIAL) == 0)) | (
        (kind >= SWP_MIGRATION_READ) & (kind <= SWP_DEVICE_EXCLUSIVE_READ)
    )
    frames = np.where(named, np.where(present, pfn_of(words), swap_offset_pfn(words)), 0)
    rows = page_rows(machine, frames)
    soft_dirty = np.where(
        present, (words & SOFT_DIRTY) != 0, swap & ((words & SWP_SOFT_DIRTY) != 0)
    )
    for vma in vmas_in(machine, mm, start, stop):
        if vma.flags & (VM_SOFTDIRTY | VM_HUGETLB):  # hugetlb knows of mappings only
            marked = bool(vma.flags & VM_SOFTDIRTY)
            soft_dirty[max(vma.start - start, 0) : vma.end - start] = marked
    # The huge page of zeros has a struct page that is looked at, the small one has not.
    huge_zeros = present & ((words & SPECIAL) != 0) & (pfn_of(words) != ZERO_PFN)
    anon = (machine["page.flags"][rows] & PG_ANON) != 0
    # Of a PMD word's frames, the first one tells how often they are mapped.
    huge = np.flatnonzero(named & huge_blocks(machine, root, np.arange(start, stop)))
    counted = rows.copy()
    counted[huge] = page_rows(machine, machine["page.compound"][rows[huge]])
    alone = named & ~(swap & is_migration(words)) & (machine["page.mapcount"][counted] == 1)
    found = np.zeros(words.size, np.uint64)
    for bit, mask in (
        (PM_PRESENT, present),
        (PM_SWAP, swap),
        (PM_FILE, (named & ~anon) | huge_zeros),
        (PM_MMAP_EXCLUSIVE, alone),
        (PM_SOFT_DIRTY, soft_dirty),
    ):
        found |= np.where(mask, np.uint64(bit), np.uint64(0))
    return found


@kernel("fs/proc/task_mmu.c", "clear_refs_write")
def clear_refs_soft_dirty(machine: Machine, mm: int) -> Routine[None]:
    """Forget which pages were written, and write-protect all so that the next write is noticed.

    One SOFT_DIRTY of the whole address space covers it.
    """
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        for vma in vmas_of(machine, mm):
            machine.write("vma.flags", vma.row, vma.flags & ~VM_SOFTDIRTY)
        range = MmuNotifierRange.one(mm, Event.SOFT_DIRTY, 0, EVERYTHING)
        yield from invalidate_range_start(machine, range)
        yield from _clear_all(machine, mm)
        yield from invalidate_range_end(machine, range)
        flush_tlb(machine)
    finally:
        machine.up_write(lock)


@kernel("mm/pagewalk.c", "walk_page_range")
def _clear_all(machine: Machine, mm: int) -> Routine[None]:
    for vma in vmas_of(machine, mm):
        if vma.flags & (VM_PFNMAP | VM_HUGETLB):
            continue
        for run in walk(machine, mm_root(machine, mm), vma.start, vma.end):
            if run.row >= 0:
                rows = np.arange(run.row, run.row + run.stop - run.start)
                _clear_soft_dirty(machine, rows, cow=is_cow_mapping(vma.flags) and not run.huge)
                flush_tlb(machine, rows.size // PMD_PAGES if run.huge else 0)
    yield machine.step("Every page looks unwritten now.", mm)


def _clear_soft_dirty(machine: Machine, rows: NDArray[np.int64], *, cow: bool) -> None:
    words = machine["pte"][rows]
    present = is_present(words)
    frames = page_rows(machine, np.where(present, pfn_of(words), 0))
    pinned = present & (machine["page.refcount"][frames] >= GUP_PIN_COUNTING_BIAS) & cow
    change = (present & ~pinned) | is_swap_type(words)
    rows, words, present = rows[change], words[change], present[change]
    marks = np.where(present, np.uint64(RW | SOFT_DIRTY), np.uint64(SWP_SOFT_DIRTY))
    machine.write("pte", as_rows(rows), words & ~marks)
