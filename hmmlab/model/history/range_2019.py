"""hmm_range_register, _snapshot, _fault, _wait_until_valid, _unregister: 5.2 to 5.4.

A range is registered once and looked at as often as one likes. It is not valid while a change that
touches it runs; a driver waits until it is, looks, takes the lock of its own page table, and uses
the answer if the range is still valid. It cannot tell "still" from "again": a change that began
and ended in between leaves no mark (the hole that 5.5's sequence numbers close).

How a lookup says that the range is not valid, and whether the mmap_lock is held then:

====================  ======================  =============================  ==================
                      5.2                     5.3                            5.4
====================  ======================  =============================  ==================
fault, at its start   -EAGAIN, lock given up  -EBUSY, held                   -EBUSY, held
fault, after a walk   -EBUSY, held            -EBUSY, held                   -EBUSY, held
snapshot              -EAGAIN, held           -EBUSY, held                   a flag of the fault
a fault must wait     -EAGAIN, lock given up  the same, unless it may block  the same, if allowed
====================  ======================  =============================  ==================

Lookups return how many pages they have answered, or a negative errno. It is not a number to rely
on: a range that ends in pages without a page table counts less
(:func:`~hmmlab.model.history.walk_2018.walk_vma`). Functions take page numbers.

Since 5.3 a registered range keeps the address space alive (``mmget``), so that there is no range
to look at when it ends. Here nothing is kept alive: unregister before the process ends.

Left out is a ``page_shift`` above that of a page: it made one entry of ``pfns`` of each huge page,
and no driver asked for it.

Source: mm/hmm.c of 5.2, 5.3, 5.4.
"""

from __future__ import annotations

from hmmlab.model.geometry import PAGE_SHIFT
from hmmlab.model.history.era import EAGAIN, EBUSY, EFAULT, EINVAL, EPERM, Era
from hmmlab.model.history.mirror_2017 import hmm_register
from hmmlab.model.history.ranges import is_valid, track, untrack
from hmmlab.model.history.struct_hmm import HmmMirror, hmm_put
from hmmlab.model.history.walk_2018 import (
    HmmPfnValue,
    HmmRange,
    WalkHow,
    walk_gap,
    walk_vma,
)
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_IO,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_READ,
    Vma,
    find_vma,
    mm_is_alive,
    mm_lock,
)

__all__ = [
    "DEVICE_VMA",
    "HMM_FAULT_ALLOW_RETRY",
    "HMM_FAULT_SNAPSHOT",
    "HMM_RANGE_DEFAULT_TIMEOUT",
    "hmm_range_fault",
    "hmm_range_register",
    "hmm_range_snapshot",
    "hmm_range_unregister",
    "hmm_range_valid",
    "hmm_range_wait_until_valid",
    "hmm_vma_fault",
    "hmm_vma_range_done",
]

#: Flags of :func:`hmm_range_fault` in 5.4.
HMM_FAULT_ALLOW_RETRY = 1 << 0
HMM_FAULT_SNAPSHOT = 1 << 1

#: How long most drivers wait for a range, in milliseconds.
HMM_RANGE_DEFAULT_TIMEOUT = 1000

_NONE = HmmPfnValue.HMM_PFN_NONE


@kernel("mm/hmm.c, 5.2")
def hmm_range_register(
    machine: Machine,
    range: HmmRange,
    of: int | HmmMirror,
    start: int | None = None,
    end: int | None = None,
    page_shift: int = PAGE_SHIFT,
) -> Routine[int]:
    """Track pages ``start`` to ``end - 1``; not valid at first where a change runs.

    Parameters
    ----------
    of
        The address space in 5.2, which makes a struct hmm when there is none; the mirror in 5.3
        and 5.4.
    start, end, page_shift
        Until 5.3. In 5.4 the range says itself where it is, and there is no ``page_shift``.

    Returns
    -------
    0; -EINVAL where the range is empty, or its edges are not multiples of ``2**page_shift`` bytes;
    -EFAULT where the address space is dying, or since 5.3 has no user, or where no struct hmm can
    be had.

    Raises
    ------
    ValueError
        For arguments of another kernel than the mirror's, or a mirror that is not registered.
    """
    if isinstance(of, HmmMirror):
        era = Era(int(machine["hmm.era"][of.hmm])) if of.hmm else None
        if era not in (Era.V5_3, Era.V5_4):
            what = era.label if era else "one that is registered with nothing"
            raise ValueError(f"the mirror is {what}; only 5.3 and 5.4 take one")
        if (start is None) != (era is Era.V5_4) or (end is None) != (era is Era.V5_4):
            raise ValueError("5.3 takes start and end; since 5.4 they stand in the range")
    start, end = range.start if start is None else start, range.end if end is None else end
    pages = 1 << max(page_shift - PAGE_SHIFT, 0)
    if start % pages or end % pages or start >= end:
        return -EINVAL
    if isinstance(of, HmmMirror):
        hmm = of.hmm
    else:
        hmm = yield from hmm_register(machine, of, Era.V5_2)
    if not hmm or machine["hmm.dead"][hmm] or not mm_is_alive(machine, _mm_of(machine, hmm)):
        return -EFAULT
    range.start, range.end, range.hmm = start, end, hmm
    track(machine, hmm, range, valid=not machine["hmm.notifiers"][hmm])
    yield machine.step("The range {range} is registered.", _mm_of(machine, hmm), start, end)
    return 0


