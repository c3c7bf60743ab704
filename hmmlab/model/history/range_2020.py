"""hmm_range_fault under an interval subscription: 5.5 to 5.7.

5.5 takes the mirrors away. A driver subscribes to an interval of the address space itself, reads a
sequence number, looks, takes the lock of its own page table, and asks whether the number is still
the same: a change that began and ended meanwhile has left its mark. What is looked at, and the
driver's own encoding, stay as they were until 5.7.

Lookups return how many pages they have answered, or a negative errno; since 5.8 it is 0, and since
then only a lookup that returns -EBUSY has to say how far it came. Functions take page numbers.

Source: mm/hmm.c of 5.5 and 5.7.
"""

from __future__ import annotations

from hmmlab.model.history.era import EBUSY, EFAULT, EPERM, Era
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
    where there is no mapping, or one of device memory, or a fault fails; -EPERM where a page cannot
    be read, and then all pfns are NONE, or a write is forbidden. After an error the pfns from the
    failing page on are NONE.
    """
    none = range.value(HmmPfnValue.HMM_PFN_NONE)
    how = WalkHow(Era.V5_5, not flags & HMM_FAULT_SNAPSHOT, bool(flags & HMM_FAULT_ALLOW_RETRY))
    at = range.start
    while at < range.end:
        if _changed(machine, range):
            return -EBUSY
        vma = find_vma(machine, mm, at)
        if vma is None or vma.flags & DEVICE_VMA:
            return -EFAULT
        if not vma.flags & VM_READ:
            range.pfns[:] = none
            return -EPERM
        end = min(range.end, vma.end)
        if vma.start > at:
            end = min(range.end, vma.start)
            answer = walk_gap(range, at, end, how)
            at = at if answer else end
        else:
            answer, at = yield from walk_vma(machine, range, vma, at, end, how)
        while answer == -EBUSY and not _changed(machine, range):
            answer, at = yield from walk_vma(machine, range, vma, at, end, how)
        if answer:
            range.pfns[range.part(at, range.end)] = none
            return answer
    return at - range.start


@kernel("mm/hmm.c, 5.7", "hmm_range_fault")
def hmm_range_fault_5_7(machine: Machine, range: HmmRange, mm: int) -> Routine[int]:
    """Look at a range under an interval subscription, as 5.7 does: no flags, still a count.

    The request alone decides: with ``default_flags`` and ``pfn_flags_mask`` 0 it is a snapshot.
    The caller holds the mmap_lock, and nothing gives it up.

    Returns
    -------
    How many pages were answered; -EBUSY where the range was invalidated since ``read_begin``;
    -EFAULT where a page is asked for that cannot be had; -EPERM where a write is forbidden. After
    an error the pfns from the failing page on are as they were.
    """
    walk = WalkHow(Era.V5_7, fault=True)
    at = range.start
    while at < range.end:
        if _changed(machine, range):
            return -EBUSY
        vma = find_vma(machine, mm, at)
        if vma is None or vma.start > at or vma.flags & DEVICE_VMA or not vma.flags & VM_READ:
            end = range.end if vma is None else vma.start if vma.start > at else vma.end
            end = min(end, range.end)
            if refused := walk_gap(range, at, end, walk):
                return refused
            at = end
            continue
        answer, at = yield from walk_vma(machine, range, vma, at, min(range.end, vma.end), walk)
        if answer not in (0, -EBUSY):
            return answer
    return at - range.start


def _changed(machine: Machine, range: HmmRange) -> bool:
    return mmu_interval_check_retry(machine, range.notifier, range.notifier_seq)
