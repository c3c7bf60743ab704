"""Collapse: 512 small pages become a huge one.

Source: mm/khugepaged.c.
"""

from __future__ import annotations

import enum

import numpy as np

from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    Bools,
    Words,
    is_present,
    is_swap_type,
    pfn_of,
    present_word,
)
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.huge_memory import hugepage_vma_check
from hmmlab.model.lru import lru_add_drain, lru_add_drain_all, mlock_page_drain
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_HUGETLB,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_SPECIAL,
    VM_WRITE,
    Vma,
    mm_is_alive,
    mm_root,
    vm_page_prot,
    vma_at,
    vmas_of,
)
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import frames_of, is_zone_device, page_rows
from hmmlab.model.page_alloc import alloc_huge_pages
from hmmlab.model.page_ref import put_page
from hmmlab.model.page_table import has_table, is_huge, rows_of_range, set_huge, table_of
from hmmlab.model.rmap import page_add_new_anon_rmap, page_remove_rmap
from hmmlab.model.rows import as_rows
from hmmlab.model.swap import free_swap_cache
from hmmlab.model.swap_fault import do_swap_page
from hmmlab.model.tlb import flush_tlb

__all__ = ["ScanResult", "collapse_range", "khugepaged", "may_collapse"]


class ScanResult(enum.Enum):
    """What became of 2 MiB; the value is the errno of an madvise that ends with it."""

    SUCCEED = 0
    PMD_MAPPED = 0.5
    PMD_NULL = 22
    PMD_NONE = 22.1
    PTE_NON_PRESENT = 22.2
    PAGE_RO = 22.3
    PAGE_NULL = 22.4
    PAGE_COUNT = 11
    ALLOC_HUGE_PAGE_FAIL = 12
    FAIL = 22.5


#: Most of 512 pages that may be in swap, or shared, for khugepaged.
_MAX_SWAPPED, _MAX_SHARED = PMD_PAGES // 8, PMD_PAGES // 2

_GO_ON = (
    ScanResult.PMD_NULL,
    ScanResult.PTE_NON_PRESENT,
    ScanResult.PAGE_RO,
    ScanResult.PAGE_NULL,
    ScanResult.PAGE_COUNT,
)


def may_collapse(vma: Vma) -> bool:
    """Whether a mapping may hold huge pages at all (``hugepage_vma_check``)."""
    first = (vma.end - PMD_PAGES) // PMD_PAGES * PMD_PAGES
    return (
        vma.is_anonymous
        and bool(vma.anon_vma)
        and not vma.flags & (VM_NOHUGEPAGE | VM_SPECIAL | VM_HUGETLB)
        and vma.start <= first
        and first + PMD_PAGES <= vma.end
    )


