"""hmm_vma_get_pfns, hmm_vma_fault and hmm_vma_range_done, as 4.17 to 5.1 have them.

The range carries its arguments now, and the driver's encoding: READ is gone, for what is valid can
be read; EMPTY is gone, for it is the value NONE. Each page says itself what is asked of it.

Source: mm/hmm.c of 4.17.
"""

from __future__ import annotations

from hmmlab.model.history.era import EAGAIN, EBUSY, EINVAL, ENOMEM, EPERM, Era
from hmmlab.model.history.lookup_2017 import mirrored_hmm
from hmmlab.model.history.ranges import range_done, track
from hmmlab.model.history.walk_2018 import HmmPfnValue, HmmRange, WalkHow, walk_vma
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_HUGETLB, VM_READ, VM_SPECIAL, Vma

__all__ = ["hmm_vma_fault", "hmm_vma_get_pfns", "hmm_vma_range_done"]


@kernel("mm/hmm.c, 4.17")
def hmm_vma_get_pfns(machine: Machine, range: HmmRange, era: Era = Era.V4_17) -> Routine[int]:
    """Look a range up without faulting, and track it.

    Returns
    -------
    0, and then :func:`hmm_vma_range_done` must follow; -EINVAL where the range is not inside the
    mapping, no mirror is registered, or the mapping is hugetlb or special (all pfns are SPECIAL
    then); -ENOMEM when there is no struct hmm (they stay as they are); -EPERM where the mapping
    cannot be read (all are NONE then).
    """
    vma = _vma_of(range)
    refused = yield from _begin(machine, vma, range, era)
    if not refused:
        how = WalkHow(era, fault=False)
        yield from walk_vma(machine, range, vma, range.start, range.end, how)
    return refused


@kernel("mm/hmm.c, 4.17")
def hmm_vma_fault(
    machine: Machine, range: HmmRange, block: bool, era: Era = Era.V4_17
) -> Routine[int]:
    """Look a range up and fault in what its pages ask for. ``block`` does nothing, as in 4.14.

    Returns
    -------
    As :func:`hmm_vma_get_pfns`, but after -ENOMEM all pfns are NONE; also -EFAULT where a fault
    fails and -EBUSY where one gave the mmap_lock up. After these two the pfns from the failing page
    on are NONE, and the range is no longer tracked.

    Notes
    -----
    The comment above the kernel's function promises -EAGAIN for a lock that was given up. That is
    what the walk calls "something was faulted, go on", and no caller ever sees it.
    """
    vma = _vma_of(range)
    refused = yield from _begin(machine, vma, range, era)
    if refused:
        if refused == -ENOMEM:
            range.pfns[:] = range.value(HmmPfnValue.HMM_PFN_NONE)
        return refused
    how = WalkHow(era, fault=True, may_retry=True)
    answer, last = -EBUSY, range.start
    while answer == -EBUSY:
        answer, last = yield from walk_vma(machine, range, vma, last, range.end, how)
    if answer:
        range.pfns[range.part(last, range.end)] = range.value(HmmPfnValue.HMM_PFN_NONE)
        hmm_vma_range_done(machine, range)
    return -EBUSY if answer == -EAGAIN else answer


def hmm_vma_range_done(machine: Machine, range: HmmRange) -> bool:
    """End the tracking. Returns whether nothing of the range has changed since it was looked up.

    Raises
    ------
    ValueError
        For an empty range, where the kernel stops with BUG().
    """
    return range_done(machine, range)


def _vma_of(range: HmmRange) -> Vma:
    if range.vma is None:
        raise ValueError("range.vma is not set: until 5.1 a range says in which mapping it lies")
    return range.vma


def _begin(machine: Machine, vma: Vma, range: HmmRange, era: Era) -> Routine[int]:
    """Check the arguments and track the range."""
    hmm = yield from mirrored_hmm(machine, vma, range.start, range.end, era)
    if hmm < 0:
        return hmm
    if vma.flags & (VM_SPECIAL | VM_HUGETLB):
        range.pfns[:] = range.value(HmmPfnValue.HMM_PFN_SPECIAL)
        return -EINVAL
    if not vma.flags & VM_READ:
        range.pfns[:] = range.value(HmmPfnValue.HMM_PFN_NONE)
        return -EPERM
    track(machine, hmm, range, valid=True)
    return 0
