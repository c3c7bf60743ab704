"""What a page fault does, what an access by the CPU does, and how a range is emptied.

:func:`handle_mm_fault` takes the pages of one mapping in one call: as many as the caller's loop may
take at once. Each page goes one of a few ways, and pages on different ways do not disturb each
other, so the ways are taken one after another, each for all of its pages.

Source: mm/memory.c, arch/x86/mm/fault.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    PRESENT,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    Bools,
    Pfns,
    Words,
    is_device_private,
    is_migration,
    is_present,
    is_swap_type,
    pfn_of,
    present_word,
    swap_offset_pfn,
)
from hmmlab.model.filemap import cached, read_pages
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_ACCESS_FLAGS,
    VM_SHARED,
    VM_WRITE,
    Vma,
    anon_vma_prepare,
    mm_lock,
    mm_root,
    vm_page_prot,
    vma_at,
    vma_lookup,
)
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import (
    PG_ANON,
    PG_ANON_EXCLUSIVE,
    PG_DIRTY,
    PG_LRU,
    ZERO_PFN,
    alloc_pages,
    as_rows,
    get_page,
    page_mapping,
    page_rows,
    pagemap_of,
    put_page,
    set_flags,
)
from hmmlab.model.page_table import alloc_tables, read_range, rows_of, walk
from hmmlab.model.rmap import page_add_file_rmap, page_add_new_anon_rmap, page_remove_rmap
from hmmlab.model.state import Rows, row_numbers

__all__ = ["Faults", "do_user_addr_fault", "handle_mm_fault", "unmap_page_range", "user_access"]

#: An access that still faults after so many tries would fault forever.
_ENDLESS = 64

#: Pages of the aligned window in which a read fault of a file maps what is cached.
_FAULT_AROUND = 16

SIGSEGV, SIGBUS = 11, 7


@dataclass(frozen=True, slots=True)
class Faults:
    """Calls of ``handle_mm_fault``: one for each of ``vpns`` (int64), in the kernel's order."""

    mm: int
    vpns: NDArray[np.int64]
    write: bool
    remote: bool


# --- handle_mm_fault ------------------------------------------------------------------------------


@kernel("mm/memory.c")
def handle_mm_fault(
    machine: Machine, vma: Vma, vpns: Pfns, write: bool, remote: bool = False
) -> Routine[None]:
    """Make ``vpns`` (int64, ascending, all in ``vma``) present, or writable, as far as that goes.

    ``remote`` says that it is done on behalf of somebody else than the CPU of the process, such as
    a device. The caller has checked the permissions.

    Raises
    ------
    KernelError
        SIGBUS when device memory cannot be brought back; ENOMEM when RAM is used up.
    """
    machine.called("handle_mm_fault", vpns.size - 1, up=1)
    root = mm_root(machine, vma.mm)
    low, high = int(vpns[0]), int(vpns[-1]) + 1
    if high - low == vpns.size:
        alloc_tables(machine, root, low, high)
    else:
        for vpn in np.unique(vpns >> 9).tolist():  # over page tables
            alloc_tables(machine, root, vpn << 9, (vpn << 9) + 1)
    rows = rows_of(machine, root, vpns)
    words = machine["pte"][rows].copy()
    yield machine.step(
        _fault_sentence(vpns, write, remote),
        vma.mm,
        low,
        high,
        detail=Faults(vma.mm, vpns, write, remote),
    )
    empty = words == 0
    elsewhere = is_swap_type(words)
    shielded = ~empty & ~elsewhere & ((words & RW) == 0) if write else np.zeros_like(empty)
    ready = ~(empty | elsewhere | shielded)
    if empty.any():
        fill = do_anonymous_page if vma.is_anonymous else do_fault
        yield from fill(machine, vma, vpns[empty], _some(rows, empty), write)
    if elsewhere.any():
        yield from do_swap_page(
            machine, vma, vpns[elsewhere], _some(rows, elsewhere), words[elsewhere]
        )
    if shielded.any():
        yield from do_wp_page(machine, vma, vpns[shielded], _some(rows, shielded), words[shielded])
    if ready.any():
        marks = ACCESSED | (DIRTY | SOFT_DIRTY if write else 0)
        machine.write("pte", _some(rows, ready), words[ready] | np.uint64(marks))
        yield machine.step(
            "{range}: there already, so only the age changes.",
            vma.mm,
            int(vpns[ready][0]),
            int(vpns[ready][-1]) + 1,
        )


