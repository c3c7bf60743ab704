"""Advice on mapped pages.

Source: mm/madvise.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from hmmlab.model.access import check_vma_flags, populate
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    SPECIAL,
    Words,
    is_present,
    is_swapped,
    pfn_of,
    swap_offset,
)
from hmmlab.model.filemap import punch_hole
from hmmlab.model.geometry import PMD_PAGES, align_down
from hmmlab.model.huge_memory import khugepaged_enter
from hmmlab.model.khugepaged import collapse_range, may_collapse
from hmmlab.model.lru import lru_add_drain, mark_page_lazyfree
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.migration import split_huge_page
from hmmlab.model.mm_types import (
    VM_DONTCOPY,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_LOCKED,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_SHARED,
    VM_WIPEONFORK,
    Vma,
    find_vma,
    find_vma_prev,
    find_vmas_of_file,
    mm_lock,
    mm_root,
    vma_at,
)
from hmmlab.model.mmap import change_vma_flags
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import PG_DIRTY, PG_LRU, frames_of, is_zone_device, page_rows, set_flags
from hmmlab.model.page_table import is_huge, walk
from hmmlab.model.rows import as_rows, unique_rows
from hmmlab.model.swap import folio_free_swap, free_swap_and_cache
from hmmlab.model.tlb import MmuGather, flush_tlb
from hmmlab.model.vmscan import reclaim_pages
from hmmlab.model.zap import unmap_single_vma

__all__ = ["ADVICE", "sys_madvise"]

_ENOMEM, _EACCES, _EFAULT, _EINVAL = 12, 13, 14, 22

#: Advice on a part of one mapping: returns the mapping that holds the part then.
Visit = Callable[[Machine, Vma, Vma | None, int, int], Routine[Vma]]


@kernel("mm/madvise.c", "__x64_sys_madvise")
def sys_madvise(machine: Machine, mm: int, start: int, stop: int, advice: str) -> Routine[None]:
    """Follow ``advice``, one of :data:`ADVICE`, for pages ``start`` to ``stop - 1``.

    Raises
    ------
    KernelError
        ENOMEM when part of the range is not mapped; the rest has been done all the same. EINVAL or
        EACCES at the first mapping that the advice does not suit.
    """
    visit = _VISITS[advice]
    lock = mm_lock(machine, mm)
    write = advice in _CHANGES
    yield from machine.down_write(lock) if write else machine.down_read(lock)
    try:
        yield from _walk_vmas(machine, mm, start, stop, visit)
    finally:
        (machine.up_write if write else machine.up_read)(lock)


def _walk_vmas(machine: Machine, mm: int, start: int, stop: int, visit: Visit) -> Routine[None]:
    at, all_mapped = start, True
    vma, prev = find_vma_prev(machine, mm, start)
    if vma and vma.start < start:
        prev = vma
    while at < stop:
        if vma is None or vma.start > at:
            all_mapped = False
            at = vma.start if vma else stop
            continue
        end = min(vma.end, stop)
        prev = yield from visit(machine, vma, prev, at, end)
        at = max(end, prev.end)
        if at < stop:
            vma = find_vma(machine, mm, prev.end)
    if not all_mapped:
        raise KernelError(_ENOMEM, f"{machine.names.place(mm, start, stop)}: not all mapped")


def _refuse(machine: Machine, vma: Vma, start: int, errno: int, why: str) -> KernelError:
    place = machine.names.place(vma.mm, start, start + 1)
    return KernelError(errno, f"{place}: {why}")


# --- throwing away --------------------------------------------------------------------------------


def _dontneed(machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int) -> Routine[Vma]:
    if vma.flags & VM_HUGETLB:
        if start % PMD_PAGES:
            raise _refuse(machine, vma, start, _EINVAL, "no huge page begins there")
        stop = align_down(stop, PMD_PAGES)
    elif vma.flags & (VM_LOCKED | VM_PFNMAP):
        raise _refuse(machine, vma, start, _EINVAL, "the pages are locked")
    if start == stop:
        return vma
    yield from zap_page_range_single(machine, vma, start, stop)
    return vma


@kernel("mm/memory.c")
def zap_page_range_single(
    machine: Machine, vma: Vma, start: int, stop: int, *, even_cows: bool = True
) -> Routine[None]:
    """Empty a part of one mapping inside a CLEAR of it."""
    lru_add_drain(machine)
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, start, stop, vma=vma.row)
    tlb = MmuGather(machine, vma.mm)
    yield from invalidate_range_start(machine, range)
    yield from unmap_single_vma(machine, tlb, vma, start, stop, even_cows=even_cows)
    yield from invalidate_range_end(machine, range)
    tlb.finish()


def _free(machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int) -> Routine[Vma]:
    """The pages may be taken without being saved, unless they are written before that."""
    if vma.flags & (VM_LOCKED | VM_PFNMAP | VM_HUGETLB) or not vma.is_anonymous:
        raise _refuse(machine, vma, start, _EINVAL, "only private anonymous memory can be freed")
    lru_add_drain(machine)
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, start, stop, vma=vma.row)
    tlb = MmuGather(machine, vma.mm)
    yield from invalidate_range_start(machine, range)
    yield from _free_range(machine, tlb, vma, start, stop)
    yield from invalidate_range_end(machine, range)
    tlb.finish()
    return vma


@kernel("mm/pagewalk.c", "walk_page_range")
def _free_range(machine: Machine, tlb: MmuGather, vma: Vma, start: int, stop: int) -> Routine[None]:
    for low, high, row in list(_tables(machine, vma, start, stop)):
        end = yield from _split_until_shared(
            machine, vma, low, high, row, ACCESSED | DIRTY, by_head=True
        )
        _free_words(machine, tlb, row, end - low)
    yield machine.step("{range} may be freed whenever memory runs short.", vma.mm, start, stop)


def _free_words(machine: Machine, tlb: MmuGather, row: int, pages: int) -> None:
    rows = np.arange(row, row + pages)
    words = machine["pte"][row : row + pages].copy()
    swapped = is_swapped(words)
    if swapped.any():
        machine.write("pte", rows[swapped], 0)
        free_swap_and_cache(machine, swap_offset(words[swapped]))
    rows, words, pfns = _small_pages(machine, rows, words)
    frames = page_rows(machine, pfns)
    flags = machine["page.flags"][frames]
    kept = (machine["page.swap"][frames] != 0) | ((flags & PG_DIRTY) != 0)
    once = machine["page.mapcount"][frames] == 1
    folio_free_swap(machine, unique_rows(pfns[kept & once]))
    in_swap = machine["page.swap"][frames] != 0
    given_up = ~kept | (once & ~in_swap)
    if (kept & given_up).any():
        set_flags(machine, pfns[kept & given_up], off=PG_DIRTY)
    rows, words, pfns = rows[given_up], words[given_up], pfns[given_up]
    tlb.cleared |= bool((words & (ACCESSED | DIRTY)).any())
    machine.write("pte", as_rows(rows), words & np.uint64(~(ACCESSED | DIRTY) & _ALL))
    mark_page_lazyfree(machine, pfns)


def _tables(machine: Machine, vma: Vma, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """First page, page past the last and row of the words of a range, table by table.

    Tables that lie side by side are taken at once where they map no huge page.
    """
    for run in walk(machine, mm_root(machine, vma.mm), start, stop):
        if run.row < 0:
            continue
        rows = np.arange(run.row, run.row + run.stop - run.start)
        _, _, pfns = _small_pages(machine, rows, machine["pte"][rows])
        if not run.huge and not machine["page.compound"][page_rows(machine, pfns)].any():
            yield run.start, run.stop, run.row
            continue
        first = align_down(run.start, PMD_PAGES)
        for at in np.arange(first, run.stop, PMD_PAGES).tolist():
            low, high = max(at, run.start), min(at + PMD_PAGES, run.stop)
            yield low, high, run.row + low - run.start


def _split_until_shared(
    machine: Machine, vma: Vma, low: int, high: int, row: int, marks: int, *, by_head: bool
) -> Routine[int]:
    """Split the huge pages of one table, unless a PMD word maps one that is wholly in the range.

    Returns where the walk of the table ends: at a huge page that others map too, or that cannot be
    split. ``by_head`` says that its first frame tells how often it is mapped. A PMD word is flushed
    before its ``marks`` are cleared.
    """
    if is_huge(machine, mm_root(machine, vma.mm), low):
        word = machine["pte"][row : row + 1]
        if word[0] & np.uint64(SPECIAL):
            return low
        head = int(machine["page.compound"][pfn_of(word)[0]])
        counts = machine["page.mapcount"][frames_of(np.array([head]))]
        if (counts[: None if by_head else 1] != 1).any():
            return low
        if high - low == PMD_PAGES:
            flush_tlb(machine, int((word[0] & np.uint64(marks)) != 0))
            return high
        return high if (yield from split_huge_page(machine, head)) else low
    while True:  # over huge pages
        rows = np.arange(row, row + high - low)
        rows, _, pfns = _small_pages(machine, rows, machine["pte"][rows])
        frames = page_rows(machine, pfns)
        heads = machine["page.compound"][frames]
        if not heads.any():
            return high
        first = int(np.argmax(heads != 0))
        head = int(heads[first])
        asked = head if by_head else int(frames[first])
        count = machine["page.mapcount"][asked] * (machine["page.compound"][asked] == head)
        if count != 1 or not (yield from split_huge_page(machine, head)):
            return low + int(rows[first]) - row


_ALL = (1 << 64) - 1


def _small_pages(
    machine: Machine, rows: np.ndarray, words: Words
) -> tuple[np.ndarray, Words, np.ndarray]:
    """Rows, words and frames of the pages of RAM among some words."""
    normal = is_present(words) & ((words & SPECIAL) == 0)
    normal &= ~is_zone_device(machine, np.where(normal, pfn_of(words), 0))
    return rows[normal], words[normal], pfn_of(words[normal])


def _remove(machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int) -> Routine[Vma]:
    """Punch a hole into the file that is mapped, for all who map it."""
    if not vma.file or vma.flags & VM_LOCKED:
        raise _refuse(machine, vma, start, _EINVAL, "no file is mapped there")
    if not vma.flags & VM_SHARED:  # it may be made writable, whether it is or not
        raise _refuse(machine, vma, start, _EACCES, "the mapping is no shared one")
    first, last = vma.pgoff_of(start), vma.pgoff_of(stop)
    for row in find_vmas_of_file(machine, vma.file):
        other = vma_at(machine, row)
        low = max(other.start, other.start + first - other.pgoff)
        high = min(other.end, other.start + last - other.pgoff)
        if low < high:
            yield from zap_page_range_single(machine, other, low, high, even_cows=False)
    punch_hole(machine, vma.file, first, last)
    yield machine.step("{range} {are} a hole of the file now.", vma.mm, start, stop)
    return vma


# --- pages on their way out -----------------------------------------------------------------------


def _pageout(machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int) -> Routine[Vma]:
    """Reclaim pages that nobody else maps, table by table."""
    yield from _age(machine, vma, start, stop, reclaim=True)
    return vma


def _cold(machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int) -> Routine[Vma]:
    """Let pages that nobody else maps look old."""
    yield from _age(machine, vma, start, stop, reclaim=False)
    return vma


def _age(machine: Machine, vma: Vma, start: int, stop: int, *, reclaim: bool) -> Routine[None]:
    if vma.flags & (VM_LOCKED | VM_PFNMAP | VM_HUGETLB):
        raise _refuse(machine, vma, start, _EINVAL, "the pages are locked or special")
    lru_add_drain(machine)
    tlb = MmuGather(machine, vma.mm)
    yield from _age_range(machine, tlb, vma, start, stop, reclaim=reclaim)
    tlb.finish()


@kernel("mm/pagewalk.c", "walk_page_range")
def _age_range(
    machine: Machine, tlb: MmuGather, vma: Vma, start: int, stop: int, *, reclaim: bool
) -> Routine[None]:
    for low, high, row in list(_tables(machine, vma, start, stop)):
        end = yield from _split_until_shared(machine, vma, low, high, row, ACCESSED, by_head=False)
        rows = np.arange(row, row + end - low)
        rows, words, pfns = _small_pages(machine, rows, machine["pte"][rows])
        frames = page_rows(machine, pfns)
        mine = (machine["page.mapcount"][frames] == 1) & (
            (machine["page.flags"][frames] & PG_LRU) != 0
        )
        rows, words, pfns = rows[mine], words[mine], pfns[mine]
        tlb.cleared |= bool((words & ACCESSED).any())
        machine.write("pte", as_rows(rows), words & np.uint64(~ACCESSED & _ALL))
        if reclaim and pfns.size:
            yield from reclaim_pages(machine, pfns)
    yield machine.step("{range} look{s} old now.", vma.mm, start, stop)


# --- pages on their way in ------------------------------------------------------------------------


def _populating(write: bool) -> Visit:
    def visit(machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int) -> Routine[Vma]:
        if not check_vma_flags(vma, write):
            raise _refuse(machine, vma, start, _EINVAL, f"the mapping is {vma.permissions}")
        try:
            yield from populate(machine, vma, start, stop, write)
        except KernelError as error:
            raise KernelError(error.errno or _EFAULT, str(error)) from error
        lru_add_drain(machine)
        return vma_at(machine, vma.row)

    return visit


def _collapse(machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int) -> Routine[Vma]:
    """Make huge pages of all 2 MiB that lie wholly in the range."""
    if not may_collapse(vma):
        raise _refuse(machine, vma, start, _EINVAL, "the mapping cannot hold huge pages")
    errno = yield from collapse_range(machine, vma, start, stop)
    if errno:
        raise _refuse(machine, vma, start, errno, "not all could be made huge")
    return vma_at(machine, vma.row)


# --- marks on the mapping -------------------------------------------------------------------------


def _set(on: int, off: int = 0, *, only_anonymous: bool = False) -> Visit:
    def mark(machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int) -> Routine[Vma]:
        if only_anonymous and (vma.file or vma.flags & VM_SHARED):
            raise _refuse(machine, vma, start, _EINVAL, "it is no private anonymous memory")
        flags = vma.flags & ~off | on
        if on & VM_HUGEPAGE:
            khugepaged_enter(machine, vma, flags)
        vma = yield from change_vma_flags(machine, vma, prev, start, stop, flags)
        yield machine.step("{range}: the mapping is marked.", vma.mm, start, stop)
        return vma

    return mark


_VISITS: dict[str, Visit] = {
    "dontneed": _dontneed,
    "free": _free,
    "remove": _remove,
    "pageout": _pageout,
    "cold": _cold,
    "collapse": _collapse,
    "populate_read": _populating(write=False),
    "populate_write": _populating(write=True),
    "hugepage": _set(VM_HUGEPAGE, VM_NOHUGEPAGE),
    "nohugepage": _set(VM_NOHUGEPAGE, VM_HUGEPAGE),
    "wipeonfork": _set(VM_WIPEONFORK, only_anonymous=True),
    "dontfork": _set(VM_DONTCOPY),
}

_CHANGES = ("hugepage", "nohugepage", "wipeonfork", "dontfork")

#: All advice there is.
ADVICE = tuple(_VISITS)
