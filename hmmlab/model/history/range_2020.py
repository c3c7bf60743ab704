"""hmm_range_fault under an interval subscription: 5.5 to 5.7.

5.5 takes the mirrors away. A driver subscribes to an interval of the address space itself, reads a
sequence number, looks, takes the lock of its own page table, and asks whether the number is still
the same: a change that began and ended meanwhile has left its mark. The driver's own encoding stays
as it was until 5.7.

Since 5.5 one walk goes over all mappings ("mm/hmm: make full use of walk_page_range()"), and what
stands in the pfns after an error has changed:

=================  ============================  =====================================
                   5.5, 5.6                      5.7
=================  ============================  =====================================
no mapping         NONE; -EFAULT if asked for    ERROR; -EFAULT if asked for
device mapping     -EFAULT                       ERROR; -EFAULT if asked for
not readable       NONE; -EFAULT if asked for    ERROR; -EFAULT if asked for
a fault fails      -EFAULT, that page is ERROR   -EFAULT, and its pfn as it was
write forbidden    -EPERM                        -EPERM
after an error     the rest as it was            that page and the rest as they were
=================  ============================  =====================================

Lookups return how many pages they have answered, or a negative errno. As in 5.2, pages without a
page table at the end of a range are not counted; nobody looked at the number, and since 5.8 it is
0. Functions take page numbers.

Source: mm/hmm.c of 5.5 and 5.7.
"""

from __future__ import annotations

from hmmlab.model.history.era import EBUSY, EFAULT, Era
from hmmlab.model.history.range_2019 import (
    DEVICE_VMA,
    HMM_FAULT_ALLOW_RETRY,
    HMM_FAULT_SNAPSHOT,
)
from hmmlab.model.history.walk_2018 import HmmPfnValue, HmmRange, WalkHow, walk_gap, walk_vma
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_READ, find_vma
from hmmlab.model.mmu_notifier import mmu_interval_check_retry

__all__ = ["hmm_range_fault_5_5", "hmm_range_fault_5_7"]


@kernel("mm/hmm.c, 5.5", "hmm_range_fault")
def hmm_range_fault_5_5(machine: Machine, range: HmmRange, mm: int, flags: int = 0) -> Routine[int]:
    """Look at a range and fault in what is asked for, as 5.5 and 5.6 do, with the flags of 5.4.

    The caller holds the mmap_lock.

    Returns
    -------
    How many pages were answered; -EBUSY where the range was invalidated since ``read_begin``;
    -EAGAIN where a fault gave the mmap_lock up, which only HMM_FAULT_ALLOW_RETRY allows; -EFAULT
    and -EPERM as the table above says.
    """
    how = WalkHow(Era.V5_5, not flags & HMM_FAULT_SNAPSHOT, bool(flags & HMM_FAULT_ALLOW_RETRY))
    return (yield from _walk_until_done(machine, range, mm, how))


@kernel("mm/hmm.c, 5.7", "hmm_range_fault")
def hmm_range_fault_5_7(machine: Machine, range: HmmRange, mm: int) -> Routine[int]:
    """Look at a range under an interval subscription, as 5.7 does: no flags, still a count.

    The request alone decides: with ``default_flags`` and ``pfn_flags_mask`` 0 it is a snapshot.
    The caller holds the mmap_lock, and nothing gives it up.

    Returns
    -------
    How many pages were answered; -EBUSY where the range was invalidated since ``read_begin``;
    -EFAULT and -EPERM as the table above says.
    """
    return (yield from _walk_until_done(machine, range, mm, WalkHow(Era.V5_7, fault=True)))


def _walk_until_done(machine: Machine, range: HmmRange, mm: int, how: WalkHow) -> Routine[int]:
    """Walk, and walk on from where something was faulted, as long as the range is not changed."""
    answer, last = -EBUSY, range.start
    while answer == -EBUSY:
        if _changed(machine, range):
            return -EBUSY
        answer, last = yield from _walk(machine, range, mm, last, how)
    return answer or last - range.start


def _walk(
    machine: Machine, range: HmmRange, mm: int, start: int, how: WalkHow
) -> Routine[tuple[int, int]]:
    """Walk from page ``start`` on; returns the answer and ``hmm_vma_walk->last``."""
    at = last = start
    while at < range.end:  # over mappings and gaps
        vma = find_vma(machine, mm, at)
        if vma is None or vma.start > at:
            end = range.end if vma is None else min(range.end, vma.start)
            answer, hole = walk_gap(range, at, end, how)
            if how.era < Era.V5_7:
                last = hole
                if answer:
                    range.pfns[range.part(at, at + 1)] = range.value(HmmPfnValue.HMM_PFN_ERROR)
        elif vma.flags & DEVICE_VMA or not vma.flags & VM_READ:  # hmm_vma_walk_test
            last = end = min(range.end, vma.end)
            answer, _ = walk_gap(range, at, end, how)
            if vma.flags & DEVICE_VMA and how.era < Era.V5_7:
                answer = -EFAULT
        else:
            end = min(range.end, vma.end)
            answer, last = yield from walk_vma(machine, range, vma, at, end, how)
        if answer:
            return answer, last
        at = end
    return 0, last


def _changed(machine: Machine, range: HmmRange) -> bool:
    return mmu_interval_check_retry(machine, range.notifier, range.notifier_seq)
