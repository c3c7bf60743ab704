"""Moving mapped pages to other addresses.

Source: mm/mremap.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.anon_vma import anon_vma_clone
from hmmlab.model.entry import HUGE, SOFT_DIRTY, SWP_SOFT_DIRTY, is_present, is_swap_type
from hmmlab.model.geometry import PMD_PAGES, USER_VPN_END, align_up
from hmmlab.model.huge_memory import split_huge_pmds_across
from hmmlab.model.hugetlb import clear_vma_resv_huge_pages, move_hugetlb_page_tables
from hmmlab.model.ksm import unmerge_ksm_pages
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import VM_HUGETLB, Vma, find_vma_prev, mm_lock, mm_root, vma_lookup
from hmmlab.model.mmap import close_unmapped_files, do_munmap, vma_merge
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page_table import alloc_tables, read_range, rows_of_range, walk, word_row
from hmmlab.model.tlb import flush_tlb
from hmmlab.model.vma import vm_area_dup

__all__ = ["sys_mremap"]

_EFAULT, _EINVAL = 14, 22


@kernel("mm/mremap.c", "__x64_sys_mremap")
def sys_mremap(machine: Machine, mm: int, start: int, pages: int, to: int) -> Routine[None]:
    """Move ``pages`` pages from page ``start`` to page ``to`` (MREMAP_MAYMOVE | MREMAP_FIXED).

    Raises
    ------
    KernelError
        EFAULT when the pages are not all in one mapping; EINVAL for no pages, for ranges that
        overlap, or beyond the address space.
    """
    stop = start + pages
    if pages <= 0 or not 0 <= to <= USER_VPN_END - pages or (start < to + pages and to < stop):
        raise KernelError(_EINVAL, f"mremap of {pages} pages from {start:#x} to {to:#x}")
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        vma = vma_lookup(machine, mm, start)
        if vma is None:
            place = machine.names.place(mm, start, start + 1)
            raise KernelError(_EFAULT, f"{place}: no mapping")
        if vma.flags & VM_HUGETLB:
            pages = align_up(pages, PMD_PAGES)
            stop = start + pages
            if start % PMD_PAGES or to % PMD_PAGES or (start < to + pages and to < stop):
                raise KernelError(_EINVAL, f"mremap of huge pages from {start:#x} to {to:#x}")
        yield from do_munmap(machine, mm, to, to + pages)
        machine.called("vma_to_resize")
        vma = vma_lookup(machine, mm, start)
        if vma is None or vma.end < stop:
            place = machine.names.place(mm, start, stop)
            raise KernelError(_EFAULT, f"{place}: not all in one mapping")
        yield from _move_vma(machine, vma, start, stop, to)
    finally:
        machine.up_write(lock)
    yield from close_unmapped_files(machine)


def _move_vma(machine: Machine, vma: Vma, start: int, stop: int, to: int) -> Routine[None]:
    """A mapping at the new place, the words moved over, and the old place unmapped."""
    mm, pages = vma.mm, stop - start
    yield from unmerge_ksm_pages(machine, vma, start, stop)
    vma = vma_lookup(machine, mm, start) or vma
    # A mapping without pages of its own forgets where it came from, to merge more easily.
    pgoff = vma.pgoff_of(start) if vma.anon_vma or vma.file else to
    _, prev = find_vma_prev(machine, mm, to)
    new = yield from vma_merge(
        machine, mm, prev, to, to + pages, vma.flags, vma.anon_vma, pgoff, vma.file
    )
    if new is None:
        new = vm_area_dup(machine, vma, mm, to, to + pages, pgoff)
        anon_vma_clone(machine, new, vma)
    # The old one may have grown into the new one.
    vma = vma_lookup(machine, mm, start) or vma
    yield from move_page_tables(machine, vma, start, stop, to)
    if vma.flags & VM_HUGETLB:
        clear_vma_resv_huge_pages(machine, vma)
    yield from do_munmap(machine, mm, start, stop)


@kernel("mm/mremap.c")
def move_page_tables(machine: Machine, vma: Vma, start: int, stop: int, to: int) -> Routine[None]:
    """Move words, or whole page tables where both places allow it, inside one UNMAP of the old."""
    if vma.flags & VM_HUGETLB:
        yield from move_hugetlb_page_tables(machine, vma, start, stop, to)
        return
    root = mm_root(machine, vma.mm)
    range = MmuNotifierRange.one(vma.mm, Event.UNMAP, start, stop, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    aligned = (to - start) % PMD_PAGES == 0
    for run in list(walk(machine, root, start, stop)):
        if run.huge:
            edges: tuple[int, ...] = (run.start, run.stop)
            if not aligned:
                first = run.start // PMD_PAGES * PMD_PAGES  # inside each of its PMD words
                edges = tuple(np.arange(first + 1, run.stop + 1, PMD_PAGES).tolist())
            yield from split_huge_pmds_across(machine, vma, edges)
    for run in list(walk(machine, root, start, stop)):
        if run.row < 0:
            continue
        first, last = run.start, run.stop
        if aligned:  # whole tables: their words keep every bit
            head = min(last, -(-first // PMD_PAGES) * PMD_PAGES)
            tail = max(head, last // PMD_PAGES * PMD_PAGES)
            _move_words(machine, root, first, head, to - start)
            if head < tail:
                _move_tables(machine, root, head, tail, to - start)
            first = tail
        _move_words(machine, root, first, last, to - start)
    yield machine.step("What {range} held has moved to its new place.", vma.mm, start, stop)
    yield from invalidate_range_end(machine, range)


def _move_words(machine: Machine, root: int, start: int, stop: int, shift: int) -> None:
    """Move words one by one; each is marked soft-dirty, for its address has a new meaning."""
    words = read_range(machine, root, start, stop)
    if not words.any():
        if stop > start:
            alloc_tables(machine, root, start + shift, stop + shift)
        return
    alloc_tables(machine, root, start + shift, stop + shift)
    present = is_present(words)
    tables = np.unique((start + np.flatnonzero(present)) // PMD_PAGES).size
    flush_tlb(machine, tables)
    mark = np.where(present, np.uint64(SOFT_DIRTY), np.uint64(0))
    mark = np.where(is_swap_type(words), np.uint64(SWP_SOFT_DIRTY), mark)
    machine.write("pte", rows_of_range(machine, root, start, stop), 0)
    machine.write("pte", rows_of_range(machine, root, start + shift, stop + shift), words | mark)


def _move_tables(machine: Machine, root: int, start: int, stop: int, shift: int) -> None:
    """Hang page tables in at another place (``move_normal_pmd``)."""
    alloc_tables(machine, root, start + shift, stop + shift, "pmd")
    for at in np.arange(start, stop, PMD_PAGES).tolist():  # over page tables
        old = word_row(machine, root, at, "pmd")
        new = word_row(machine, root, at + shift, "pmd")
        word = machine["pmd"][old]
        machine.write("pmd", old, 0)
        machine.write("pmd", new, word)
        flush_tlb(machine, int(word != 0))
        if word & np.uint64(HUGE):  # a huge word is marked like a small one
            rows = rows_of_range(machine, root, at + shift, at + shift + PMD_PAGES)
            machine.write("pte", rows, machine["pte"][rows] | np.uint64(SOFT_DIRTY))
