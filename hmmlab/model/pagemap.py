"""/proc/PID/pagemap: what the kernel tells user space about each page.

Source: fs/proc/task_mmu.c (``pte_to_pagemap_entry``).
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import (
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
from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import VM_SOFTDIRTY, mm_root, vmas_in
from hmmlab.model.page import PG_ANON, page_rows
from hmmlab.model.page_table import read_range

__all__ = ["PM_FILE", "PM_MMAP_EXCLUSIVE", "PM_PRESENT", "PM_SOFT_DIRTY", "PM_SWAP", "read_pagemap"]

PM_PRESENT = 1 << 63
PM_SWAP = 1 << 62
PM_FILE = 1 << 61
PM_MMAP_EXCLUSIVE = 1 << 56
PM_SOFT_DIRTY = 1 << 55


def read_pagemap(machine: Machine, mm: int, start: int, stop: int) -> Words:
    """Flag bits of pages ``start`` to ``stop - 1``, uint64 of shape (stop - start,).

    Frame numbers are left out, as they are for a reader without privileges.
    """
    words = read_range(machine, mm_root(machine, mm), start, stop)
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
        if vma.flags & VM_SOFTDIRTY:
            soft_dirty[max(vma.start - start, 0) : vma.end - start] = True
    anon = (machine["page.flags"][rows] & PG_ANON) != 0
    alone = named & ~(swap & is_migration(words)) & (machine["page.mapcount"][rows] == 1)
    found = np.zeros(words.size, np.uint64)
    for bit, mask in (
        (PM_PRESENT, present),
        (PM_SWAP, swap),
        (PM_FILE, named & ~anon),
        (PM_MMAP_EXCLUSIVE, alone),
        (PM_SOFT_DIRTY, soft_dirty),
    ):
        found |= np.where(mask, np.uint64(bit), np.uint64(0))
    return found
