"""Mapping and unmapping: where VMAs are made, cut, merged and removed.

Source: mm/mmap.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.anon_vma import anon_vma_clone, is_singular
from hmmlab.model.entry import Pfns, present_word
from hmmlab.model.filemap import new_file, open_mapped_file, put_file
from hmmlab.model.geometry import PMD_PAGES, USER_VPN_END, align_up
from hmmlab.model.huge_memory import vma_adjust_trans_huge
from hmmlab.model.hugetlb import hugetlb_reserve_pages, hugetlb_vm_op_close
from hmmlab.model.lru import lru_add_drain
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_ACCOUNT,
    VM_DONTEXPAND,
    VM_HUGETLB,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_MIXEDMAP,
    VM_SHARED,
    VM_SOFTDIRTY,
    VM_SPECIAL,
    VM_WRITE,
    Vma,
    find_vma,
    find_vma_prev,
    flags_of_prot,
    free_mm,
    mm_lock,
    mm_root,
    vm_page_prot,
    vma_at,
    vma_lookup,
    vmas_around,
    vmas_in,
    vmas_of,
)
from hmmlab.model.mmu_notifier import (
    EVERYTHING,
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
    mmu_notifier_release,
)
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_table import alloc_tables, free_pgtables, rows_of_range
from hmmlab.model.rmap import page_add_file_rmap
from hmmlab.model.state import State
from hmmlab.model.tlb import MmuGather
from hmmlab.model.vma import move_edges, new_vma, remove_vma, vm_area_dup
from hmmlab.model.zap import unmap_single_vma

__all__ = [
    "close_unmapped_files",
    "do_munmap",
    "exit_mmap",
    "split_vma",
    "sys_mmap",
    "sys_munmap",
    "unmap_vmas",
    "vma_merge",
]

_ENOMEM, _EINVAL = 12, 22

#: What can be mapped.
KINDS = ("private", "shared", "file_private", "file_shared", "hugetlb", "mixed")

#: First word of page 0 of a fresh file; page i holds i more.
_FILE_CONTENT = 7000


# --- system calls ---------------------------------------------------------------------------------


@kernel("mm/mmap.c", "__x64_sys_mmap")
def sys_mmap(
    machine: Machine,
    mm: int,
    start: int,
    pages: int,
    prot: str,
    kind: str = "private",
    device_file: int = 0,
) -> Routine[None]:
    """Map memory at page ``start``, in place of what is there (MAP_FIXED).

    ``kind`` is "private" or "shared" for anonymous memory; "file_private" or "file_shared" for a
    fresh file, whose page i holds 7000 + i; "mixed" for the device file ``device_file``, which puts
    a page of zeros of its own everywhere at once.

    Raises
    ------
    KernelError
        EINVAL for no pages, or where no huge page can begin; ENOMEM beyond the address space, over
        a part of a huge page of the pool, or when the pool has not so many left.
    """
    if pages <= 0:
        raise KernelError(_EINVAL, f"mmap of {pages} pages")
    if start < 0 or start + pages > USER_VPN_END:
        raise KernelError(_ENOMEM, f"pages {start:#x} to {start + pages:#x} leave the user half")
    flags = flags_of_prot(prot) | VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC
    if kind == "hugetlb":
        flags |= VM_HUGETLB | VM_DONTEXPAND
        pages = align_up(pages, PMD_PAGES)
        if start % PMD_PAGES:
            raise KernelError(_EINVAL, f"page {start:#x} begins no huge page")
    elif kind in ("shared", "file_shared"):
        flags |= VM_SHARED | VM_MAYSHARE
    elif flags & VM_WRITE:
        flags |= VM_ACCOUNT
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        try:
            yield from do_munmap(machine, mm, start, start + pages)
        except KernelError:
            place = machine.names.place(mm, start, start + pages)
            raise KernelError(_ENOMEM, f"what is at {place} cannot be unmapped") from None
        _, prev = find_vma_prev(machine, mm, start)
        if kind == "private":
            vma = yield from vma_merge(machine, mm, prev, start, start + pages, flags, 0, start)
            vma = vma or new_vma(machine, mm, start, start + pages, flags, start)
        elif kind == "hugetlb":
            vma = yield from _map_hugetlb(machine, mm, start, start + pages, flags)
        elif kind == "mixed":
            pfns, _ = alloc_pages(machine, pages)
            file = open_mapped_file(machine, device_file)
            flags |= VM_MIXEDMAP
            vma = new_vma(machine, mm, start, start + pages, flags, 0, file)
            put_file(machine, file)
            _insert_pages(machine, vma, pfns)
        else:
            content = np.arange(_FILE_CONTENT, _FILE_CONTENT + pages, dtype=np.uint64)
            file = new_file(machine, pages, content if kind != "shared" else None)
            vma = new_vma(machine, mm, start, start + pages, flags, 0, file)
            if kind == "shared":
                put_file(machine, file)  # nobody has a descriptor of it
        machine.write("vma.flags", vma.row, vma.flags | VM_SOFTDIRTY)
        yield machine.step(
            "{range}: promised by a mapping, and not one page is there yet.",
            mm,
            start,
            start + pages,
        )
    finally:
        machine.up_write(lock)
    yield from close_unmapped_files(machine)


def _map_hugetlb(machine: Machine, mm: int, start: int, stop: int, flags: int) -> Routine[Vma]:
    """A mapping of huge pages, which are all reserved now."""
    reservation = hugetlb_reserve_pages(machine, stop - start)
    if not reservation:  # what the mapping might hold is taken away again
        lru_add_drain(machine)
        tlb = MmuGather(machine, mm)
        yield from unmap_vmas(machine, tlb, mm, [], start, stop)
        machine.called("free_pgtables")
        tlb.finish()
        raise KernelError(_ENOMEM, "the pool has not so many huge pages left")
    file = new_file(machine, stop - start)
    vma = new_vma(machine, mm, start, stop, flags, 0, file)
    put_file(machine, file)
    machine.write("vma.resv", vma.row, reservation)
    return vma


def _insert_pages(machine: Machine, vma: Vma, pfns: Pfns) -> None:
    """Map a frame at every page (``vm_insert_page``)."""
    root = mm_root(machine, vma.mm)
    alloc_tables(machine, root, vma.start, vma.end)
    page_add_file_rmap(machine, pfns, vma)
    words = present_word(pfns, vm_page_prot(vma.flags))
    machine.write("pte", rows_of_range(machine, root, vma.start, vma.end), words)


def close_unmapped_files(machine: Machine) -> Routine[None]:
    """Close device files whose last mapping went in this system call."""
    for number in (machine["device_file.mapped"] < 0).nonzero()[0].tolist():
        machine.write("device_file.mapped", number, 0)
        yield from machine.objects["device_file"][number].close_file()


@kernel("mm/mmap.c", "__x64_sys_munmap")
def sys_munmap(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Unmap pages ``start`` to ``stop - 1``, mapped or not.

    Raises
    ------
    KernelError
        EINVAL for an empty range or one beyond the address space.
    """
    if not 0 <= start < stop <= USER_VPN_END:
        raise KernelError(_EINVAL, f"munmap of pages {start:#x} to {stop:#x}")
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        yield from do_munmap(machine, mm, start, stop)
    finally:
        machine.up_write(lock)
    yield from close_unmapped_files(machine)


