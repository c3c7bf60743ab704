"""hmm_range_fault: look at a range of an address space, and fault in what the caller asks for.

A walk goes over the mappings, and within a mapping over runs of page-table words. The first page
that lacks what is asked of it stops the walk: the rest of its chunk (its page table, or the hole it
lies in) is faulted, and the walk goes on from there. All words before that page hold answers then,
all from it on still hold requests.

Source: mm/hmm.c, mm/pagewalk.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hmmlab.model.alike import all_of, any_of, how_many
from hmmlab.model.entry import (
    HMM_PFN_ERROR,
    HMM_PFN_ORDER_SHIFT,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    PRESENT,
    RW,
    SWP_DEVICE_WRITE,
    Bools,
    Pfns,
    Words,
    is_device_private,
    is_migration,
    is_present,
    is_swap_type,
    marks_and_pfns,
    swap_type,
)
from hmmlab.model.geometry import LEVEL_PAGES, LEVEL_SHIFT, PMD_PAGES, align_down
from hmmlab.model.huge_memory import hugepage_vma_check
from hmmlab.model.machine import BLOCK, BULK, KernelError, Machine, Routine, kernel
from hmmlab.model.memory import commuting_faults, handle_mm_fault
from hmmlab.model.memremap import of_pagemap
from hmmlab.model.mm_types import (
    VM_HUGETLB,
    VM_IO,
    VM_PFNMAP,
    VM_READ,
    VM_SPECIAL,
    VM_WRITE,
    Vma,
    find_vma,
    mm_root,
    vma_at,
)
from hmmlab.model.mmu_notifier import mmu_interval_check_retry, series_commute
from hmmlab.model.page_alloc import free_ram
from hmmlab.model.page_table import Run, look_at_range, table_of, walk

__all__ = ["HmmRange", "commuting_batches", "hmm_range_fault"]

PMD_ORDER = LEVEL_SHIFT["pmd"]

#: From the bit RW of a word to the bit HMM_PFN_WRITE of an hmm_pfn.
_WRITE_SHIFT = (HMM_PFN_WRITE // RW).bit_length() - 1

_EBUSY, _EFAULT, _EINVAL, _EPERM = 16, 14, 22, 1


@dataclass
class HmmRange:
    """A request and its answer (``struct hmm_range``).

    Attributes
    ----------
    mm
        Address space to look at.
    notifier
        Number of the interval subscription that covers the range.
    notifier_seq
        What ``mmu_interval_read_begin`` returned.
    start, end
        Pages ``start`` to ``end - 1``.
    hmm_pfns
        uint64 of shape (end - start,): HMM_PFN_REQ_* for each page when called, HMM_PFN_* and
        frame numbers afterwards. Request and answer share the bits.
    default_flags, pfn_flags_mask
        A page's request is ``(hmm_pfns & pfn_flags_mask) | default_flags``.
    dev_private_owner
        Device whose private pages are reported and not faulted back; 0 for none.
    batch
        Pages of one request, where this stands for several of them, one after another, that
        :func:`commuting_batches` has found to commute; 0 where it is one.
    """

    mm: int
    notifier: int
    notifier_seq: int
    start: int
    end: int
    hmm_pfns: Words
    default_flags: int = 0
    pfn_flags_mask: int = 0
    dev_private_owner: int = 0
    batch: int = 0

    def request(self, start: int, end: int) -> Words:
        """What is asked of pages ``start`` to ``end - 1``; read only."""
        if not self.pfn_flags_mask:
            return np.broadcast_to(np.uint64(self.default_flags), end - start)
        asked = self.hmm_pfns[start - self.start : end - self.start]
        return (asked & np.uint64(self.pfn_flags_mask)) | np.uint64(self.default_flags)

    @property
    def asks(self) -> bool:
        """Whether any page may be asked for at all; a snapshot asks for none."""
        return bool((self.default_flags | self.pfn_flags_mask) & HMM_PFN_REQ_FAULT)

    def fill(self, start: int, end: int, value: int | Words) -> None:
        """Answer for pages ``start`` to ``end - 1``."""
        self.hmm_pfns[start - self.start : end - self.start] = value


class _WalkAgainError(Exception):
    """Something was faulted or waited for: walk again from ``last``."""

    def __init__(self, last: int) -> None:
        self.last = last


@kernel("mm/hmm.c")
def hmm_range_fault(machine: Machine, range: HmmRange) -> Routine[None]:
    """Answer a request; the caller holds the mmap_lock.

    Raises
    ------
    KernelError
        EBUSY when the range was invalidated since ``read_begin``: begin again. EFAULT where a page
        is asked for that cannot be had: no mapping, no read permission, a failing fault. EPERM
        where a write is asked for and the mapping forbids it. EINVAL for an empty range.
    """
    if range.start >= range.end:
        raise KernelError(_EINVAL, f"range of pages {range.start:#x} to {range.end:#x}")
    last = range.start
    if range.batch:
        yield from _fault_batches(machine, range)
    while True:
        if mmu_interval_check_retry(machine, range.notifier, range.notifier_seq):
            raise KernelError(_EBUSY, "the range was invalidated meanwhile")
        try:
            yield from walk_page_range(machine, range, last)
            return
        except _WalkAgainError as again:
            last = again.last


# --- several requests at once ---------------------------------------------------------------------


def commuting_batches(
    machine: Machine, mm: int, start: int, stop: int, batch: int, *, write: bool, owner: int
) -> int:
    """End of the batches from ``start`` on, at least one, that may be asked for as one request.

    They are in one private mapping, and each of their pages has what is asked or gets it from a
    fault that concerns nobody but the page. One batch is all there is at any grain but bulk.
    """
    last = min(start + batch, stop)
    if machine.grain < BULK or last == stop:
        return last
    vma = find_vma(machine, mm, start)
    needed = VM_READ | (VM_WRITE if write else 0)
    if vma is None or vma.start > start or (vma.flags & needed) != needed:
        return last
    if not vma.is_anonymous or vma.flags & (VM_SPECIAL | VM_HUGETLB) or hugepage_vma_check(vma):
        return last
    end = min(stop, vma.end, start + max(BLOCK // batch, 1) * batch)
    end = min([end, *(r.start for r in walk(machine, mm_root(machine, mm), start, end) if r.huge)])
    marks, pfns = marks_and_pfns(look_at_range(machine, mm_root(machine, mm), start, end))
    present = (marks & np.uint64(PRESENT)) != 0
    odd = ~present & (marks != 0)
    if any_of(odd):
        mine = is_device_private(marks) & (of_pagemap(machine, "owner", pfns) == owner)
        if write:
            mine &= swap_type(marks) == SWP_DEVICE_WRITE
        odd = odd & ~mine
        if any_of(odd):
            end = start + int(np.argmax(odd))
    if write:
        shielded = present & ((marks & np.uint64(RW)) == 0)
        if any_of(shielded) and not series_commute(machine, mm, start, end):
            return last
        if how_many(shielded, pfns.size) + how_many(marks == 0, pfns.size) > free_ram(machine):
            return last
    return max(last, end if end == stop else end - (end - start) % batch)


def _fault_batches(machine: Machine, range: HmmRange) -> Routine[None]:
    """Fault what several requests lack: in each page table of each, from the first such page on."""
    words = look_at_range(machine, mm_root(machine, range.mm), range.start, range.end)
    cpu_flags, final = _cpu_flags(machine, range, *marks_and_pfns(words))
    lacking = _lacking(range.request(range.start, range.end), cpu_flags) & ~final
    if not any_of(lacking):
        return
    at = np.arange(words.size)
    chunk = at - np.minimum(at % range.batch, (range.start + at) % PMD_PAGES)
    vpns = range.start + at[np.maximum.accumulate(np.where(lacking, at, -1)) >= chunk]
    write = bool(range.default_flags & HMM_PFN_REQ_WRITE)
    vma = find_vma(machine, range.mm, range.start)
    assert vma is not None
    with machine.bulk(vpns.size):
        try:
            yield from handle_mm_fault(machine, vma, vpns, write, remote=True)
        except KernelError as error:
            raise KernelError(_EFAULT, str(error)) from error


# --- the walk -------------------------------------------------------------------------------------


@kernel("mm/pagewalk.c")
def walk_page_range(machine: Machine, range: HmmRange, start: int) -> Routine[None]:
    """Walk from page ``start`` to the end of the range, mapping by mapping."""
    at = start
    while at < range.end:
        vma = find_vma(machine, range.mm, at)
        if vma is None or vma.start > at:
            end = min(range.end, vma.start) if vma else range.end
            machine.called("hmm_vma_walk_hole")
            if _needs_any(range, at, end):
                place = machine.names.place(range.mm, at, end)
                raise KernelError(_EFAULT, f"{place}: asked for, and not mapped")
            range.fill(at, end, HMM_PFN_ERROR)
        else:
            end = min(range.end, vma.end)
            machine.called("hmm_vma_walk_test")
            if vma.flags & (VM_IO | VM_PFNMAP) or not vma.flags & VM_READ:
                if _needs_any(range, at, end):
                    place = machine.names.place(range.mm, at, end)
                    raise KernelError(_EFAULT, f"{place}: asked for, and {vma.permissions}")
                range.fill(at, end, HMM_PFN_ERROR)
            elif vma.flags & VM_HUGETLB:
                yield from walk_hugetlb_range(machine, range, vma, at, end)
            else:
                for run in walk(machine, mm_root(machine, range.mm), at, end):
                    if run.row < 0:
                        yield from _walk_hole(machine, range, vma, run)
                    elif run.huge:
                        yield from _walk_huge(machine, range, vma, run)
                    else:
                        yield from hmm_vma_walk_pmd(machine, range, vma, run)
        yield machine.step("It has looked at {range}.", range.mm, at, end)
        at = end


def _needs_any(range: HmmRange, start: int, end: int) -> bool:
    """Whether any page of an absent stretch is asked for."""
    return range.asks and bool((range.request(start, end) & HMM_PFN_REQ_FAULT).any())


def _walk_hole(machine: Machine, range: HmmRange, vma: Vma, run: Run) -> Routine[None]:
    """Pages with no page table: nothing is there, entry by entry of the level that is empty."""
    pages = LEVEL_PAGES[run.level]
    asked = range.request(run.start, run.stop) if range.asks else np.zeros(0, np.uint64)
    wanted = np.flatnonzero(asked & np.uint64(HMM_PFN_REQ_FAULT))
    stop = (
        max(run.start, align_down(run.start + int(wanted[0]), pages)) if wanted.size else run.stop
    )
    if stop > run.start:
        machine.called("hmm_vma_walk_hole", -(-stop // pages) - run.start // pages)
        range.fill(run.start, stop, 0)
    if wanted.size:
        end = min(run.stop, align_down(stop, pages) + pages)
        yield from hmm_vma_walk_hole(machine, range, vma, stop, end)


@kernel("mm/hmm.c")
def hmm_vma_walk_hole(
    machine: Machine, range: HmmRange, vma: Vma, start: int, end: int
) -> Routine[None]:
    """A hole in which a page is asked for: the whole of it is faulted, for writing if any is."""
    both = np.uint64(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
    write = bool(((range.request(start, end) & both) == both).any())
    yield from hmm_vma_fault(machine, vma, start, end, write)


@kernel("mm/hmm.c")
def hmm_vma_walk_pmd(machine: Machine, range: HmmRange, vma: Vma, run: Run) -> Routine[None]:
    """Pages with page tables: answer up to the first that lacks something, and fault from there."""
    words = machine["pte"][run.row : run.row + run.stop - run.start]
    if not range.asks:
        for at in np.arange(0, words.size, BLOCK).tolist():  # over blocks
            answers, _, _ = _answers(machine, range, words[at : at + BLOCK])
            range.fill(run.start + at, run.start + at + answers.size, answers)
        tables = (run.stop - 1) // PMD_PAGES - run.start // PMD_PAGES
        machine.called("hmm_vma_walk_pmd", tables, up=1)
        return
    answers, cpu_flags, final = _answers(machine, range, words)
    asked = range.request(run.start, run.stop)
    lacking = _lacking(asked, cpu_flags) & ~final
    stop = int(np.argmax(lacking)) if any_of(lacking) else words.size
    range.fill(run.start, run.start + stop, answers[:stop])
    at = run.start + stop
    tables = (min(at, run.stop - 1) // PMD_PAGES) - run.start // PMD_PAGES
    # The tables before the one that stopped the walk were calls of their own.
    machine.called("hmm_vma_walk_pmd", tables, up=1)
    if stop == words.size:
        return
    word = words[stop : stop + 1]
    if is_swap_type(word)[0] and is_migration(word)[0]:
        yield machine.step(
            "It waits until the migration of {range} ends.",
            range.mm,
            at,
            at + 1,
            lock="migration_entry_wait",
        )
        raise _WalkAgainError(at)
    writable = cpu_flags[stop if cpu_flags.size > 1 else 0] & HMM_PFN_WRITE
    write = bool(asked[stop] & HMM_PFN_REQ_WRITE) and not writable
    end = min(run.stop, align_down(at, PMD_PAGES) + PMD_PAGES)
    yield from hmm_vma_fault(machine, vma, at, end, write)


def _walk_huge(machine: Machine, range: HmmRange, vma: Vma, run: Run) -> Routine[None]:
    """Pages that PMD words map: each word answers for all of them, or all of them are faulted.

    Source: mm/hmm.c (``hmm_vma_handle_pmd``).
    """
    at = run.start
    while at < run.stop:  # over PMD words
        end = min(run.stop, align_down(at, PMD_PAGES) + PMD_PAGES)
        words = machine["pte"][run.row + at - run.start : run.row + end - run.start]
        answers, cpu_flags, _ = _answers(machine, range, words)
        asked = range.request(at, end)
        lacking = _lacking(asked, cpu_flags)
        with machine.within("hmm_vma_walk_pmd"):
            if range.asks and any_of(lacking):
                no_write = (cpu_flags & HMM_PFN_WRITE) == 0
                write = bool((lacking & ((asked & HMM_PFN_REQ_WRITE) != 0) & no_write).any())
                yield from hmm_vma_fault(machine, vma, at, end, write)
        order = np.uint64(PMD_ORDER << HMM_PFN_ORDER_SHIFT)
        valid = (cpu_flags & HMM_PFN_VALID) != 0
        range.fill(at, end, np.where(valid, answers | order, answers))
        at = end


def walk_hugetlb_range(
    machine: Machine, range: HmmRange, vma: Vma, start: int, stop: int
) -> Routine[None]:
    """Huge pages of hugetlb, one by one; the first page of each speaks for all.

    Source: mm/pagewalk.c, mm/hmm.c (``hmm_vma_walk_hugetlb_entry``).
    """
    root = mm_root(machine, range.mm)
    at = start
    while at < stop:  # over huge pages
        end = min(stop, align_down(at, PMD_PAGES) + PMD_PAGES)
        if not table_of(machine, root, at, "pmd"):
            if _needs_any(range, at, end):
                yield from hmm_vma_walk_hole(machine, range, vma, at, end)
            machine.called("hmm_vma_walk_hole")
            range.fill(at, end, 0)
        else:
            answers, cpu_flags, _ = _answers(machine, range, look_at_range(machine, root, at, end))
            asked = range.request(at, at + 1)
            if range.asks and _lacking(asked, cpu_flags[:1])[0]:
                no_write = not cpu_flags[0] & HMM_PFN_WRITE
                write = bool(asked[0] & HMM_PFN_REQ_WRITE) and no_write
                yield from hmm_vma_fault(machine, vma, at, end, write)
            range.fill(at, end, answers | np.uint64(PMD_ORDER << HMM_PFN_ORDER_SHIFT))
        at = end


def _lacking(asked: Words, cpu_flags: Words) -> Bools:
    """Which pages lack what is asked of them (``hmm_pte_need_fault``)."""
    if not asked.strides[0]:  # one word stands for all
        asked = asked[:1]
    writes = (asked & HMM_PFN_REQ_WRITE) != 0
    lacking: Bools = (cpu_flags & HMM_PFN_VALID) == 0
    if any_of(writes):
        lacking = lacking | (writes & ((cpu_flags & HMM_PFN_WRITE) == 0))
    return lacking & ((asked & HMM_PFN_REQ_FAULT) != 0)


def _cpu_flags(machine: Machine, range: HmmRange, marks: Words, pfns: Pfns) -> tuple[Words, Bools]:
    """The flags of words with such marks and frames, and which are final whatever is asked.

    Both may be one for all. A device-private page of the caller's own device is final: it is never
    faulted, not even for a write that its entry does not allow.
    """
    final = np.array([False])
    flags = (marks & np.uint64(RW)) << np.uint64(_WRITE_SHIFT)
    flags |= np.uint64(HMM_PFN_VALID)
    here = (marks & np.uint64(PRESENT)) != 0
    if all_of(here):
        return flags, final
    flags = np.where(here, flags, np.uint64(0))
    private = ~is_present(marks) & is_device_private(marks)
    if any_of(private):
        owners = of_pagemap(machine, "owner", pfns)
        final = private & (owners == range.dev_private_owner) & (owners != 0)
        writable = swap_type(marks) == SWP_DEVICE_WRITE
        own = np.where(writable, np.uint64(HMM_PFN_WRITE), np.uint64(0)) | np.uint64(HMM_PFN_VALID)
        flags = np.where(final, own, flags)
    return flags, final


def _answers(machine: Machine, range: HmmRange, words: Words) -> tuple[Words, Words, Bools]:
    """The hmm_pfns of some words, and as :func:`_cpu_flags`."""
    marks, pfns = marks_and_pfns(words)
    flags, final = _cpu_flags(machine, range, marks, pfns)
    answers = pfns.view(np.uint64)
    named = is_present(marks) | final
    if not all_of(named):
        answers = np.where(named, answers, np.uint64(0))
    answers |= flags
    return answers, flags, final


@kernel("mm/hmm.c")
def hmm_vma_fault(machine: Machine, vma: Vma, start: int, end: int, write: bool) -> Routine[None]:
    """Fault every page of a chunk, the ones that are there already too.

    Raises
    ------
    KernelError
        EPERM when writing is forbidden; EFAULT when a fault fails.
    """
    if write and not vma.flags & VM_WRITE:
        place = machine.names.place(vma.mm, start, start + 1)
        raise KernelError(_EPERM, f"{place}: the mapping is {vma.permissions}")
    for first, last in machine.chunks(start, end):
        with machine.bulk(last - first):
            for low, high in commuting_faults(machine, vma, first, last, write):
                try:
                    yield from handle_mm_fault(
                        machine, vma_at(machine, vma.row), np.arange(low, high), write, remote=True
                    )
                except KernelError as error:
                    raise KernelError(_EFAULT, str(error)) from error
    raise _WalkAgainError(start)