def hmm_range_unregister(machine: Machine, range: HmmRange) -> None:
    """End the tracking; the range is not valid any more.

    In 5.2 and 5.3 a range holds the struct hmm as a mirror does; who goes last takes it along.
    """
    untrack(machine, range)
    hmm_put(machine, range.hmm)


def hmm_range_valid(machine: Machine, range: HmmRange) -> bool:
    """Whether no change that touches the range runs. One that has ended leaves no trace."""
    return is_valid(machine, range)


@kernel("include/linux/hmm.h, 5.2")
def hmm_range_wait_until_valid(
    machine: Machine, range: HmmRange, timeout: int = HMM_RANGE_DEFAULT_TIMEOUT
) -> Routine[bool]:
    """Wait until the range is valid, the address space dies, or the time is over.

    ``timeout`` is in milliseconds; here one of them is one turn of the others. Returns whether the
    range is valid, and in 5.2 False at once where the address space is dying.
    """
    mm = _mm_of(machine, range.hmm)
    while timeout > 0 and not is_valid(machine, range) and not machine["hmm.dead"][range.hmm]:
        timeout -= 1
        yield machine.step("It waits until no change runs.", mm, range.start, range.end)
    return is_valid(machine, range)


# --- looking --------------------------------------------------------------------------------------


@kernel("mm/hmm.c, 5.2")
def hmm_range_snapshot(machine: Machine, range: HmmRange) -> Routine[int]:
    """Look at a registered range without faulting. The caller holds the mmap_lock.

    Returns
    -------
    How many pages were answered, short where something odd ended the walk; -EFAULT where there is
    no mapping at or above a page, or it is one of device memory, or in 5.2 the address space is
    dying; -EPERM where a page cannot be read, and then all pfns are NONE; -EAGAIN (5.2) or -EBUSY
    (5.3) where the range is not valid.

    Raises
    ------
    ValueError
        In 5.4, which has the flag HMM_FAULT_SNAPSHOT instead.
    """
    era = _era_of(machine, range)
    if era >= Era.V5_4:
        raise ValueError("5.4 has no hmm_range_snapshot: use the flag HMM_FAULT_SNAPSHOT")
    if machine["hmm.dead"][range.hmm]:
        return -EFAULT
    how = WalkHow(era, fault=False)
    at = last = range.start
    while at < range.end:
        if not is_valid(machine, range):
            return -EAGAIN if era is Era.V5_2 else -EBUSY
        vma, refused = _vma(machine, range, at)
        if vma is None:
            return refused
        end = min(range.end, vma.end)
        if vma.start > at:
            end = min(range.end, vma.start)
            _, last = walk_gap(range, at, end, how)
            at = end
            continue
        # What a walk answers is not looked at: it goes on with the next mapping.
        _, last = yield from walk_vma(machine, range, vma, at, end, how)
        at = end
    return last - range.start


