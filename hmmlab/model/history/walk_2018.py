"""The walk of 4.17 to 5.7, which answers in a driver's own encoding.

The driver says which bit means what (``flags[]``), which whole words stand for "nothing" and the
like (``values[]``), and how far a frame number is shifted. Nobody gained by it: the pages had to be
mapped for DMA anyway. Since 5.8 the layout is fixed.

A page's request is ``(pfns & pfn_flags_mask) | default_flags``; until 5.1 it is the word itself.

Source: mm/hmm.c, include/linux/hmm.h of 4.17 to 5.7.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hmmlab.model.entry import RW, SPECIAL, Bools, Pfns, Words, is_present
from hmmlab.model.geometry import LEVEL_PAGES, PMD_PAGES, PUD_PAGES, align_down
from hmmlab.model.history.era import EBUSY, EFAULT, EPERM, Era
from hmmlab.model.history.fault import fault_pages
from hmmlab.model.history.found import cannot_be_written, find, migration_entry_wait
from hmmlab.model.history.ranges import TrackedRange
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.memremap import pagemap_of
from hmmlab.model.mm_types import VM_HUGETLB, VM_WRITE, Vma, mm_root
from hmmlab.model.page import ZERO_PFN
from hmmlab.model.page_table import Run, read_range, walk

__all__ = ["HmmPfnFlag", "HmmPfnValue", "HmmRange", "WalkHow", "walk_gap", "walk_vma"]


class HmmPfnFlag(enum.IntEnum):
    """Index into ``flags[]`` (``enum hmm_pfn_flag_e``); 5.7 has no DEVICE_PRIVATE."""

    HMM_PFN_VALID = 0
    HMM_PFN_WRITE = 1
    HMM_PFN_DEVICE_PRIVATE = 2


_PRIVATE = HmmPfnFlag.HMM_PFN_DEVICE_PRIVATE


class HmmPfnValue(enum.IntEnum):
    """Index into ``values[]`` (``enum hmm_pfn_value_e``)."""

    HMM_PFN_ERROR = 0
    HMM_PFN_NONE = 1
    HMM_PFN_SPECIAL = 2


@dataclass
class HmmRange(TrackedRange):
    """A range in a driver's encoding (``struct hmm_range`` of 4.17 to 5.7).

    Attributes
    ----------
    flags
        Three masks, by :class:`HmmPfnFlag`.
    values
        Three whole words, by :class:`HmmPfnValue`.
    pfn_shift
        How far a frame number is shifted.
    default_flags, pfn_flags_mask
        What is asked of every page, and which bits of ``pfns`` ask for more (since 5.2).
    notifier, notifier_seq
        Interval subscription and the number it was read under (5.7).
    dev_private_owner
        Device whose private pages are reported and not faulted back (5.7); 0 for none.
    vma
        Mapping in which the range lies (until 5.1; later kernels look it up).
    """

    flags: Sequence[int] = (1 << 0, 1 << 1, 1 << 2)
    values: Sequence[int] = (1 << 3, 0, 1 << 4)
    pfn_shift: int = 12
    default_flags: int = 0
    pfn_flags_mask: int = 0
    notifier: int = 0
    notifier_seq: int = 0
    dev_private_owner: int = 0
    vma: Vma | None = None
    hmm: int = field(default=0, init=False)

    @property
    def valid_bit(self) -> np.uint64:
        """``flags[HMM_PFN_VALID]``."""
        return np.uint64(self.flags[HmmPfnFlag.HMM_PFN_VALID])

    @property
    def write_bit(self) -> np.uint64:
        """``flags[HMM_PFN_WRITE]``."""
        return np.uint64(self.flags[HmmPfnFlag.HMM_PFN_WRITE])

    def value(self, which: HmmPfnValue) -> np.uint64:
        """A word of ``values[]``."""
        return np.uint64(self.values[which])

    def device_entry_from_pfn(self, pfns: Pfns) -> Words:
        """Words that name ``pfns``, with VALID (``hmm_device_entry_from_pfn``)."""
        shifted = np.asarray(pfns, np.int64).astype(np.uint64) << np.uint64(self.pfn_shift)
        return shifted | self.valid_bit

    def device_entry_to_pfn(self, words: Words) -> Pfns:
        """Frames that words name, -1 for the values and for what is not VALID."""
        words = np.asarray(words, np.uint64)
        named = ((words & self.valid_bit) != 0) & ~np.isin(
            words, np.array([self.values[v] for v in HmmPfnValue], np.uint64)
        )
        return np.where(named, (words >> np.uint64(self.pfn_shift)).astype(np.int64), -1)


@dataclass(frozen=True, slots=True)
class WalkHow:
    """How a walk goes: of which kernel, whether it faults, whether a fault may drop the lock."""

    era: Era
    fault: bool
    may_retry: bool = False

    def requests(self, range: HmmRange, words: Words) -> Words:
        """What is asked of pages whose input is ``words``."""
        if self.era < Era.V5_2:
            return words
        return (words & np.uint64(range.pfn_flags_mask)) | np.uint64(range.default_flags)


def _need(range: HmmRange, how: WalkHow, words: Words, cpu: Words) -> tuple[Bools, Bools]:
    """Which pages need a fault, and which one for writing (``hmm_pte_need_fault``)."""
    if not how.fault:
        nothing = np.zeros(words.size, np.bool_)
        return nothing, nothing
    asked = how.requests(range, words)
    private_bit = np.uint64(range.flags[_PRIVATE])
    wanted = (asked & range.valid_bit) != 0
    private = (cpu & private_bit) != 0
    wants_write = (asked & range.write_bit) != 0
    home = wanted & private & ((asked & private_bit) != 0)
    write = wanted & ~private & wants_write & ((cpu & range.write_bit) == 0)
    missing = wanted & ~private & ((cpu & range.valid_bit) == 0)
    return missing | write | home, write | (home & wants_write)


def _for_writing(how: WalkHow, fault: Bools, write: Bools) -> bool:
    """Whether pages that are faulted together are faulted for writing.

    Until 5.1 the first that lacks something says so for all, since then it is enough that one does.
    """
    return bool(write.any() if how.era >= Era.V5_2 else write[fault][:1].any())


@kernel("mm/pagewalk.c", "walk_page_range")
def walk_vma(
    machine: Machine, range: HmmRange, vma: Vma, start: int, end: int, how: WalkHow
) -> Routine[tuple[int, int]]:
    """Walk pages ``start`` to ``end - 1``, all in ``vma``, and answer in ``range.pfns``.

    Returns
    -------
    The answer and ``hmm_vma_walk->last``. The answer is 0; -EBUSY where something was faulted or
    waited for and the walk should go on from ``last``; -EAGAIN where a fault gave the mmap_lock up;
    -EPERM where a write is asked for and the mapping forbids it; -EFAULT where a fault failed or
    nothing can be had.

    Notes
    -----
    Until 5.3 nobody asks whether the mapping may be written: the fault of such a page repeats
    without end. 5.4 has the -EPERM that was promised before.

    ``last`` ought to stand behind what was answered, and does not always: pages of which there is
    no page table leave it where they begin ("mm/hmm: make hmm_range_fault return 0 or -1", 5.8).
    """
    last = start
    for run in walk(machine, mm_root(machine, vma.mm), start, end):
        part = _walk_hole if run.row < 0 else _walk_pmd
        answer, last = yield from part(machine, range, vma, run, how)
        if answer:
            return answer, last
    yield machine.step("It has looked at {range}.", vma.mm, start, end)
    return 0, last


def walk_gap(range: HmmRange, start: int, end: int, how: WalkHow) -> tuple[int, int]:
    """Answer for pages that have no mapping.

    Returns the answer, 0 or -EFAULT where a page is asked for, and ``last``, which until 5.6 is
    where the last GiB of them begins. 5.2 and 5.3 followed a NULL pointer where a page was asked
    for; 5.4 has the -EFAULT, and so have all here.
    """
    part = range.part(start, end)
    fault, _ = _need(range, how, range.pfns[part], np.zeros(end - start, np.uint64))
    last = max(start, align_down(end - 1, PUD_PAGES))
    if fault.any():
        return -EFAULT, last
    error = how.era >= Era.V5_7
    which = HmmPfnValue.HMM_PFN_ERROR if error else HmmPfnValue.HMM_PFN_NONE
    range.pfns[part] = range.value(which)
    return 0, last


@kernel("mm/hmm.c, 4.17", "hmm_vma_walk_hole")
def _walk_hole(
    machine: Machine, range: HmmRange, vma: Vma, run: Run, how: WalkHow
) -> Routine[tuple[int, int]]:
    """Pages with no page table, an empty entry of the upper level after another."""
    pages = LEVEL_PAGES[run.level]
    part = range.part(run.start, run.stop)
    fault, write = _need(range, how, range.pfns[part], np.zeros(run.stop - run.start, np.uint64))
    wanted = np.flatnonzero(fault)
    if not wanted.size:
        range.pfns[part] = range.value(HmmPfnValue.HMM_PFN_NONE)
        return 0, max(run.start, align_down(run.stop - 1, pages))
    first = max(run.start, align_down(run.start + int(wanted[0]), pages))
    range.pfns[range.part(run.start, first)] = range.value(HmmPfnValue.HMM_PFN_NONE)
    stop = min(run.stop, align_down(first, pages) + pages)
    inside = slice(first - run.start, stop - run.start)
    writing = _for_writing(how, fault[inside], write[inside])
    return (yield from _fault(machine, range, vma, first, stop, writing, how)), first


@kernel("mm/hmm.c, 4.17", "hmm_vma_walk_pmd")
def _walk_pmd(
    machine: Machine, range: HmmRange, vma: Vma, run: Run, how: WalkHow
) -> Routine[tuple[int, int]]:
    """Pages with page tables: answer up to the first that lacks something, fault from there."""
    if run.huge:
        return (yield from _walk_huge(machine, range, vma, run, how))
    words = machine["pte"][run.row : run.row + run.stop - run.start].copy()
    part = range.part(run.start, run.stop)
    seen = _look(machine, range, how, words, range.pfns[part].copy())
    stops = np.flatnonzero(seen.fault | seen.moving | seen.bad)
    first = int(stops[0]) if stops.size else words.size
    at = run.start + first
    range.pfns[range.part(run.start, at)] = seen.answers[:first]
    if at == run.stop:
        return 0, at
    if seen.bad[first]:
        range.pfns[range.part(at, at + 1)] = seen.answers[first]
        return -EFAULT, at
    if how.era < Era.V5_7:  # and with it what was asked of the page
        range.pfns[range.part(at, at + 1)] = range.value(HmmPfnValue.HMM_PFN_NONE)
    if seen.moving[first]:
        yield migration_entry_wait(machine, vma.mm, at)
        return -EBUSY, at
    stop = min(run.stop, align_down(at, PMD_PAGES) + PMD_PAGES)
    return (yield from _fault(machine, range, vma, at, stop, bool(seen.write[first]), how)), at


def _walk_huge(
    machine: Machine, range: HmmRange, vma: Vma, run: Run, how: WalkHow
) -> Routine[tuple[int, int]]:
    """Pages of huge words: what one page of a word asks for is asked of all that are looked at.

    Of huge pages from a pool only the first page of a word is asked. The huge page of zeros is like
    any other here.
    """
    first = align_down(run.start, PMD_PAGES)
    for block in np.arange(first, run.stop, PMD_PAGES).tolist():  # over PMD words
        at, stop = max(block, run.start), min(block + PMD_PAGES, run.stop)
        row = run.row + at - run.start
        words = machine["pte"][row : row + stop - at].copy()
        part = range.part(at, stop)
        seen = _look(machine, range, how, words, range.pfns[part].copy(), huge=True)
        asked = slice(0, 1) if vma.flags & VM_HUGETLB else slice(None)
        if seen.fault[asked].any():
            write = _for_writing(how, seen.fault[asked], seen.write[asked])
            return (yield from _fault(machine, range, vma, at, stop, write, how)), at
        range.pfns[part] = seen.answers
    return 0, run.stop


class _Seen(NamedTuple):
    """What a walk finds in some words: arrays of one value a word.

    ``answers`` is the word to answer; ``fault`` and ``write`` whether it faults and for what;
    ``moving`` whether it waits; ``bad`` whether it ends there with -EFAULT.
    """

    answers: Words
    fault: Bools
    write: Bools
    moving: Bools
    bad: Bools


def _look(
    machine: Machine,
    range: HmmRange,
    how: WalkHow,
    words: Words,
    inputs: Words,
    *,
    huge: bool = False,
) -> _Seen:
    """Look at words (``hmm_vma_handle_pte``, ``hmm_vma_handle_pmd``).

    From 5.2 to 5.3 a page that is swapped out, and to 5.6 one that is moving, is reported as absent
    and no request brings it in: "Minor optimization around hmm_pte_need_fault()" left them out.
    From 5.2 to 5.4 the zero page is special, and so an error.
    """
    found = find(words)
    private, frames = found.private, found.frames
    since_57 = how.era >= Era.V5_7
    if since_57:
        owners = machine["pagemap.owner"][pagemap_of(machine, frames)]
        private = private & (owners == range.dev_private_owner) & (owners != 0)
    named = found.present | private
    special = found.present & ((words & SPECIAL) != 0)
    if how.era >= Era.V5_5:
        special &= frames != ZERO_PFN
    if huge or how.era < Era.V5_2:
        special[:] = False
    nothing = np.uint64(0)
    cpu = np.where(named, range.valid_bit, nothing)
    cpu |= np.where(named & found.writable, range.write_bit, nothing)
    if not since_57:
        cpu |= np.where(private, np.uint64(range.flags[_PRIVATE]), nothing)
    answers = np.where(
        named,
        range.device_entry_from_pfn(frames) | cpu,
        range.value(HmmPfnValue.HMM_PFN_NONE),
    )
    answers[found.odd] = range.value(HmmPfnValue.HMM_PFN_ERROR)
    answers[special] = range.value(HmmPfnValue.HMM_PFN_SPECIAL)
    fault, write = _need(range, how, inputs, cpu)
    bad = found.odd | (special & ~fault)
    if since_57:
        bad &= _need(range, how, inputs, np.zeros_like(cpu))[0]  # unless nobody asks for it
        fault &= ~private
    elif how.era >= Era.V5_2:
        fault &= ~found.moving
        if how.era < Era.V5_4:
            fault &= ~found.swapped
    waits = found.moving & fault
    return _Seen(answers, fault & ~waits & ~bad, write, waits, bad)


def _fault(
    machine: Machine,
    range: HmmRange,
    vma: Vma,
    start: int,
    stop: int,
    write: bool,
    how: WalkHow,
) -> Routine[int]:
    """Fault a chunk. Returns -EBUSY, which means "walk again", or an error.

    Until 5.6 the pfns of the pages that are faulted become "nothing" first, so what was asked of
    them one by one is forgotten when the walk comes back; the one whose fault fails becomes ERROR.
    """
    if write and not vma.flags & VM_WRITE:
        if how.era >= Era.V5_4:
            return -EPERM
        yield cannot_be_written(machine, vma.mm, start, stop)
    part = range.part(start, stop)
    asked = range.pfns[part].copy()
    if how.era < Era.V5_7:
        range.pfns[part] = range.value(HmmPfnValue.HMM_PFN_NONE)
    answer = yield from fault_pages(machine, vma, start, stop, write, may_retry=how.may_retry)
    if answer and how.era < Era.V5_7:  # pages are faulted in order, so the first that lacks it
        words = read_range(machine, mm_root(machine, vma.mm), start, stop)
        lacks = ~is_present(words) | (write & ((words & RW) == 0))
        failed = int(np.argmax(lacks))
        range.pfns[part][failed:] = asked[failed:]
        which = HmmPfnValue.HMM_PFN_ERROR if answer == -EFAULT else HmmPfnValue.HMM_PFN_NONE
        range.pfns[part][failed] = range.value(which)
    return answer or -EBUSY
