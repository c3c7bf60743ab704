"""hmm_vma_get_pfns, hmm_vma_fault and hmm_vma_range_done, as 4.17 to 5.1 have them.

The range carries its arguments now, and the driver's encoding: READ is gone, for what is valid can
be read; EMPTY is gone, for it is the value NONE. Each page says itself what is asked of it.

Source: mm/hmm.c of 4.17.
"""

from __future__ import annotations

from hmmlab.model.history.era import EBUSY, EINVAL, ENOMEM, EPERM, Era
from hmmlab.model.history.mirror_2017 import hmm_register
from hmmlab.model.history.ranges import track, untrack
from hmmlab.model.history.struct_hmm import mirrors_of
from hmmlab.model.history.walk_2018 import HmmPfnValue, HmmRange, WalkHow, walk_vma
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_HUGETLB, VM_READ, VM_SPECIAL, Vma

__all__ = ["hmm_vma_fault", "hmm_vma_get_pfns", "hmm_vma_range_done"]


@kernel("mm/hmm.c, 4.17")
def hmm_vma_get_pfns(
    machine: Machine, vma: Vma, range: HmmRange, era: Era = Era.V4_17
) -> Routine[int]:
    """Look a range up without faulting, and track it.

    Returns
    -------
    0, and then :func:`hmm_vma_range_done` must follow; -EINVAL where the range is not inside the
    mapping, no mirror is registered, or the mapping is hugetlb or special (all pfns are SPECIAL
    then); -ENOMEM when there is no struct hmm; -EPERM where the mapping cannot be read (all are
    NONE then).
    """
    refused = yield from _begin(machine, vma, range, era)
    if not refused:
        how = WalkHow(era, fault=False)
        yield from walk_vma(machine, range, vma, range.start, range.end, how)
    return refused


@kernel("mm/hmm.c, 4.17")
def hmm_vma_fault(
    machine: Machine, vma: Vma, range: HmmRange, block: bool, era: Era = Era.V4_17
) -> Routine[int]:
    """Look a range up and fault in what its pages ask for. ``block`` does nothing, as in 4.14.

    Returns
    -------
    As :func:`hmm_vma_get_pfns`; also -EFAULT where a fault fails and -EAGAIN where one gave the
    mmap_lock up. After these two the pfns from the failing page on are NONE, and the range is no
    longer tracked.
    """
    refused = yield from _begin(machine, vma, range, era)
    if refused:
        return refused
    how = WalkHow(era, fault=True, may_retry=True)
    answer, last = -EBUSY, range.start
    while answer == -EBUSY:
        answer, last = yield from walk_vma(machine, range, vma, last, range.end, how)
    if answer:
        range.pfns[range.part(last, range.end)] = range.value(HmmPfnValue.HMM_PFN_NONE)
        hmm_vma_range_done(machine, range)
    return answer


def hmm_vma_range_done(machine: Machine, range: HmmRange) -> bool:
    """End the tracking. Returns whether nothing of the range has changed since it was looked up."""
    return untrack(machine, range)


def _begin(machine: Machine, vma: Vma, range: HmmRange, era: Era) -> Routine[int]:
    """Check the arguments and track the range."""
    if not (vma.start <= range.start < vma.end and vma.start <= range.end <= vma.end):
        return -EINVAL
    hmm = yield from hmm_register(machine, vma.mm, era)
    if not hmm:
        range.pfns[:] = range.value(HmmPfnValue.HMM_PFN_NONE)
        return -ENOMEM
    if not mirrors_of(machine, hmm):
        return -EINVAL
    if vma.flags & (VM_SPECIAL | VM_HUGETLB):
        range.pfns[:] = range.value(HmmPfnValue.HMM_PFN_SPECIAL)
        return -EINVAL
    if not vma.flags & VM_READ:
        range.pfns[:] = range.value(HmmPfnValue.HMM_PFN_NONE)
        return -EPERM
    track(machine, hmm, range, valid=True)
    return 0