@kernel("mm/hmm.c, 5.2")
def hmm_range_fault(machine: Machine, range: HmmRange, how: bool | int) -> Routine[int]:
    """Look at a registered range and fault in what is asked for. The caller holds the mmap_lock.

    Parameters
    ----------
    how
        ``block`` in 5.2, which does nothing, for a fault may always give the lock up; in 5.3, which
        heeds it ("Only set FAULT_FLAG_ALLOW_RETRY for non-blocking"); HMM_FAULT_* flags in 5.4.

    Returns
    -------
    How many pages were answered; -EPERM where a page cannot be read, or in 5.4 where a write is
    asked for and forbidden (see :func:`~hmmlab.model.history.walk_2018.walk_vma`); -EFAULT as for
    :func:`hmm_range_snapshot`, or where a fault fails; -EAGAIN and -EBUSY as the table above says.
    After an error the pfns from the failing page on are NONE.
    """
    era = _era_of(machine, range)
    if machine["hmm.dead"][range.hmm]:
        return -EFAULT
    since_5_4 = era >= Era.V5_4
    snapshot = since_5_4 and bool(int(how) & HMM_FAULT_SNAPSHOT)
    may_retry = bool(int(how) & HMM_FAULT_ALLOW_RETRY) if since_5_4 else era is Era.V5_2 or not how
    walk = WalkHow(era, not snapshot, may_retry)
    at = last = range.start
    while at < range.end:
        if not is_valid(machine, range):
            if era is not Era.V5_2:
                return -EBUSY
            machine.up_read(mm_lock(machine, _mm_of(machine, range.hmm)))
            return -EAGAIN
        vma, refused = _vma(machine, range, at)
        if vma is None:
            return refused
        end = min(range.end, vma.end)
        if vma.start > at:
            end = min(range.end, vma.start)
            answer, last = walk_gap(range, at, end, walk)
        else:
            answer, last = yield from walk_vma(machine, range, vma, at, end, walk)
        while answer == -EBUSY and is_valid(machine, range):
            answer, last = yield from walk_vma(machine, range, vma, last, end, walk)
        if answer:
            range.pfns[range.part(last, range.end)] = range.value(_NONE)
            return answer
        at = end
    return last - range.start


# --- the old names --------------------------------------------------------------------------------


def hmm_vma_fault(
    machine: Machine, of: int | HmmMirror, range: HmmRange, block: bool
) -> Routine[int]:
    """What 5.2 and 5.3 keep of the function of 4.17, for drivers of other trees: all in one.

    ``of`` is as for :func:`hmm_range_register`; 5.2 has the address space from the range's mapping.
    Every page is asked for what it says itself.

    Returns
    -------
    0, and then :func:`hmm_vma_range_done` must follow; -EAGAIN where the range was not valid in
    time, and then it stays tracked, for nobody thought of it; -EBUSY where it was invalidated
    meanwhile; what :func:`hmm_range_register` and :func:`hmm_range_fault` answer else. After
    -EAGAIN and -EBUSY the mmap_lock is no longer held.
    """
    range.default_flags, range.pfn_flags_mask = 0, (1 << 64) - 1
    refused = yield from hmm_range_register(machine, range, of, range.start, range.end)
    if refused:
        return refused
    lock = mm_lock(machine, _mm_of(machine, range.hmm))
    if not (yield from hmm_range_wait_until_valid(machine, range)):
        machine.up_read(lock)
        return -EAGAIN
    answer = yield from hmm_range_fault(machine, range, block)
    if answer > 0:
        return 0
    hmm_range_unregister(machine, range)
    if answer in (0, -EBUSY):
        machine.up_read(lock)
    return -EBUSY if answer in (0, -EBUSY, -EAGAIN) else answer


def hmm_vma_range_done(machine: Machine, range: HmmRange) -> bool:
    """End the tracking. Returns whether the range is valid, which it is after every change."""
    valid = is_valid(machine, range)
    hmm_range_unregister(machine, range)
    return valid


#: Mappings that no lookup of 5.2 and later touches.
DEVICE_VMA = VM_IO | VM_PFNMAP | VM_MIXEDMAP


def _mm_of(machine: Machine, hmm: int) -> int:
    """``hmm->mm``."""
    return int(machine["hmm.mm"][hmm])


def _era_of(machine: Machine, range: HmmRange) -> Era:
    """The kernel of a registered range.

    Raises
    ------
    ValueError
        When it is not registered.
    """
    if not range.hmm or not range.row:
        raise ValueError("the range is not registered: hmm_range_register comes first")
    return Era(int(machine["hmm.era"][range.hmm]))


def _vma(machine: Machine, range: HmmRange, at: int) -> tuple[Vma | None, int]:
    """The mapping of page ``at``, or the next one above it; or None and the error."""
    vma = find_vma(machine, _mm_of(machine, range.hmm), at)
    if vma is None or vma.flags & DEVICE_VMA:
        return None, -EFAULT
    if not vma.flags & VM_READ:
        range.pfns[:] = range.value(_NONE)
        return None, -EPERM
    return vma, 0
