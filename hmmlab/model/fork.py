"""fork: a child gets the parent's mappings, and shares its private pages until one of them writes.

Source: kernel/fork.c (``dup_mmap``), mm/memory.c (``copy_page_range`` and what it calls).
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.alike import all_of, any_of, how_many, not_zero, part_of, rows_where, some
from hmmlab.model.anon_vma import anon_vma_fork
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    PRESENT,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    SWP_EXCLUSIVE,
    Bools,
    Pfns,
    Words,
    is_device_private,
    is_present,
    is_swap_type,
    is_swapped,
    marks_and_pfns,
    pfn_of,
    present_word,
    swap_offset,
    swap_type,
    swap_word,
)
from hmmlab.model.exclusive import restore_exclusive_ptes
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.huge_memory import split_huge_pmd
from hmmlab.model.hugetlb import copy_hugetlb_page_range
from hmmlab.model.ksm import ksm_fork
from hmmlab.model.lru import fill_new
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_DONTCOPY,
    VM_HUGETLB,
    VM_LOCKED,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_SHARED,
    VM_WIPEONFORK,
    VM_WRITE,
    Vma,
    is_cow_mapping,
    mm_lock,
    mm_root,
    new_mm,
    vm_page_prot,
    vma_at,
    vmas_of,
)
from hmmlab.model.mmap import exit_mmap
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import PG_ANON_EXCLUSIVE, folio_maybe_dma_pinned, page_rows, pfn_to_page
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_ref import get_page
from hmmlab.model.page_table import alloc_tables, rows_of, rows_of_range, set_huge, walk
from hmmlab.model.rmap import page_add_new_anon_rmap, page_dup_rmap
from hmmlab.model.rows import Rows, first_and_last, row_numbers, shifted
from hmmlab.model.swap import swap_duplicate
from hmmlab.model.tlb import flush_tlb
from hmmlab.model.vma import insert_after, vm_area_dup

__all__ = ["dup_mmap"]

_ALL = (1 << 64) - 1


@kernel("kernel/fork.c")
def dup_mmap(machine: Machine, oldmm: int, name: str) -> Routine[int]:
    """A child's address space, a copy of ``oldmm`` mapping by mapping. Returns its number.

    Raises
    ------
    KernelError
        ENOMEM when RAM or the pool of huge pages has no page for the copy of a pinned one. What the
        child had by then goes again; what the parent may no longer write stays so.
    """
    mm = new_mm(machine, name)
    ksm_fork(machine, mm, oldmm)
    machine.write("mm.khugepaged", mm, int(machine["mm.khugepaged"][oldmm]))
    lock = mm_lock(machine, oldmm)
    yield from machine.down_write(lock)
    try:
        try:
            yield from _copy_mappings(machine, mm, oldmm)
        finally:
            machine.up_write(lock)
    except KernelError:
        yield from exit_mmap(machine, mm)
        raise
    return mm


def _copy_mappings(machine: Machine, mm: int, oldmm: int) -> Routine[None]:
    """Copy every mapping that a child may have."""
    for vma in vmas_of(machine, oldmm):
        if vma.flags & VM_DONTCOPY:
            continue
        child = vm_area_dup(machine, vma, mm, vma.start, vma.end, vma.pgoff)
        machine.write("vma.flags", child.row, vma.flags & ~VM_LOCKED)
        if vma.file:
            insert_after(machine, child, vma)
        if not vma.flags & VM_WIPEONFORK:
            anon_vma_fork(machine, child, vma)
            yield from copy_page_range(machine, vma_at(machine, child.row), vma)
    flush_tlb(machine)
    fill_new(machine)  # both write to their stacks and heaps at once, and so copy them
    yield machine.step("The child has a copy of every mapping.", oldmm)


@kernel("mm/memory.c")
def copy_page_range(machine: Machine, child: Vma, vma: Vma) -> Routine[None]:
    """Copy the words of one mapping, unless faults will find its pages as well.

    Where writes are private, both sides lose the right to write, inside a PROTECTION_PAGE of the
    parent's whole mapping.
    """
    if not vma.anon_vma and not vma.flags & (VM_PFNMAP | VM_MIXEDMAP):
        return
    if vma.flags & VM_HUGETLB:
        yield from copy_hugetlb_page_range(machine, child, vma)
        return
    cow = is_cow_mapping(vma.flags)
    range = MmuNotifierRange.one(vma.mm, Event.PROTECTION_PAGE, vma.start, vma.end, vma=vma.row)
    if cow:
        yield from invalidate_range_start(machine, range)
    yield from _split_pinned(machine, vma)
    for run in list(walk(machine, mm_root(machine, vma.mm), vma.start, vma.end)):
        if run.row < 0:
            continue
        alloc_tables(machine, mm_root(machine, child.mm), run.start, run.stop)
        words = machine["pte"][run.row : run.row + run.stop - run.start]
        there = not_zero(words)
        used, count = rows_where(there, words.size), how_many(there, words.size)
        parts = [(0, count)] if run.huge else machine.chunks(0, count)
        for first, last in parts:
            part = part_of(used, first, last)
            try:
                _copy_words(machine, child, vma, shifted(part, run.start), shifted(part, run.row))
            except KernelError:
                if cow:
                    yield from invalidate_range_end(machine, range)
                raise
            low, high = first_and_last(part)
            yield machine.step(
                "The child maps what {range} map{s}" + (", and neither may write." if cow else "."),
                vma.mm,
                run.start + low,
                run.start + high + 1,
            )
        if run.huge:
            for at in np.arange(run.start, run.stop, PMD_PAGES).tolist():  # over PMD words
                set_huge(machine, mm_root(machine, child.mm), at, huge=True)
    if cow:
        yield from invalidate_range_end(machine, range)


def _split_pinned(machine: Machine, vma: Vma) -> Routine[None]:
    """Split the PMD words of huge pages that may be pinned, so that their frames are copied."""
    for run in list(walk(machine, mm_root(machine, vma.mm), vma.start, vma.end)):
        if not run.huge:
            continue
        words = machine["pte"][run.row : run.row + run.stop - run.start]
        normal = (words & SPECIAL) == 0
        pfns = np.where(normal, pfn_of(words), 0)
        copied = _must_copy(machine, pfns, normal, pfn_to_page(machine, pfns))
        pinned = run.start + np.flatnonzero(copied)
        for block in np.unique(pinned // PMD_PAGES).tolist():  # over PMD words
            yield from split_huge_pmd(machine, vma, block * PMD_PAGES)


def _copy_words(machine: Machine, child: Vma, vma: Vma, vpns: Rows, rows: Rows) -> None:
    """Copy the words of ``vpns``, none of them empty, which are in ``rows`` of the parent."""
    restore_exclusive_ptes(machine, vma, vpns, rows)
    words = machine["pte"][rows].copy()
    marks, pfns = marks_and_pfns(words)
    present = is_present(marks)
    normal = present & ((marks & np.uint64(SPECIAL)) == 0)
    private = ~present & is_device_private(marks)
    at = pfn_to_page(machine, pfns if all_of(normal) else np.where(normal, pfns, 0))
    pinned = _must_copy(machine, pfns, normal, at)
    shared = (normal | private) & ~pinned
    if is_cow_mapping(vma.flags):
        words = _write_protected(words, marks)
    clean = DIRTY if vma.flags & VM_SHARED else 0
    copies = words ^ (marks & np.uint64(ACCESSED | clean))
    if not all_of(present):
        copies = np.where(present, copies, words)
        swapped = is_swapped(words)
        if any_of(swapped):
            words[swapped] &= np.uint64(~SWP_EXCLUSIVE & _ALL)
            copies[swapped] = words[swapped]
            swap_duplicate(machine, swap_offset(words[swapped]))
    frames = some(pfns, shared)
    pages = at if all_of(normal & shared) else pfn_to_page(machine, frames)
    get_page(machine, frames, pages)
    page_dup_rmap(machine, frames, pages)
    if any_of(pinned):
        mine = rows_where(pinned, pfns.size)
        words[mine] = machine["pte"][rows][mine]  # a pinned page stays the parent's own
        copies[mine] = _copied(machine, child, row_numbers(vpns)[mine], pfns[mine])
    machine.write("pte", rows, words)
    root = mm_root(machine, child.mm)
    if isinstance(vpns, slice):
        rows = rows_of_range(machine, root, vpns.start, vpns.stop)
    else:
        rows = rows_of(machine, root, row_numbers(vpns))
    machine.write("pte", rows, copies)


def _write_protected(words: Words, marks: Words) -> Words:
    """Words, which have these ``marks``, without the right to write.

    A device entry loses its soft-dirty bit with it.
    """
    if all_of(marks & np.uint64(PRESENT)):
        return words ^ (marks & np.uint64(RW))
    present = is_present(words)
    protected = np.where(present, words & np.uint64(~RW & _ALL), words)
    writable = is_swap_type(words) & (swap_type(words) == SWP_DEVICE_WRITE)
    protected[writable] = swap_word(SWP_DEVICE_READ, swap_offset(words[writable]))
    return protected


def _must_copy(machine: Machine, pfns: Pfns, normal: Bools, rows: Rows) -> Bools:
    """Which pages may be pinned, so that the child must not share them; or one for all.

    ``rows`` are those of the frames, of frame 0 where they are not ``normal``.
    """
    flags = machine.alike("page.flags", rows)
    exclusive = normal & ((flags & np.uint32(PG_ANON_EXCLUSIVE)) != 0)
    return exclusive & folio_maybe_dma_pinned(machine, pfns, rows)


def _copied(machine: Machine, child: Vma, vpns: Pfns, pfns: Pfns) -> Words:
    """Words of the child's own copies of some pages (``copy_present_page``)."""
    content = machine["page.content"][page_rows(machine, pfns)]
    new, rows = alloc_pages(machine, pfns.size, content=content)
    page_add_new_anon_rmap(machine, new, child, vpns, rows=rows)
    writable = RW if child.flags & VM_WRITE else 0
    return present_word(new, vm_page_prot(child.flags) | DIRTY | SOFT_DIRTY | writable)