def do_munmap(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Cut the mappings at the borders, empty what lies between, and free its tables."""
    below, doomed, above = vmas_around(machine, mm, start, stop)
    if not doomed:
        return
    if doomed[0].start < start or stop < doomed[-1].end:
        for edge in (start, stop):
            vma = vma_lookup(machine, mm, edge)
            if vma and vma.start < edge:
                yield from split_vma(machine, vma, edge)
        below, doomed, above = vmas_around(machine, mm, start, stop)
    lru_add_drain(machine)
    tlb = MmuGather(machine, mm)
    yield from unmap_vmas(machine, tlb, mm, doomed, start, stop)
    machine.called("free_pgtables")
    tables = free_pgtables(
        machine,
        mm_root(machine, mm),
        doomed[0].start,
        doomed[-1].end,
        below.end if below else 0,
        above.start if above else USER_VPN_END,
    )
    tlb.remove_tables(tables)
    tlb.finish()
    for vma in doomed:
        hugetlb_vm_op_close(machine, vma)
        remove_vma(machine, vma)
    yield machine.step("The mapping of {range} is gone.", mm, start, stop)


@kernel("mm/mmap.c")
def exit_mmap(machine: Machine, mm: int) -> Routine[None]:
    """The end of an address space: everybody is told, then all of it goes."""
    yield from mmu_notifier_release(machine, mm)
    lru_add_drain(machine)
    doomed = list(vmas_of(machine, mm))
    tlb = MmuGather(machine, mm)
    if doomed:
        yield from unmap_vmas(machine, tlb, mm, doomed, 0, EVERYTHING)
    machine.called("free_pgtables")
    tables = free_pgtables(machine, mm_root(machine, mm), 0, USER_VPN_END, 0, USER_VPN_END)
    tlb.remove_tables(tables)
    tlb.finish()
    for vma in doomed:
        hugetlb_vm_op_close(machine, vma)
        remove_vma(machine, vma)
    free_mm(machine, mm)
    yield machine.step("The address space is gone.", mm)


@kernel("mm/memory.c")
def unmap_vmas(
    machine: Machine, tlb: MmuGather, mm: int, doomed: list[Vma], start: int, stop: int
) -> Routine[None]:
    """Empty several mappings inside one UNMAP of the whole range."""
    first_row = doomed[0].row if doomed else 0
    range = MmuNotifierRange.one(mm, Event.UNMAP, start, stop, vma=first_row)
    yield from invalidate_range_start(machine, range)
    for vma in doomed:
        first, last = max(vma.start, start), min(vma.end, stop)
        yield from unmap_single_vma(machine, tlb, vma, first, last)
    yield from invalidate_range_end(machine, range)


# --- cutting and merging -------------------------------------------------------------------------


def split_vma(machine: Machine, vma: Vma, at: int) -> Routine[tuple[Vma, Vma]]:
    """Cut a mapping at page ``at``; returns the lower part and the upper part.

    Raises
    ------
    KernelError
        EINVAL inside of a huge page of hugetlb.
    """
    if vma.flags & VM_HUGETLB and at % PMD_PAGES:
        place = machine.names.place(vma.mm, at, at + 1)
        raise KernelError(_EINVAL, f"{place} lies inside of a huge page")
    yield from vma_adjust_trans_huge(machine, vma, at)
    upper = vm_area_dup(machine, vma, vma.mm, at, vma.end, vma.pgoff_of(at))
    anon_vma_clone(machine, upper, vma)
    return move_edges(machine, vma, vma.start, at), vma_at(machine, upper.row)


def change_vma_flags(
    machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int, flags: int
) -> Routine[Vma]:
    """Give a part of one mapping other flags: a neighbour takes it over, or it is cut out.

    Returns the mapping that holds the part now.
    """
    if flags == vma.flags:
        return vma
    pgoff = vma.pgoff_of(start)
    merged = yield from vma_merge(
        machine, vma.mm, prev, start, stop, flags, vma.anon_vma, pgoff, vma.file
    )
    if merged is None:
        if start != vma.start:
            _, vma = yield from split_vma(machine, vma, start)
        if stop != vma.end:
            vma, _ = yield from split_vma(machine, vma, stop)
    else:
        vma = merged
    machine.write("vma.flags", vma.row, flags)
    return vma_at(machine, vma.row)


def _is_mergeable_anon_vma(state: State, a: int, b: int, vma: Vma | None) -> bool:
    """Whether mappings with anon_vmas ``a`` and ``b`` may become one.

    A missing one is no obstacle, unless the neighbour ``vma`` came by fork or has none itself.
    """
    if (not a or not b) and (vma is None or is_singular(state, vma)):
        return True
    return a == b


def _can_merge(state: State, neighbour: Vma, flags: int, anon_vma: int, file: int) -> bool:
    return (
        not (neighbour.flags ^ flags) & ~VM_SOFTDIRTY
        and neighbour.file == file
        and _is_mergeable_anon_vma(state, anon_vma, neighbour.anon_vma, neighbour)
    )


def vma_merge(
    machine: Machine,
    mm: int,
    prev: Vma | None,
    start: int,
    end: int,
    flags: int,
    anon_vma: int,
    pgoff: int,
    file: int = 0,
) -> Routine[Vma | None]:
    """Let a neighbour take over pages ``start`` to ``end - 1``, which shall have these properties.

    ``prev`` is the mapping before, or the one that the pages are cut from when they are not its
    first. Returns the mapping that now holds them, or None when no neighbour fits.
    """
    if flags & VM_SPECIAL:
        return None
    mid = find_vma(machine, mm, prev.end if prev else 0)
    next_ = find_vma(machine, mm, mid.end) if mid and mid.end == end else mid
    with_prev = (
        prev is not None
        and prev.end == start
        and prev.pgoff_of(start) == pgoff
        and _can_merge(machine, prev, flags, anon_vma, file)
    )
    with_next = (
        next_ is not None
        and next_.start == end
        and next_.pgoff == pgoff + end - start
        and _can_merge(machine, next_, flags, anon_vma, file)
    )
    if (
        prev
        and next_
        and with_prev
        and with_next
        and _is_mergeable_anon_vma(machine, prev.anon_vma, next_.anon_vma, None)
    ):
        return (yield from _adjust(machine, prev, prev.start, next_.end))
    if prev and with_prev:
        return (yield from _adjust(machine, prev, prev.start, end))
    if next_ and with_next:
        return (yield from _adjust(machine, next_, start, next_.end))
    return None


def _adjust(machine: Machine, vma: Vma, start: int, end: int) -> Routine[Vma]:
    """Let ``vma`` grow over its neighbours, and take an anon_vma from them if it has none.

    Neighbours that are covered whole go away; one that is covered in part shrinks
    (``__vma_adjust``).
    """
    for other in list(vmas_in(machine, vma.mm, start, end)):
        if other.row == vma.row:
            continue
        if other.anon_vma and not vma.anon_vma:
            anon_vma_clone(machine, vma, other)
            vma = vma_at(machine, vma.row)
        if start <= other.start and other.end <= end:
            remove_vma(machine, other)
        elif other.start < start:
            yield from vma_adjust_trans_huge(machine, other, start)
            move_edges(machine, other, other.start, start)
        else:
            yield from vma_adjust_trans_huge(machine, other, end)
            move_edges(machine, other, end, other.end)
    return move_edges(machine, vma, start, end)
