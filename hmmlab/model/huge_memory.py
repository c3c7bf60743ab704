"""Huge pages: 2 MiB of private memory that one PMD word maps.

A huge page is 512 frames side by side with ``page.compound`` set. Where a PMD word maps it, the
table behind that word holds the words that the huge one stands for, all alike; each frame counts a
mapping and a reference then, as it does when the table itself maps it. So splitting the PMD word
changes little, and splitting the page takes its frames apart for good.

Source: mm/huge_memory.c.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hmmlab.model.alike import any_of
from hmmlab.model.anon_vma import anon_vma_prepare
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    Bools,
    Pfns,
    Words,
    pfn_of,
    present_word,
)
from hmmlab.model.geometry import PMD_PAGES, align_down
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_NOHUGEPAGE,
    VM_SPECIAL,
    VM_WRITE,
    Vma,
    mm_is_alive,
    mm_root,
    vm_page_prot,
)
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import PG_ANON_EXCLUSIVE, PG_DIRTY, ZERO_PFN, frames_of, page_rows, set_flags
from hmmlab.model.page_alloc import alloc_huge_pages
from hmmlab.model.page_table import (
    alloc_tables,
    has_table,
    is_huge,
    rows_of_range,
    set_huge,
    table_of,
)
from hmmlab.model.rmap import page_add_new_anon_rmap
from hmmlab.model.rows import as_rows

__all__ = [
    "do_huge_pmd_anonymous_pages",
    "do_huge_pmd_wp_pages",
    "hugepage_vma_check",
    "khugepaged_enter",
    "leaders_of_blocks",
    "split_huge_pmd",
    "split_huge_pmds_across",
    "split_huge_pmds_at",
    "vma_adjust_trans_huge",
    "will_be_huge",
]

Machine.declare("mm.khugepaged", np.int32, "1 once khugepaged visits the address space")
Machine.declare("khugepaged.awake", np.int32, "1 when it has been woken and has not run yet")
Machine.declare("huge_zero.pfn", np.int64, "first frame of the huge page of zeros, once it exists")


def hugepage_vma_check(vma: Vma) -> bool:
    """Whether faults may bring huge pages: private memory for which it was advised."""
    return (
        vma.is_anonymous
        and bool(vma.flags & VM_HUGEPAGE)
        and not vma.flags & (VM_NOHUGEPAGE | VM_SPECIAL | VM_HUGETLB)
    )


def _suitable(vma: Vma, first: int) -> bool:
    return vma.start <= first and first + PMD_PAGES <= vma.end


def leaders_of_blocks(vpns: Pfns, among: Bools) -> Bools:
    """Which of ``vpns`` (ascending) are the first ``among`` them in their 2 MiB.

    ``among`` is of their shape, or one for all where it is none; so is the answer.
    """
    if not any_of(among):
        return among
    leaders = among.copy()
    leaders[among] = np.diff(vpns[among] // PMD_PAGES, prepend=-1) != 0
    return leaders


def khugepaged_enter(machine: Machine, vma: Vma, flags: int) -> None:
    """Let khugepaged visit the address space of a mapping that could, with ``flags``, be huge.

    The first one that it is told of wakes it; later ones wait for its next round, ten seconds on.
    """
    fits = vma.start <= align_down(vma.end - PMD_PAGES, PMD_PAGES)
    eligible = hugepage_vma_check(vma._replace(flags=flags)) and bool(vma.anon_vma) and fits
    if eligible and not machine["mm.khugepaged"][vma.mm]:
        known = np.flatnonzero(machine["mm.khugepaged"])
        if not any(mm_is_alive(machine, mm) for mm in known.tolist()):
            machine.write("khugepaged.awake", 0, 1)
        machine.write("mm.khugepaged", vma.mm, 1)


# --- faults ---------------------------------------------------------------------------------------


def will_be_huge(machine: Machine, vma: Vma, vpns: Pfns) -> Bools:
    """Which of ``vpns`` (ascending) lie in 2 MiB that a fault would fill with a huge page.

    One for all where huge pages are not wanted.
    """
    if not hugepage_vma_check(vma):
        return np.array([False])
    root = mm_root(machine, vma.mm)
    blocks, which = np.unique(vpns // PMD_PAGES, return_inverse=True)
    fit = [
        _suitable(vma, first) and not has_table(machine, root, first)
        for first in (blocks * PMD_PAGES).tolist()  # over page tables
    ]
    return np.array(fit, np.bool_)[which]


@kernel("mm/huge_memory.c", "do_huge_pmd_anonymous_page")
def do_huge_pmd_anonymous_pages(
    machine: Machine, vma: Vma, vpns: Pfns, write: bool
) -> Routine[None]:
    """Fill the 2 MiB around each of ``vpns`` with a huge page, or map the huge page of zeros."""
    vma = anon_vma_prepare(machine, vma)
    khugepaged_enter(machine, vma, vma.flags)
    root, prot = mm_root(machine, vma.mm), vm_page_prot(vma.flags)
    blocks = vpns - vpns % PMD_PAGES
    if write:
        heads = alloc_huge_pages(machine, vpns.size)
        blocks = blocks[: heads.size]
        marks = DIRTY | SOFT_DIRTY | (RW if vma.flags & VM_WRITE else 0)
        words = present_word(frames_of(heads), prot | marks)
        pages = frames_of(blocks)
        page_add_new_anon_rmap(machine, frames_of(heads), vma, pages, huge=True)
    else:
        zeros = np.arange(PMD_PAGES) + _huge_zero_page(machine)
        words = np.tile(present_word(zeros, prot | SPECIAL), blocks.size)
    for number, first in enumerate(blocks.tolist()):  # over page tables
        part = words[number * PMD_PAGES : (number + 1) * PMD_PAGES]
        alloc_tables(machine, root, first, first + PMD_PAGES)
        set_huge(machine, root, first, huge=True)
        machine.write("pte", rows_of_range(machine, root, first, first + PMD_PAGES), part)
    what = "2 MiB of new memory" if write else "the huge page of zeros"
    yield machine.step(
        f"First touch around {{range}}: {what} is mapped by one PMD word.",
        vma.mm,
        int(vpns[0]),
        int(vpns[-1]) + 1,
    )


def _huge_zero_page(machine: Machine) -> int:
    pfn = int(machine["huge_zero.pfn"][0])
    if not pfn:
        heads = alloc_huge_pages(machine, 1)
        if not heads.size:
            raise KernelError(12, "RAM has no huge page left")
        pfn = int(heads[0])
        machine.write("huge_zero.pfn", 0, pfn)
    return pfn


@kernel("mm/huge_memory.c", "do_huge_pmd_wp_page")
def do_huge_pmd_wp_pages(machine: Machine, vma: Vma, vpns: Pfns, order: Pfns) -> Routine[None]:
    """A write to huge pages that may not be written, one for each of ``vpns``.

    A page that nobody else has becomes writable as a whole; otherwise its PMD word is split, and
    the fault goes on with the small page.
    """
    root = mm_root(machine, vma.mm)
    for vpn, key in zip(vpns.tolist(), order.tolist(), strict=True):  # over page tables
        first = align_down(vpn, PMD_PAGES)
        rows = rows_of_range(machine, root, first, first + PMD_PAGES)
        words = machine["pte"][rows]
        frames = page_rows(machine, pfn_of(words))
        exclusive = bool(machine["page.flags"][frames[0]] & PG_ANON_EXCLUSIVE)
        zero = bool(words[0] & np.uint64(SPECIAL))
        alone = exclusive or bool((machine["page.refcount"][frames] == 1).all())
        if zero or not alone:
            yield from split_huge_pmd(machine, vma, first, key)
            continue
        if not exclusive:
            set_flags(machine, pfn_of(words), PG_ANON_EXCLUSIVE)
            machine.write("page.mapping", as_rows(frames), vma.anon_vma)
        rights = RW if vma.flags & VM_WRITE else 0
        machine.write("pte", rows, words | np.uint64(ACCESSED | DIRTY | SOFT_DIRTY | rights))
        yield machine.step(
            "Nobody else has the huge page of {range}: it becomes writable in place.",
            vma.mm,
            first,
            first + PMD_PAGES,
        )


# --- splitting a PMD word -------------------------------------------------------------------------


@kernel("mm/huge_memory.c")
def vma_adjust_trans_huge(machine: Machine, vma: Vma, edge: int) -> Routine[None]:
    """Split what a mapping may hold across ``edge``, before its border comes to stand there.

    Linux does not look first whether a huge page is there: a PMD table and room for one in the
    mapping are enough for the CLEAR.
    """
    first = align_down(edge, PMD_PAGES)
    if first < edge and _suitable(vma, first):
        yield from split_huge_pmds_at(machine, vma, first)


def split_huge_pmds_at(
    machine: Machine, vma: Vma, vpn: int, *, freeze: bool = False
) -> Routine[None]:
    """Split the PMD word of page ``vpn``, where a PMD table is (``split_huge_pmd_address``)."""
    if table_of(machine, mm_root(machine, vma.mm), vpn, "pmd"):
        yield from split_huge_pmd(machine, vma, align_down(vpn, PMD_PAGES), freeze=freeze)


def split_huge_pmds_across(machine: Machine, vma: Vma, edges: Iterable[int]) -> Routine[None]:
    """Split PMD words that map huge pages across one of ``edges``."""
    root = mm_root(machine, vma.mm)
    for edge in edges:
        first = align_down(edge, PMD_PAGES)
        if edge != first and is_huge(machine, root, edge):
            yield from split_huge_pmd(machine, vma, first)


@kernel("mm/huge_memory.c", "__split_huge_pmd")
def split_huge_pmd(
    machine: Machine, vma: Vma, first: int, order: int | None = None, *, freeze: bool = False
) -> Routine[None]:
    """Let the table map what the PMD word of page ``first`` maps, inside a CLEAR of its 2 MiB.

    The CLEAR is raised whether a huge page is there or not. ``order`` is the iteration of the
    caller's loop; ``freeze`` says that the small words will be frozen at once, and so stay dirty.
    """
    key = None if order is None else np.array([order])
    last = first + PMD_PAGES
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, first, last, vma=vma.row, order=key)
    yield from invalidate_range_start(machine, range)
    root = mm_root(machine, vma.mm)
    huge = is_huge(machine, root, first)
    if huge:
        rows = rows_of_range(machine, root, first, last)
        machine.write("pte", rows, _split_words(machine, vma, machine["pte"][rows], freeze))
        set_huge(machine, root, first, huge=False)
        machine.called("flush_tlb_mm_range")
        machine.called("page_remove_rmap", PMD_PAGES if freeze else 0)
    yield machine.step(
        "512 small words map {range} now."
        if huge
        else "{range} could hold a huge page; it holds none, but the event is raised.",
        vma.mm,
        first,
        last,
    )
    yield from invalidate_range_end(machine, range)


def _split_words(machine: Machine, vma: Vma, words: Words, freeze: bool) -> Words:
    """Small words for a huge one: dirty goes to the pages, the rest stays."""
    if words[0] & np.uint64(SPECIAL):
        return np.full(words.size, present_word(ZERO_PFN, vm_page_prot(vma.flags) | SPECIAL))
    if words[0] & np.uint64(DIRTY):
        set_flags(machine, pfn_of(words), PG_DIRTY)
    return words if freeze else words & np.uint64(~DIRTY & _ALL)


_ALL = (1 << 64) - 1