def _some(rows: Rows, mask: NDArray[np.bool_]) -> Rows:
    """The masked ones of ``rows``."""
    if mask.all():
        return rows
    return as_rows(row_numbers(rows)[mask])


def _fault_sentence(vpns: Pfns, write: bool, remote: bool) -> str:
    who = "The device" if remote else "The CPU"
    many = "" if vpns.size == 1 else f" ({vpns.size} faults, page after page)"
    return f"{who} needs {{range}} for {'writing' if write else 'reading'}{many}."


@kernel("mm/memory.c")
def do_anonymous_page(
    machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, write: bool
) -> Routine[None]:
    """Fill empty words: with the zero page for a read, with new zeroed frames for a write."""
    prot = vm_page_prot(vma.flags)
    first, last = int(vpns[0]), int(vpns[-1]) + 1
    if not write:
        machine.write("pte", rows, present_word(ZERO_PFN, prot | SPECIAL))
        yield machine.step(
            "First touch of {range} was a read: the zero page is mapped, no memory is taken.",
            vma.mm,
            first,
            last,
        )
        return
    vma = anon_vma_prepare(machine, vma)
    pfns = alloc_pages(machine, vpns.size)
    set_flags(machine, pfns, PG_LRU)
    page_add_new_anon_rmap(machine, pfns, vma, vpns)
    machine.write("pte", rows, present_word(pfns, _born_dirty(vma, prot)))
    yield machine.step(
        "First touch of {range} was a write: a new frame of zeros is mapped.", vma.mm, first, last
    )


@kernel("mm/memory.c")
def do_fault(machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, write: bool) -> Routine[None]:
    """Fill empty words of a file mapping: with the file's pages, or for a private write a copy."""
    pages = vma.pgoff_of(0) + vpns
    first, last = int(vpns[0]), int(vpns[-1]) + 1
    if not write:
        _fault_around(machine, vma, vpns, pages)
    pfns = read_pages(machine, vma.file, pages)
    prot = vm_page_prot(vma.flags)
    if write and not vma.flags & VM_SHARED:
        vma = anon_vma_prepare(machine, vma)
        content = machine["page.content"][page_rows(machine, pfns)]
        pfns = alloc_pages(machine, vpns.size)
        machine.write("page.content", as_rows(page_rows(machine, pfns)), content)
        set_flags(machine, pfns, PG_LRU)
        page_add_new_anon_rmap(machine, pfns, vma, vpns)
        how = "a write to a private page of a file: a copy of its own is mapped."
    else:
        get_page(machine, pfns)
        page_add_file_rmap(machine, pfns)
        if write:
            set_flags(machine, pfns, PG_DIRTY)
        how = "the file's page is mapped."
    words = present_word(pfns, _born_dirty(vma, prot) if write else prot)
    machine.write("pte", rows, words)
    yield machine.step(f"First touch of {{range}} was {how}", vma.mm, first, last)


def _faulting(machine: Machine, vma: Vma, vpns: Pfns, empty: Bools) -> Pfns:
    """Those of ``vpns`` (int64, ascending) that fault when they are read one after another.

    The first ``empty`` page of a window brings those of its neighbours that the cache has.
    """
    first = empty.copy()
    window = vpns[empty] & -_FAULT_AROUND
    first[empty] = np.diff(window, prepend=-1) != 0
    there = cached(machine, vma.file, vma.pgoff_of(0) + vpns) > 0
    return vpns[~(empty & ~first & there)]


def _fault_around(machine: Machine, vma: Vma, vpns: Pfns, pages: Pfns) -> None:
    """Map what the cache has in the 16 pages around each of ``vpns`` (``filemap_map_pages``)."""
    low = np.unique(vpns & -_FAULT_AROUND)
    around = (low[:, None] + np.arange(_FAULT_AROUND)).ravel()
    around = around[(around >= vma.start) & (around < vma.end) & ~np.isin(around, vpns)]
    frames = cached(machine, vma.file, vma.pgoff_of(0) + around)
    around, frames = around[frames > 0], frames[frames > 0]
    if not around.size:
        return
    rows = row_numbers(rows_of(machine, mm_root(machine, vma.mm), around))
    empty = machine["pte"][rows] == 0
    rows, frames = rows[empty], frames[empty]
    get_page(machine, frames)
    page_add_file_rmap(machine, frames)
    machine.write("pte", as_rows(rows), present_word(frames, vm_page_prot(vma.flags)))