@kernel("mm/khugepaged.c", "madvise_collapse")
def collapse_range(machine: Machine, vma: Vma, start: int, stop: int) -> Routine[int]:
    """Collapse every 2 MiB that lies wholly in the range. Returns 0 or an errno."""
    lru_add_drain_all(machine)
    first, last = -(-start // PMD_PAGES) * PMD_PAGES, stop // PMD_PAGES * PMD_PAGES
    failure, done = ScanResult.FAIL, 0
    for at in np.arange(first, last, PMD_PAGES).tolist():  # over 2 MiB
        result = yield from _collapse(machine, vma_at(machine, vma.row), at)
        if result in (ScanResult.SUCCEED, ScanResult.PMD_MAPPED):
            done += 1
            continue
        failure = result
        if result not in _GO_ON:
            break
    yield machine.step(f"{done} huge pages in {{range}}.", vma.mm, start, stop)
    return 0 if done == (last - first) // PMD_PAGES else int(failure.value)


@Machine.kernel_thread("khugepaged", "khugepaged.awake")
@kernel("mm/khugepaged.c", "khugepaged_do_scan")
def khugepaged(machine: Machine) -> Routine[None]:
    """The background thread has been woken: it collapses what is worth it, everywhere once.

    It asks for more than madvise does: a page that was used lately, and few that are shared or in
    swap.
    """
    machine.write("khugepaged.awake", 0, 0)
    done = 0
    for mm in np.flatnonzero(machine["mm.khugepaged"]).tolist():
        if not mm_is_alive(machine, mm):
            continue
        for vma in vmas_of(machine, mm):
            if not (hugepage_vma_check(vma) and may_collapse(vma)):
                continue
            first, last = -(-vma.start // PMD_PAGES), vma.end // PMD_PAGES
            for block in np.arange(first, last).tolist():  # over 2 MiB
                now = vma_at(machine, vma.row)
                if _is_worth_it(machine, now, block * PMD_PAGES):
                    result = yield from _collapse(machine, now, block * PMD_PAGES)
                    done += result is ScanResult.SUCCEED
    yield machine.step(f"khugepaged has made {done} huge pages, and sleeps.")


def _is_worth_it(machine: Machine, vma: Vma, first: int) -> bool:
    """What khugepaged asks of 2 MiB beyond what a collapse needs (``hpage_collapse_scan_pmd``)."""
    root = mm_root(machine, vma.mm)
    if not has_table(machine, root, first) or is_huge(machine, root, first):
        return False
    words = machine["pte"][rows_of_range(machine, root, first, first + PMD_PAGES)]
    normal = is_present(words) & ((words & SPECIAL) == 0)
    frames = page_rows(machine, np.where(normal, pfn_of(words), 0))
    swapped = int(is_swap_type(words).sum())
    shared = int((normal & (machine["page.mapcount"][frames] > 1)).sum())
    young = int((normal & ((words & ACCESSED) != 0)).sum())
    enough = young >= (PMD_PAGES // 2 if swapped else 1)
    # The fault that has woken it may have brought a huge page, and split its word at once for a
    # device: while the parts are held for that, it has come and gone.
    enough &= not machine["page.compound"][frames].any()
    return swapped <= _MAX_SWAPPED and shared <= _MAX_SHARED and normal.any() and enough


def _collapse(machine: Machine, vma: Vma, first: int) -> Routine[ScanResult]:
    root = mm_root(machine, vma.mm)
    if not table_of(machine, root, first, "pmd"):
        return ScanResult.PMD_NULL
    if not has_table(machine, root, first):
        return ScanResult.PMD_NONE
    if is_huge(machine, root, first):
        return ScanResult.PMD_MAPPED
    rows = rows_of_range(machine, root, first, first + PMD_PAGES)
    words = machine["pte"][rows].copy()
    result = _scan(machine, words, swapped=True)
    if result is not ScanResult.SUCCEED:
        return result
    yield from _swap_in(machine, vma, first, words)
    return (yield from _collapse_huge_page(machine, vma, first))


def _scan(machine: Machine, words: Words, *, swapped: bool) -> ScanResult:
    """The first obstacle among 512 words, in their order; ``swapped`` ones may be none."""
    absent = is_swap_type(words)
    present = is_present(words)
    zero = present & ((words & SPECIAL) != 0)
    normal = present & ~zero
    frames = page_rows(machine, np.where(normal, pfn_of(words), 0))
    device = normal & is_zone_device(machine, np.where(normal, pfn_of(words), 0))
    held = normal & (_extra_references(machine, frames) > 0)
    obstacle = device | held | (absent if not swapped else np.zeros_like(absent))
    if obstacle.any():
        at = int(np.argmax(obstacle))
        if device[at]:
            return ScanResult.PAGE_NULL
        return ScanResult.PAGE_COUNT if held[at] else ScanResult.PTE_NON_PRESENT
    if not (present & ((words & RW) != 0)).any():
        return ScanResult.PAGE_RO
    return ScanResult.SUCCEED


def _extra_references(machine: Machine, rows: np.ndarray) -> np.ndarray:
    """References that are neither mappings nor the swap cache's (``is_refcount_suitable``)."""
    expected = machine["page.mapcount"][rows] + (machine["page.swap"][rows] != 0)
    return machine["page.refcount"][rows] - expected


def _swap_in(machine: Machine, vma: Vma, first: int, words: Words) -> Routine[None]:
    """Bring back what is not present, device pages among it, page by page."""
    absent = np.flatnonzero(is_swap_type(words))
    if not absent.size:
        return
    rows = rows_of_range(machine, mm_root(machine, vma.mm), first, first + PMD_PAGES)
    start = rows.start if isinstance(rows, slice) else int(np.atleast_1d(rows)[0])
    swapped = words[absent]
    with machine.bulk(absent.size):
        yield from do_swap_page(
            machine, vma, first + absent, as_rows(start + absent), swapped, swapped, write=False
        )
    lru_add_drain(machine)


@kernel("mm/khugepaged.c")
def _collapse_huge_page(machine: Machine, vma: Vma, first: int) -> Routine[ScanResult]:
    """Copy into a huge page; the CLEAR is over before anything is copied.

    Only the mmap_lock, held for writing, keeps others away then: a sequence number would not.
    """
    root, last = mm_root(machine, vma.mm), first + PMD_PAGES
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, first, last)
    yield from invalidate_range_start(machine, range)
    flush_tlb(machine)
    yield from invalidate_range_end(machine, range)
    rows = rows_of_range(machine, root, first, last)
    words = machine["pte"][rows].copy()
    result = _scan(machine, words, swapped=False)
    heads = alloc_huge_pages(machine, 1) if result is ScanResult.SUCCEED else np.zeros(0, np.int64)
    if result is ScanResult.SUCCEED and not heads.size:
        result = ScanResult.ALLOC_HUGE_PAGE_FAIL
    if result is not ScanResult.SUCCEED:
        return result
    new = frames_of(heads)
    normal: Bools = is_present(words) & ((words & SPECIAL) == 0)
    old = pfn_of(words[normal])
    machine.write("page.content", as_rows(new[normal]), machine["page.content"][old])
    page_remove_rmap(machine, old)
    cached = np.unique(old[machine["page.swap"][old] != 0])
    put_page(machine, old)
    free_swap_cache(machine, cached)
    if vma.flags & VM_LOCKED:
        mlock_page_drain(machine)
    page_add_new_anon_rmap(machine, new, vma, np.arange(first, last), huge=True)
    rights = DIRTY | SOFT_DIRTY | (RW if vma.flags & VM_WRITE else 0)
    machine.write("pte", rows, present_word(new, vm_page_prot(vma.flags) | rights))
    set_huge(machine, root, first, huge=True)
    yield machine.step("{range} {are} one huge page now.", vma.mm, first, last)
    return ScanResult.SUCCEED
