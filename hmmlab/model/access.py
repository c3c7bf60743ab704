"""Access to memory: loads and stores by the CPU, and pages that the kernel fetches for somebody.

Source: arch/x86/mm/fault.c, mm/gup.c.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hmmlab.model.alike import all_of, any_of, some
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    PRESENT,
    RW,
    SPECIAL,
    Bools,
    Pfns,
    Words,
    marks_of,
    pfn_of,
    repeats_device_private,
)
from hmmlab.model.exclusive import make_device_exclusive
from hmmlab.model.filemap import cached, device_file_of
from hmmlab.model.geometry import PMD_PAGES, align_down
from hmmlab.model.huge_memory import leaders_of_blocks, split_huge_pmd, will_be_huge
from hmmlab.model.hugetlb import hugetlb_fault
from hmmlab.model.lru import lru_add_drain
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.memory import (
    brought_by_first_window,
    commuting_faults,
    fault_around_window,
    handle_mm_fault,
)
from hmmlab.model.mm_types import (
    VM_ACCESS_FLAGS,
    VM_HUGETLB,
    VM_IO,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    Vma,
    mm_lock,
    mm_root,
    vma_at,
    vma_lookup,
)
from hmmlab.model.page import PG_DIRTY, pfn_to_page, pte_page, set_flags
from hmmlab.model.page_ref import get_page
from hmmlab.model.page_table import huge_blocks, look_at_range, rows_of_range, walk
from hmmlab.model.rows import as_rows, unique_rows

__all__ = [
    "SIGBUS",
    "SIGSEGV",
    "check_vma_flags",
    "faultin",
    "get_user_pages",
    "make_device_exclusive_range",
    "populate",
    "user_access",
]

SIGSEGV, SIGBUS = 11, 7

_ENOMEM, _EFAULT = 12, 14

#: An access that still faults after so many tries would fault forever.
_ENDLESS = 64

Fault = Callable[[Machine, Vma, Pfns, bool], Routine[None]]


# --- loads and stores -----------------------------------------------------------------------------


def user_access(
    machine: Machine, mm: int, start: int, stop: int, values: Words | None = None
) -> Routine[Words]:
    """The CPU reads, or writes where ``values`` is given, the first word of each page.

    Parameters
    ----------
    values
        uint64 of shape (stop - start,).

    Returns
    -------
    uint64 of shape (stop - start,): what was read, or ``values``.

    Raises
    ------
    KernelError
        SIGSEGV at the first page that may not be accessed so; writes before it have happened.
    """
    data = np.empty(stop - start, np.uint64) if values is None else values
    for first, last in machine.chunks(start, stop):
        with machine.bulk(last - first):
            at = first
            while at < last:  # over mappings
                vma = vma_lookup(machine, mm, at)
                if vma is None or not _may_access(vma, write=values is not None):
                    why = "no mapping" if vma is None else f"the mapping is {vma.permissions}"
                    place = machine.names.place(mm, at, at + 1)
                    raise KernelError(0, f"{place}: {why}", signal=SIGSEGV)
                end = _reach(machine, vma, at, min(last, vma.end))
                part = slice(at - start, end - start)
                new = None if values is None else values[part]
                found = yield from _access_in_vma(machine, vma, at, end, new)
                if values is None:
                    data[part] = found
                at = end
    return data


def _reach(machine: Machine, vma: Vma, start: int, stop: int) -> int:
    """How far accesses may be taken at once: not beyond one that may fail."""
    if vma.flags & VM_HUGETLB:
        return min(stop, align_down(start, PMD_PAGES) + PMD_PAGES)
    if not device_file_of(machine, vma.file):
        return stop
    words = look_at_range(machine, mm_root(machine, vma.mm), start, stop)
    return stop if all_of(words) else start + max(int(np.argmin(words != 0)), 1)


def _may_access(vma: Vma, *, write: bool) -> bool:
    """Whether a fault may go on (``access_error`` of x86: any permission lets one read)."""
    return bool(vma.flags & (VM_WRITE if write else VM_ACCESS_FLAGS))


def _access_in_vma(
    machine: Machine, vma: Vma, start: int, stop: int, values: Words | None
) -> Routine[Words]:
    write = values is not None
    words, marks = yield from _touch(machine, vma, start, stop, write, do_user_addr_fault)
    frames = pte_page(machine, words, marks)
    age = np.uint64(ACCESSED | DIRTY if write else ACCESSED)
    if any_of((marks & age) != age):
        # The CPU's page walker does this, without the kernel.
        rows = rows_of_range(machine, mm_root(machine, vma.mm), start, stop)
        machine.write("pte", rows, words | age)
    if values is not None:
        machine.write("page.content", frames, values)
    done = "writes" if write else "reads"
    yield machine.step(f"The CPU {done} {{range}}.", vma.mm, start, stop)
    return machine["page.content"][frames] if values is None else values


def _touch(
    machine: Machine,
    vma: Vma,
    start: int,
    stop: int,
    write: bool,
    fault: Fault,
    *,
    split: bool = False,
) -> Routine[tuple[Words, Words]]:
    """Fault until every page of a part of a mapping is there.

    Returns the words, maybe a view, and their marks.
    """
    parts = []
    for low, high in commuting_faults(machine, vma, start, stop, write):
        words, marks = yield from _touch_alike(machine, vma, low, high, write, fault, split=split)
        if (low, high) == (start, stop):
            return words, marks
        parts.append(words.copy())
    words = np.concatenate(parts)
    return words, marks_of(words)


def _touch_alike(
    machine: Machine,
    vma: Vma,
    start: int,
    stop: int,
    write: bool,
    fault: Fault,
    *,
    split: bool,
) -> Routine[tuple[Words, Words]]:
    wanted = np.uint64(PRESENT | RW if write else PRESENT)
    split = split and not vma.flags & VM_HUGETLB
    vpns = np.arange(start, stop)
    for _ in range(_ENDLESS):
        huge = huge_blocks(machine, mm_root(machine, vma.mm), vpns) if split else np.zeros(0, bool)
        for vpn in vpns[leaders_of_blocks(vpns, huge)].tolist() if any_of(huge) else ():
            yield from split_huge_pmd(machine, vma, vpn - vpn % PMD_PAGES, vpn)
        words = look_at_range(machine, mm_root(machine, vma.mm), start, stop)
        marks = marks_of(words)
        lacking = (marks & wanted) != wanted
        if any_of(lacking):
            lacking = lacking & ~repeats_device_private(words, marks)
        if not any_of(lacking):
            return words, marks
        faulting = some(vpns, lacking)
        if vma.flags & VM_HUGETLB:
            faulting = faulting[leaders_of_blocks(faulting, np.ones(faulting.size, np.bool_))]
        elif vma.is_anonymous:
            faulting = some(faulting, ~_brought_by_huge_pages(machine, vma, faulting))
        elif not write:
            faulting = _faulting(machine, vma, faulting, some(words, lacking) == 0)
        yield from fault(machine, vma, faulting, write)
    raise KernelError(0, f"the access to page {start:#x} faults forever", signal=SIGBUS)


def _brought_by_huge_pages(machine: Machine, vma: Vma, vpns: Pfns) -> Bools:
    """Which of ``vpns`` do not fault, as the first of their 2 MiB brings all; maybe one for all."""
    huge = huge_blocks(machine, mm_root(machine, vma.mm), vpns) | will_be_huge(machine, vma, vpns)
    if not any_of(huge):
        return huge
    return huge & ~leaders_of_blocks(vpns, huge)


def _faulting(machine: Machine, vma: Vma, vpns: Pfns, empty: Bools) -> Pfns:
    """Those of ``vpns`` (int64, ascending) that fault when they are read one after another.

    The first ``empty`` page of a window brings those of its neighbours that the cache has.
    """
    there = cached(machine, vma.file, vma.pgoff_of(0) + vpns) > 0
    brought = brought_by_first_window(machine, vma, vpns, empty)
    low, _ = fault_around_window(vma, vpns)
    waiting = empty & ~brought
    first = waiting.copy()
    first[waiting] = np.diff(low[waiting], prepend=-1) != 0
    return vpns[~(brought | (waiting & ~first & there))]


@kernel("arch/x86/mm/fault.c")
def do_user_addr_fault(machine: Machine, vma: Vma, vpns: Pfns, write: bool) -> Routine[None]:
    """A fault of the CPU: handle it under the mmap_lock. The caller has checked the mapping."""
    lock = mm_lock(machine, vma.mm)
    yield from machine.down_read(lock)
    try:
        yield from handle_mm_fault(machine, vma_at(machine, vma.row), vpns, write)
    finally:
        machine.up_read(lock)


# --- get_user_pages -------------------------------------------------------------------------------


def check_vma_flags(vma: Vma, write: bool, *, force: bool = False) -> bool:
    """Whether the kernel may fetch pages of a mapping for somebody (mm/gup.c).

    ``force`` says that any access to the mapping lets one read (FOLL_FORCE).
    """
    wanted = VM_WRITE if write else VM_ACCESS_FLAGS if force else VM_READ
    return not vma.flags & (VM_IO | VM_PFNMAP) and bool(vma.flags & wanted)


def faultin(
    machine: Machine,
    vma: Vma,
    start: int,
    stop: int,
    write: bool,
    *,
    remote: bool = False,
    split: bool = False,
) -> Routine[Words]:
    """Make pages of one mapping present, or writable, as an access would; returns their words.

    The caller holds the mmap_lock and has checked the mapping.
    """

    def fault(machine: Machine, vma: Vma, vpns: Pfns, write: bool) -> Routine[None]:
        vma = vma_at(machine, vma.row)
        if not vma.flags & VM_HUGETLB:
            yield from handle_mm_fault(machine, vma, vpns, write, remote)
            return
        for vpn in vpns.tolist():  # over huge pages
            if not (yield from hugetlb_fault(machine, vma, vpn, write)):
                place = machine.names.place(vma.mm, vpn, vpn + 1)
                raise KernelError(_EFAULT, f"{place}: the pool has no huge page left")

    words = np.zeros(stop - start, np.uint64)
    for first, last in machine.chunks(start, stop):
        with machine.bulk(last - first):
            part, _ = yield from _touch(machine, vma, first, last, write, fault, split=split)
            words[first - start : last - start] = part
    return words


def populate(machine: Machine, vma: Vma, start: int, stop: int, write: bool) -> Routine[None]:
    """Make pages of one mapping present, and ask again from the first that could not be had.

    The caller holds the mmap_lock for reading. A fault that makes a page of a file dirty gives it
    up, so that nobody waits while there are too many of those; the mapping is looked up anew then.

    Raises
    ------
    KernelError
        Why that one could not be had; ENOMEM when the mapping is gone by then.
    """
    at = begun = start
    while at < stop:
        end = _reach(machine, vma, at, stop)
        if write and vma.file and vma.flags & VM_SHARED:
            _, end = next(iter(machine.chunks(at, end)))
        completed = _to_be_dirtied(machine, vma, at, end) if write else 0
        try:
            yield from faultin(machine, vma, at, end, write)
        except KernelError:
            if at == begun:
                raise
            begun = at
        else:
            if write and not vma.flags & VM_HUGETLB:
                _mark_dirty(machine, vma, at, end)
            at = end
        if completed:
            vma = yield from _give_lock_up(machine, vma, at if at < stop else stop - 1, completed)


def _to_be_dirtied(machine: Machine, vma: Vma, start: int, stop: int) -> int:
    """How many writes to a shared mapping will fault and find a clean page of a file.

    Source: mm/memory.c (``fault_dirty_shared_page``).
    """
    if not vma.file or not vma.flags & VM_SHARED or device_file_of(machine, vma.file):
        return 0
    words = look_at_range(machine, mm_root(machine, vma.mm), start, stop)
    vpns = start + np.flatnonzero((words & np.uint64(PRESENT | RW)) != PRESENT | RW)
    frames = cached(machine, vma.file, vma.pgoff_of(0) + vpns)
    flags = machine["page.flags"][pfn_to_page(machine, np.maximum(frames, 0))]
    # What comes back from swap is dirty before it is mapped.
    clean = (frames == 0) | ((frames > 0) & ((flags & np.uint32(PG_DIRTY)) == 0))
    return int(np.count_nonzero(clean))


def _give_lock_up(machine: Machine, vma: Vma, vpn: int, times: int) -> Routine[Vma]:
    """Let others have the mmap_lock after each of some faults; returns what is mapped then."""
    lock = mm_lock(machine, vma.mm)
    lru_add_drain(machine, times)
    machine.up_read(lock)
    yield machine.step(
        "Pages of a file have become dirty: the mmap_lock is given up for a while.", vma.mm
    )
    yield from machine.down_read(lock)
    found = vma_lookup(machine, vma.mm, vpn)
    if found is None:
        raise KernelError(_ENOMEM, f"{machine.names.place(vma.mm, vpn, vpn + 1)}: no mapping")
    return found


def _mark_dirty(machine: Machine, vma: Vma, start: int, stop: int) -> None:
    """What was asked for to be written counts as written (FOLL_TOUCH)."""
    root = mm_root(machine, vma.mm)
    for run in walk(machine, root, start, stop):
        rows = np.arange(run.row, run.row + run.stop - run.start)
        words = machine["pte"][rows]
        clean = (words & np.uint64(PRESENT | DIRTY | SPECIAL)) == PRESENT
        if run.huge:
            machine.write("pte", as_rows(rows), words | np.uint64(DIRTY))
        elif any_of(clean):
            set_flags(machine, unique_rows(pfn_of(words[clean])), PG_DIRTY)


@kernel("mm/gup.c")
def get_user_pages(
    machine: Machine,
    mm: int,
    start: int,
    stop: int,
    write: bool,
    *,
    remote: bool = False,
    split: bool = False,
) -> Routine[Pfns]:
    """Frames of pages from ``start`` on, with a reference to each; as far as that goes.

    ``split`` says that huge PMD words are split on the way (FOLL_SPLIT_PMD).

    Raises
    ------
    KernelError
        EFAULT when not even the first can be had.
    """
    found = np.zeros(0, np.int64)
    at = start
    while at < stop:  # over mappings
        vma = vma_lookup(machine, mm, at)
        if vma is None or not check_vma_flags(vma, write):
            break
        end = _reach(machine, vma, at, min(stop, vma.end))
        try:
            words = yield from faultin(machine, vma, at, end, write, remote=remote, split=split)
        except KernelError:
            break
        if write and remote and not vma.flags & VM_HUGETLB:  # get_user_pages_remote touches them
            _mark_dirty(machine, vma, at, end)
        found = np.concatenate([found, pfn_of(words)])
        at = end
    if not found.size:
        place = machine.names.place(mm, start, start + 1)
        raise KernelError(_EFAULT, f"{place} cannot be fetched")
    get_page(machine, found)
    return found


@kernel("mm/rmap.c")
def make_device_exclusive_range(
    machine: Machine, mm: int, start: int, stop: int, owner: int
) -> Routine[tuple[Pfns, Bools]]:
    """Fetch pages for writing, and let the device have them to itself.

    Returns
    -------
    The frames that were fetched, each with a reference, and which of them are the caller's now:
    these are locked.

    Raises
    ------
    KernelError
        EFAULT when not even the first can be had.
    """
    pfns = yield from get_user_pages(machine, mm, start, stop, True, remote=True, split=True)
    vpns = np.arange(start, start + pfns.size)
    return pfns, (yield from make_device_exclusive(machine, mm, vpns, pfns, owner))