def _born_dirty(vma: Vma, prot: int) -> int:
    return prot | DIRTY | SOFT_DIRTY | RW if vma.flags & VM_WRITE else prot


@kernel("mm/memory.c")
def do_wp_page(machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, words: Words) -> Routine[None]:
    """A write to pages that are present and not writable: reuse the frame, or copy it."""
    normal = (words & SPECIAL) == 0
    frames = np.where(normal, pfn_of(words), ZERO_PFN)
    at = page_rows(machine, frames)
    flags = machine["page.flags"][at]
    anon = normal & ((flags & PG_ANON) != 0)
    exclusive = anon & ((flags & PG_ANON_EXCLUSIVE) != 0)
    alone = anon & ~exclusive & (machine["page.refcount"][at] == 1)
    shared = normal & ~anon & bool(vma.flags & VM_SHARED)
    if shared.any():  # wp_page_shared
        set_flags(machine, frames[shared], PG_DIRTY)
    reuse = exclusive | alone | shared
    if alone.any():  # page_move_anon_rmap: the last one left owns it from now on
        set_flags(machine, frames[alone], PG_ANON_EXCLUSIVE)
        machine.write("page.mapping", as_rows(at[alone]), vma.anon_vma)
    if reuse.any():
        marks = np.uint64(ACCESSED | DIRTY | SOFT_DIRTY | (RW if vma.flags & VM_WRITE else 0))
        machine.write("pte", _some(rows, reuse), words[reuse] | marks)
        yield machine.step(
            "Nobody else has the frame of {range}: it becomes writable in place."
            if not shared.any()
            else "All shall see what is written to {range}: it becomes writable in place.",
            vma.mm,
            int(vpns[reuse][0]),
            int(vpns[reuse][-1]) + 1,
        )
    copy = ~reuse
    if copy.any():
        yield from wp_page_copy(machine, vma, vpns[copy], _some(rows, copy), words[copy])


