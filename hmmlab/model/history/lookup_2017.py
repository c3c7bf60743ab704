"""hmm_vma_get_pfns, hmm_vma_fault and hmm_vma_range_done, as 4.14 merged them.

A driver looks a range of one mapping up, with or without faulting, and gets an ``hmm_pfn_t`` a
page:

    bit 0 VALID      bit 2 WRITE      bit 4 EMPTY      bit 6 DEVICE_UNADDRESSABLE
    bit 1 READ       bit 3 ERROR      bit 5 SPECIAL    from bit 7 on: the frame

From then on the range is tracked, and a change that touches it marks it and empties its pfns, when
that change ends. So the driver *must* call ``hmm_vma_range_done``, under the lock of its own page
table: only then it knows whether to use what it saw.

The functions take page numbers; ``pfns`` is the caller's uint64 array of one word a page.

Source: mm/hmm.c, include/linux/hmm.h of 4.14.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hmmlab.model.entry import Bools, Pfns, Words, is_present
from hmmlab.model.geometry import LEVEL_PAGES, PMD_PAGES, align_down
from hmmlab.model.history.era import EAGAIN, EBUSY, EINVAL, ENOMEM, Era
from hmmlab.model.history.fault import fault_pages
from hmmlab.model.history.found import cannot_be_written, find, migration_entry_wait
from hmmlab.model.history.mirror_2017 import hmm_register
from hmmlab.model.history.ranges import TrackedRange, range_done, track
from hmmlab.model.history.struct_hmm import mirrors_of
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_HUGETLB, VM_READ, VM_SPECIAL, VM_WRITE, Vma, mm_root, vma_at
from hmmlab.model.page_table import Run, walk

__all__ = [
    "HMM_PFN_DEVICE_UNADDRESSABLE",
    "HMM_PFN_EMPTY",
    "HMM_PFN_ERROR",
    "HMM_PFN_READ",
    "HMM_PFN_SHIFT",
    "HMM_PFN_SPECIAL",
    "HMM_PFN_VALID",
    "HMM_PFN_WRITE",
    "HmmRange",
    "hmm_pfn_t_from_pfn",
    "hmm_pfn_t_to_pfn",
    "hmm_vma_fault",
    "hmm_vma_get_pfns",
    "hmm_vma_range_done",
    "mirrored_hmm",
]

HMM_PFN_VALID = 1 << 0
HMM_PFN_READ = 1 << 1
HMM_PFN_WRITE = 1 << 2
HMM_PFN_ERROR = 1 << 3
HMM_PFN_EMPTY = 1 << 4
HMM_PFN_SPECIAL = 1 << 5
HMM_PFN_DEVICE_UNADDRESSABLE = 1 << 6
HMM_PFN_SHIFT = 7


class HmmRange(TrackedRange):
    """A range that is looked up (``struct hmm_range`` of 4.14); the lookup fills it in."""


def hmm_pfn_t_from_pfn(pfns: Pfns) -> Words:
    """``hmm_pfn_t`` words that name ``pfns``; VALID is set."""
    return (np.asarray(pfns, np.int64) << HMM_PFN_SHIFT).astype(np.uint64) | np.uint64(
        HMM_PFN_VALID
    )


def hmm_pfn_t_to_pfn(words: Words) -> Pfns:
    """Frames that ``hmm_pfn_t`` words name, -1 where they are not VALID."""
    words = np.asarray(words, np.uint64)
    frames = (words >> np.uint64(HMM_PFN_SHIFT)).astype(np.int64)
    return np.where((words & np.uint64(HMM_PFN_VALID)) != 0, frames, -1)


# --- the three functions --------------------------------------------------------------------------


@kernel("mm/hmm.c, 4.14")
def hmm_vma_get_pfns(
    machine: Machine, vma: Vma, range: HmmRange, start: int, end: int, pfns: Words
) -> Routine[int]:
    """Look pages ``start`` to ``end - 1`` up without faulting, and track the range.

    Returns
    -------
    0, and then :func:`hmm_vma_range_done` must follow; -EINVAL for hugetlb and special mappings
    (all pfns are SPECIAL then), for a range that is not inside the mapping, and where no mirror is
    registered; -ENOMEM when there is no struct hmm.

    Notes
    -----
    The merged code tested for a mirror by asking whether the notifier has its callbacks, which it
    has just been given; the rule that the test was written for is the one kept here.
    """
    if _is_special(vma):
        pfns[: end - start] = HMM_PFN_SPECIAL
        return -EINVAL
    refused = yield from _begin(machine, vma, range, start, end, pfns)
    if not refused:
        yield from _walk(machine, range, vma, start, _Walk(fault=False, write=False))
    return refused


@kernel("mm/hmm.c, 4.14")
def hmm_vma_fault(
    machine: Machine,
    vma: Vma,
    range: HmmRange,
    start: int,
    end: int,
    pfns: Words,
    write: bool,
    block: bool,
) -> Routine[int]:
    """Look pages up and fault in what is missing, or cannot be written where ``write``.

    ``block`` should keep a fault from giving the mmap_lock up, and does nothing: every fault may.

    Returns
    -------
    0, and then :func:`hmm_vma_range_done` must follow. For hugetlb and special mappings that is
    the answer too, with SPECIAL in all pfns. -EINVAL and -ENOMEM as for :func:`hmm_vma_get_pfns`;
    -EFAULT when a fault fails; -EBUSY when one gave the mmap_lock up. After these two the pfns
    from the failing page table on are 0, ERROR marks included, and the range is no longer tracked.

    Notes
    -----
    Whether the mapping may be written at all is not asked. Where it may not, the fault makes a
    copy that cannot be written either, and the lookup faults again without end.
    """
    refused = yield from _begin(machine, vma, range, start, end, pfns)
    if refused:
        if refused == -ENOMEM:
            pfns[: end - start] = 0
        return refused
    if _is_special(vma):
        pfns[: end - start] = HMM_PFN_SPECIAL
        return 0
    how = _Walk(fault=True, write=write)
    answer, last = -EAGAIN, start
    while answer == -EAGAIN:
        answer, last = yield from _walk(machine, range, vma, last, how)
    if answer:
        pfns[range.part(last, end)] = 0
        hmm_vma_range_done(machine, vma, range)
    return answer


def hmm_vma_range_done(machine: Machine, vma: Vma, range: HmmRange) -> bool:
    """End the tracking. Returns whether nothing of the range has changed since it was looked up.

    The caller holds the lock of the device's page table, so that what it does with the answer is
    done before the next change tells the mirror.

    Raises
    ------
    ValueError
        For an empty range, where the kernel stops with BUG().
    """
    return range_done(machine, range)


def _is_special(vma: Vma) -> bool:
    return bool(vma.flags & (VM_SPECIAL | VM_HUGETLB))


def _begin(
    machine: Machine, vma: Vma, range: HmmRange, start: int, end: int, pfns: Words
) -> Routine[int]:
    """Check the arguments and track the range."""
    hmm = yield from mirrored_hmm(machine, vma, start, end, Era.V4_14)
    if hmm < 0:
        return hmm
    range.start, range.end, range.pfns = start, end, pfns
    track(machine, hmm, range, valid=True)
    return 0


def mirrored_hmm(machine: Machine, vma: Vma, start: int, end: int, era: Era) -> Routine[int]:
    """Row of the struct hmm under which pages of a mapping are looked up, until 5.1.

    Returns -EINVAL where the pages leave the mapping or no mirror is registered, -ENOMEM when there
    is no struct hmm.
    """
    if not (vma.start <= start < vma.end and vma.start <= end <= vma.end):
        return -EINVAL
    hmm = yield from hmm_register(machine, vma.mm, era)
    if not hmm:
        return -ENOMEM
    return hmm if mirrors_of(machine, hmm) else -EINVAL


# --- the walk -------------------------------------------------------------------------------------


class _Walk(NamedTuple):
    """What a walk is for (``struct hmm_vma_walk``)."""

    fault: bool
    write: bool


@kernel("mm/pagewalk.c", "walk_page_range")
def _walk(
    machine: Machine, range: HmmRange, vma: Vma, start: int, how: _Walk
) -> Routine[tuple[int, int]]:
    """Walk from page ``start`` on.

    Returns the answer, -EAGAIN where something was faulted or waited for, and the page from which
    to walk again.
    """
    for run in walk(machine, mm_root(machine, vma.mm), start, range.end):
        if run.row < 0:
            pages = LEVEL_PAGES[run.level]
            range.pfns[range.part(run.start, run.stop)] = HMM_PFN_EMPTY
            if how.fault:
                stop = min(run.stop, align_down(run.start, pages) + pages)
                return (yield from _fault(machine, vma, run.start, stop, how.write)), run.start
            continue
        answer, last = yield from _walk_pmd(machine, range, vma, run, how)
        if answer:
            return answer, last
    yield machine.step("It has looked at {range}.", vma.mm, start, range.end)
    return 0, range.end


@kernel("mm/hmm.c, 4.14", "hmm_vma_walk_pmd")
def _walk_pmd(
    machine: Machine, range: HmmRange, vma: Vma, run: Run, how: _Walk
) -> Routine[tuple[int, int]]:
    """Pages with page tables. One that needs a fault makes its whole table fault."""
    words = machine["pte"][run.row : run.row + run.stop - run.start].copy()
    answers, lacking, moving = _answers(words, vma, how)
    stops = np.flatnonzero(lacking | moving)
    if not stops.size:
        range.pfns[range.part(run.start, run.stop)] = answers
        return 0, run.stop
    at = run.start + int(stops[0])
    range.pfns[range.part(run.start, at)] = answers[: stops[0]]
    if moving[stops[0]]:
        yield migration_entry_wait(machine, vma.mm, at)
        return -EAGAIN, at
    first = max(run.start, align_down(at, PMD_PAGES))
    stop = min(run.stop, align_down(at, PMD_PAGES) + PMD_PAGES)
    range.pfns[range.part(first, stop)] = 0
    if how.write and not vma_at(machine, vma.row).flags & VM_WRITE and is_present(words).any():
        yield cannot_be_written(machine, vma.mm, at, at + 1)
    return (yield from _fault(machine, vma, first, stop, how.write)), first


def _answers(words: Words, vma: Vma, how: _Walk) -> tuple[Words, Bools, Bools]:
    """The ``hmm_pfn_t`` of some words, which need a fault, and which are moving and waited for."""
    found = find(words)
    named = found.present | found.private
    flags = np.where(found.writable, np.uint64(HMM_PFN_WRITE), np.uint64(0))
    flags |= np.where(found.private, np.uint64(HMM_PFN_DEVICE_UNADDRESSABLE), np.uint64(0))
    flags |= np.uint64(HMM_PFN_READ if vma.flags & VM_READ else 0)
    answers = np.where(named, hmm_pfn_t_from_pfn(found.frames) | flags, np.uint64(0))
    answers = np.where(words == 0, np.uint64(HMM_PFN_EMPTY), answers)
    answers = np.where(found.odd, np.uint64(HMM_PFN_ERROR), answers)
    if not how.fault:
        nothing = np.zeros(words.size, np.bool_)
        return answers, nothing, nothing
    lacking = (words == 0) | found.swapped
    if how.write:
        lacking |= named & ~found.writable
    return answers, lacking, found.moving


def _fault(machine: Machine, vma: Vma, start: int, stop: int, write: bool) -> Routine[int]:
    """Fault a chunk. Returns -EAGAIN, which means "walk again", or an error."""
    answer = yield from fault_pages(machine, vma, start, stop, write, may_retry=True)
    return {0: -EAGAIN, -EAGAIN: -EBUSY}.get(answer, answer)
