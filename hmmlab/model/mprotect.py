"""Changing the rights of mapped pages.

Source: mm/mprotect.c.
"""

from __future__ import annotations

import contextlib

import numpy as np

from hmmlab.model.alike import all_of, any_of, how_many
from hmmlab.model.entry import (
    DIRTY,
    PRESENT,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    SWP_DEVICE_EXCLUSIVE_READ,
    SWP_DEVICE_EXCLUSIVE_WRITE,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    SWP_SOFT_DIRTY,
    Bools,
    Words,
    is_present,
    marks_of,
    pfn_of,
    swap_offset,
    swap_type,
    swap_word,
    with_protection,
)
from hmmlab.model.huge_memory import split_huge_pmds_across
from hmmlab.model.hugetlb import hugetlb_change_protection
from hmmlab.model.machine import BLOCK, KernelError, Machine, Routine, kernel
from hmmlab.model.mlock import populate_vma_page_range
from hmmlab.model.mm_types import (
    VM_ACCESS_FLAGS,
    VM_ACCOUNT,
    VM_HUGETLB,
    VM_LOCKED,
    VM_NORESERVE,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_WRITE,
    Vma,
    find_vma,
    find_vma_prev,
    flags_of_prot,
    mm_lock,
    mm_root,
    vm_page_prot,
    vma_at,
)
from hmmlab.model.mmap import change_vma_flags
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import PG_ANON_EXCLUSIVE, page_rows
from hmmlab.model.page_table import populated_pmds, walk
from hmmlab.model.tlb import MmuGather, pte_accessible

__all__ = ["sys_mprotect"]

_ENOMEM = 12


@kernel("mm/mprotect.c", "__x64_sys_mprotect")
def sys_mprotect(machine: Machine, mm: int, start: int, stop: int, prot: str) -> Routine[None]:
    """Give pages ``start`` to ``stop - 1`` another protection, mapping by mapping.

    Raises
    ------
    KernelError
        ENOMEM at the first page that is not mapped; the mappings before it have changed.
    """
    access = flags_of_prot(prot)
    if stop <= start:
        return
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        vma, prev = find_vma_prev(machine, mm, start)
        if vma is None or vma.start > start:
            raise _not_mapped(machine, mm, start)
        tlb = MmuGather(machine, mm)
        try:
            yield from _fixup_each(machine, tlb, vma, prev, start, stop, access)
        finally:
            tlb.finish()
    finally:
        machine.up_write(lock)


def _fixup_each(
    machine: Machine,
    tlb: MmuGather,
    vma: Vma | None,
    prev: Vma | None,
    start: int,
    stop: int,
    access: int,
) -> Routine[None]:
    """Change mapping after mapping, from ``vma`` on."""
    at = start
    if vma and vma.start < start:
        prev = vma
    while vma:
        end = min(vma.end, stop)
        flags = (vma.flags & ~VM_ACCESS_FLAGS) | access
        prev = yield from mprotect_fixup(machine, tlb, vma, prev, at, end, flags)
        at = max(end, prev.end)
        if at >= stop:
            return
        mm = vma.mm
        vma = find_vma(machine, mm, prev.end)
        if vma is None or vma.start != at:
            raise _not_mapped(machine, mm, at)


def _not_mapped(machine: Machine, mm: int, vpn: int) -> KernelError:
    return KernelError(_ENOMEM, f"{machine.names.place(mm, vpn, vpn + 1)} is not mapped")


@kernel("mm/mprotect.c")
def mprotect_fixup(
    machine: Machine,
    tlb: MmuGather,
    vma: Vma,
    prev: Vma | None,
    start: int,
    stop: int,
    flags: int,
) -> Routine[Vma]:
    """Change the part of one mapping; returns the mapping that holds the part now."""
    if flags == vma.flags:
        return vma
    if flags & VM_WRITE and not vma.flags & (
        VM_ACCOUNT | VM_WRITE | VM_HUGETLB | VM_SHARED | VM_NORESERVE
    ):
        flags |= VM_ACCOUNT  # promised memory stays promised, so this bit never goes again
    old, flags_before = vma.flags, machine["vma.flags"].copy()
    vma = yield from change_vma_flags(machine, vma, prev, start, stop, flags)
    try_writable = bool(flags & VM_WRITE)
    if flags & VM_SHARED:  # whoever holds the part now is asked with the protection it had before
        try_writable = _wants_writenotify(flags, int(flags_before[vma.row]) or old)
    yield from change_protection(machine, tlb, vma, start, stop, try_writable)
    if old & (VM_WRITE | VM_SHARED | VM_LOCKED) == VM_LOCKED and flags & VM_WRITE:
        with contextlib.suppress(KernelError):  # locked pages break COW now, not later
            yield from populate_vma_page_range(machine, vma, start, stop)
        vma = vma_at(machine, vma.row)
    return vma