@kernel("mm/memory.c")
def wp_page_copy(machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, words: Words) -> Routine[None]:
    """Copy on write: each page gets a frame of its own, inside a CLEAR of that page."""
    vma = anon_vma_prepare(machine, vma)
    normal = (words & SPECIAL) == 0
    old = pfn_of(words)
    new = alloc_pages(machine, vpns.size)
    machine.write(
        "page.content",
        as_rows(page_rows(machine, new)),
        machine["page.content"][page_rows(machine, old)],
    )
    range = MmuNotifierRange.each(vma.mm, Event.CLEAR, vpns, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    set_flags(machine, new, PG_LRU)
    page_add_new_anon_rmap(machine, new, vma, vpns)
    machine.write("pte", rows, present_word(new, _born_dirty(vma, vm_page_prot(vma.flags))))
    page_remove_rmap(machine, old[normal])
    yield machine.step(
        "A frame of its own for {range}: "
        + ("the old one keeps its readers." if normal.all() else "so far it was the zero page."),
        vma.mm,
        int(vpns[0]),
        int(vpns[-1]) + 1,
    )
    yield from invalidate_range_end(machine, range)
    put_page(machine, old[normal])


@kernel("mm/memory.c")
def do_swap_page(machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, words: Words) -> Routine[None]:
    """A fault on entries that are neither empty nor present."""
    moving = is_migration(words)
    while moving.any():
        yield machine.step(
            "It waits until the migration of {range} ends.",
            vma.mm,
            int(vpns[moving][0]),
            int(vpns[moving][-1]) + 1,
            lock="migration_entry_wait",
        )
        words = machine["pte"][rows].copy()
        moving = is_swap_type(words) & is_migration(words)
    private = is_swap_type(words) & is_device_private(words)
    if private.any():
        pfns = swap_offset_pfn(words[private])
        maps = pagemap_of(machine, pfns)
        for pagemap in np.unique(maps).tolist():
            mine = maps == pagemap
            get_page(machine, pfns[mine])
            ops = machine.objects["pagemap"][pagemap]
            yield from ops.migrate_to_ram(machine, vma, vpns[private][mine], pfns[mine])
            put_page(machine, pfns[mine])


# --- access by the CPU ----------------------------------------------------------------------------


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
    data = np.zeros(stop - start, np.uint64) if values is None else values
    for first, last in machine.chunks(start, stop):
        with machine.bulk(last - first):
            at = first
            while at < last:  # over mappings
                vma = vma_lookup(machine, mm, at)
                if vma is None or not _may_access(vma, write=values is not None):
                    why = "no mapping" if vma is None else f"the mapping is {vma.permissions}"
                    place = machine.names.place(mm, at, at + 1)
                    raise KernelError(0, f"{place}: {why}", signal=SIGSEGV)
                end = min(last, vma.end)
                part = slice(at - start, end - start)
                new = None if values is None else values[part]
                data[part] = yield from _access_in_vma(machine, vma, at, end, new)
                at = end
    return data


def _may_access(vma: Vma, *, write: bool) -> bool:
    """Whether a fault may go on (``access_error`` of x86: any permission lets one read)."""
    return bool(vma.flags & (VM_WRITE if write else VM_ACCESS_FLAGS))


def _access_in_vma(
    machine: Machine, vma: Vma, start: int, stop: int, values: Words | None
) -> Routine[Words]:
    root = mm_root(machine, vma.mm)
    wanted = PRESENT if values is None else PRESENT | RW
    for _ in range(_ENDLESS):
        words = read_range(machine, root, start, stop)
        lacking = (words & wanted) != wanted
        if not lacking.any():
            break
        vpns = start + np.flatnonzero(lacking)
        if values is None and vma.file:
            vpns = _faulting(machine, vma, vpns, words[lacking] == 0)
        yield from do_user_addr_fault(machine, vma, vpns, values is not None)
    else:
        raise KernelError(0, f"the access to page {start:#x} faults forever", signal=SIGBUS)
    marks = np.uint64(ACCESSED if values is None else ACCESSED | DIRTY)
    if ((words & marks) != marks).any():  # the CPU's page walker does this, without the kernel
        machine.write("pte", rows_of(machine, root, np.arange(start, stop)), words | marks)
    frames = as_rows(page_rows(machine, pfn_of(words)))
    if values is not None:
        machine.write("page.content", frames, values)
    done = "reads" if values is None else "writes"
    yield machine.step(f"The CPU {done} {{range}}.", vma.mm, start, stop)
    return machine["page.content"][frames] if values is None else values


@kernel("arch/x86/mm/fault.c")
def do_user_addr_fault(machine: Machine, vma: Vma, vpns: Pfns, write: bool) -> Routine[None]:
    """A fault of the CPU: handle it under the mmap_lock. The caller has checked the mapping."""
    lock = mm_lock(machine, vma.mm)
    yield from machine.down_read(lock)
    try:
        yield from handle_mm_fault(machine, vma_at(machine, vma.row), vpns, write)
    finally:
        machine.up_read(lock)


# --- zap ------------------------------------------------------------------------------------------


@kernel("mm/memory.c")
def unmap_page_range(machine: Machine, vma: Vma, start: int, stop: int) -> Routine[None]:
    """Empty the words of pages ``start`` to ``stop - 1`` and drop what they referred to."""
    for run in walk(machine, mm_root(machine, vma.mm), start, stop):
        if run.row < 0:
            continue
        used = np.flatnonzero(machine["pte"][run.row : run.row + run.stop - run.start])
        for first, last in machine.chunks(0, used.size):
            yield from _zap(machine, vma, run.row, run.start, used[first:last])


def _zap(
    machine: Machine, vma: Vma, row: int, start: int, used: NDArray[np.int64]
) -> Routine[None]:
    """Empty the words of pages ``start + used``, whose rows are ``row + used``."""
    rows = as_rows(row + used)
    words = machine["pte"][rows].copy()
    present = is_present(words)
    normal = present & ((words & SPECIAL) == 0)
    private = ~present & is_device_private(words)
    machine.write("pte", rows, 0)
    held = normal | private
    dirty = pfn_of(words[normal & ((words & DIRTY) != 0)])
    dirty = dirty[page_mapping(machine, dirty)]
    if dirty.size:
        set_flags(machine, np.unique(dirty), PG_DIRTY)
    pfns = np.where(present, pfn_of(words), swap_offset_pfn(words))[held]
    page_remove_rmap(machine, pfns)
    put_page(machine, pfns)
    first, last = start + int(used[0]), start + int(used[-1]) + 1
    yield machine.step("{range}: no longer mapped.", vma.mm, first, last)