@kernel("mm/mprotect.c")
def change_protection(
    machine: Machine, tlb: MmuGather, vma: Vma, start: int, stop: int, try_writable: bool
) -> Routine[None]:
    """Change the words of a mapping: one PROTECTION_VMA for each 1 GiB run that has a table.

    ``try_writable`` asks of every word whether it may be written at once.
    """
    if vma.flags & VM_HUGETLB:
        yield from hugetlb_change_protection(machine, vma, start, stop)
        return
    root = mm_root(machine, vma.mm)
    for first, last in populated_pmds(machine, root, start, stop):
        range = MmuNotifierRange.one(vma.mm, Event.PROTECTION_VMA, first, last, vma=vma.row)
        yield from invalidate_range_start(machine, range)
        yield from split_huge_pmds_across(machine, vma, (first, last))
        changed = 0
        for run in walk(machine, root, first, last):
            if run.row < 0:
                continue
            end = run.row + run.stop - run.start
            for row in np.arange(run.row, end, BLOCK).tolist():  # over blocks
                rows = slice(row, min(row + BLOCK, end))
                words = machine["pte"][rows]
                marks = marks_of(words)
                change = _change(machine, vma, words, marks, try_writable and not run.huge)
                differ = change != 0
                changed += how_many(differ, words.size)
                tlb.cleared |= any_of(differ & pte_accessible(marks))
                machine.write("pte", rows, words ^ change)
        yield machine.step(
            f"{{range}}: {changed} words have the rights of {vma.permissions} now.",
            vma.mm,
            first,
            last,
        )
        yield from invalidate_range_end(machine, range)


def _wants_writenotify(flags: int, before: int) -> bool:
    """Whether writes to a shared mapping are tracked, and its words were not (soft-dirty).

    ``before`` are the flags that its protection is still after (``vma_wants_writenotify``).
    """
    tracked = flags & (VM_WRITE | VM_SHARED | VM_SOFTDIRTY) == VM_WRITE | VM_SHARED
    return tracked and vm_page_prot(before) == vm_page_prot(flags | VM_SOFTDIRTY)


def _change(machine: Machine, vma: Vma, words: Words, marks: Words, try_writable: bool) -> Words:
    """The bits of words that change by the rights that the mapping has now; maybe one for all.

    ``marks`` are theirs. A huge one never becomes writable here: its next write fault makes it so
    (``change_pte_range``).
    """
    prot = vm_page_prot(vma.flags)
    if not vma.flags & VM_WRITE and prot & PRESENT and all_of(marks & np.uint64(PRESENT)):
        return marks ^ with_protection(marks, prot)
    present = is_present(words)
    changed = words.copy()
    if present.any():
        new = with_protection(words[present], prot)
        if try_writable:
            new = np.where(_may_be_writable(machine, vma, new), new | np.uint64(RW), new)
        changed[present] = new
    special = np.flatnonzero(~present & (words != 0))
    if special.size:
        changed[special] = _write_protected(words[special])
    return words ^ changed


def _may_be_writable(machine: Machine, vma: Vma, words: Words) -> Bools:
    """Pages whose write fault would make them writable at once (``can_change_pte_writable``)."""
    dirty = ((words & PRESENT) != 0) & ((words & DIRTY) != 0)
    if not vma.flags & VM_SOFTDIRTY:  # the first write since then must be seen
        dirty &= (words & SOFT_DIRTY) != 0
    if vma.flags & VM_SHARED:
        return dirty
    normal = dirty & ((words & SPECIAL) == 0)
    frames = page_rows(machine, np.where(normal, pfn_of(words), 0))
    return normal & ((machine["page.flags"][frames] & PG_ANON_EXCLUSIVE) != 0)


_READABLE = {
    SWP_MIGRATION_WRITE: SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_DEVICE_WRITE: SWP_DEVICE_READ,
    SWP_DEVICE_EXCLUSIVE_WRITE: SWP_DEVICE_EXCLUSIVE_READ,
}


def _write_protected(words: Words) -> Words:
    """Swap-type words without the right to write: it is never given back to them."""
    changed = words.copy()
    kinds = swap_type(words)
    for writable, readable in _READABLE.items():
        mine = kinds == writable
        new = swap_word(readable, swap_offset(words[mine]))
        if writable != SWP_DEVICE_WRITE:  # a device page's soft-dirty bit is lost
            new |= words[mine] & np.uint64(SWP_SOFT_DIRTY)
        changed[mine] = new
    return changed
