"""What a page fault does.

:func:`handle_mm_fault` takes the pages of one mapping in one call: as many as the caller's loop may
take at once. Each page goes one of a few ways, and pages on different ways do not disturb each
other, so the ways are taken one after another, each for all of its pages.

Source: mm/memory.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import alike, all_of, any_of, some
from hmmlab.model.anon_vma import anon_vma_prepare
from hmmlab.model.copy_on_write import VmFault, born_dirty, do_wp_page
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    SWP_DEVICE_READ,
    Bools,
    Pfns,
    is_device_exclusive,
    is_device_private,
    is_present,
    is_swapped,
    marks_and_pfns,
    marks_of,
    present_word,
    swap_offset_pfn,
    swap_type,
)
from hmmlab.model.filemap import cached, device_file_of, read_pages
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.huge_memory import (
    do_huge_pmd_anonymous_pages,
    do_huge_pmd_wp_pages,
    hugepage_vma_check,
    leaders_of_blocks,
    will_be_huge,
)
from hmmlab.model.hugetlb import hugetlb_fault
from hmmlab.model.lru import mlock_new_pages
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.memremap import of_pagemap
from hmmlab.model.mm_types import VM_HUGETLB, VM_SHARED, Vma, mm_root, vm_page_prot, vma_at
from hmmlab.model.mmu_notifier import mm_has_notifiers
from hmmlab.model.page import PG_DIRTY, ZERO_PFN, page_rows, pfn_to_page, set_flags, some_rows
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_ref import get_page
from hmmlab.model.page_table import (
    alloc_tables,
    huge_blocks,
    look_at_range,
    read_range,
    rows_of,
    rows_of_range,
)
from hmmlab.model.rmap import page_add_file_rmap, page_add_new_anon_rmap
from hmmlab.model.rows import Rows, as_rows, row_numbers, unique_rows
from hmmlab.model.swap_fault import do_swap_page

__all__ = [
    "Faults",
    "brought_by_first_window",
    "commuting_faults",
    "fault_around_window",
    "handle_mm_fault",
]

#: Pages of the aligned window in which a read fault of a file maps what is cached.
FAULT_AROUND = 16


@dataclass(frozen=True, slots=True)
class Faults:
    """Calls of ``handle_mm_fault``: one for each of ``vpns`` (int64), in the kernel's order."""

    mm: int
    vpns: NDArray[np.int64]
    write: bool
    remote: bool


def commuting_faults(
    machine: Machine, vma: Vma, start: int, stop: int, write: bool
) -> Iterable[tuple[int, int]]:
    """Stretches of pages ``start`` to ``stop - 1`` whose faults may be taken kind after kind.

    Of each the same subscribers hear: a device does not hear that its own pages come home, and told
    in another order it would keep the sequence number of another event. And each reads from swap in
    one way: what is read ahead for a file's page depends on what came home before it.
    """
    if stop - start < 2:
        return ((start, stop),)
    cuts: set[int] = set()
    if mm_has_notifiers(machine, vma.mm):
        cuts.update(_changes_of_audience(machine, vma, start, stop, write))
    if vma.file and not vma.flags & VM_SHARED:
        cuts.update(_changes_of_store(machine, vma, start, stop))
    return pairwise([start, *sorted(cuts), stop])


def _changes_of_audience(
    machine: Machine, vma: Vma, start: int, stop: int, write: bool
) -> Iterable[int]:
    """Pages whose faults others hear of than of those before them."""
    words = look_at_range(machine, mm_root(machine, vma.mm), start, stop)
    marks = marks_of(words)
    private = is_device_private(marks)
    if not any_of(private):
        return ()
    pfns = swap_offset_pfn(some(words, private))
    kinds = 2 * of_pagemap(machine, "owner", pfns, pfn_to_page(machine, pfns))
    if write:
        kinds = kinds + (swap_type(some(marks, private)) == SWP_DEVICE_READ)  # copied besides
    if all_of(private) and alike(kinds).size == 1:
        return ()
    kind = is_device_exclusive(words).astype(kinds.dtype)  # of which all hear
    if write:
        kind |= is_present(words) & ((words & np.uint64(RW)) == 0)
    kind[np.broadcast_to(private, kind.shape)] = kinds
    return _changes(kind, start)


def _changes_of_store(machine: Machine, vma: Vma, start: int, stop: int) -> Iterable[int]:
    """Pages of a private mapping of a file: where its own in swap follow the file's, or precede."""
    words = look_at_range(machine, mm_root(machine, vma.mm), start, stop)
    mine = is_swapped(words)
    if not any_of(mine):
        return ()
    return _changes(mine + 2 * (words == 0), start)


def _changes(kind: NDArray[np.integer], start: int) -> Iterable[int]:
    """Pages, from ``start`` on, whose ``kind`` is not that of the last before them that has one."""
    telling = np.flatnonzero(kind)
    changes: list[int] = (start + telling[1:][np.diff(kind[telling]) != 0]).tolist()
    return changes


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
    if vma.flags & VM_HUGETLB:
        yield from _hugetlb_faults(machine, vma, vpns, write, remote)
        return
    root = mm_root(machine, vma.mm)
    vpns, lost = _up_to_bus_error(machine, vma, root, vpns)
    machine.called("handle_mm_fault", vpns.size - 1, up=1)
    low, high = int(vpns[0]), int(vpns[-1]) + 1
    yield machine.step(
        _fault_sentence(vpns, write, remote),
        vma.mm,
        low,
        high,
        detail=Faults(vma.mm, vpns, write, remote),
    )
    if hugepage_vma_check(vma) or any_of(huge_blocks(machine, root, vpns)):
        yield from _huge_faults(machine, vma, vpns, write)
    if high - low == vpns.size:
        alloc_tables(machine, root, low, high)
    else:
        for vpn in unique_rows(vpns >> 9).tolist():  # over page tables
            alloc_tables(machine, root, vpn << 9, (vpn << 9) + 1)
    rows = rows_of(machine, root, vpns)
    words = machine["pte"][rows].copy()
    marks, frames = marks_and_pfns(words)
    empty = marks == 0
    elsewhere = ~empty & ~is_present(marks)
    shielded = ~empty & ~elsewhere & ((marks & np.uint64(RW)) == 0) & write
    ready = ~(empty | elsewhere | shielded)
    if any_of(empty) and not lost:
        fill = do_anonymous_page if vma.is_anonymous else do_fault
        yield from fill(machine, vma, some(vpns, empty), some_rows(rows, empty), write)
    if any_of(elsewhere):
        yield from do_swap_page(
            machine,
            vma,
            some(vpns, elsewhere),
            some_rows(rows, elsewhere),
            some(words, elsewhere),
            some(marks, elsewhere),
            write,
            remote,
        )
    if any_of(shielded):
        faults = VmFault(vpns, rows, words, marks, frames)
        yield from do_wp_page(machine, vma, faults.only(shielded))
    if any_of(ready):
        young = ACCESSED | (DIRTY | SOFT_DIRTY if write else 0)
        there = some(vpns, ready)
        machine.write("pte", some_rows(rows, ready), some(words, ready) | np.uint64(young))
        _mark_alike(machine, root, there, young)
        yield machine.step(
            "{range}: there already, so only the age changes.",
            vma.mm,
            int(there[0]),
            int(there[-1]) + 1,
        )
    if lost:
        place = machine.names.place(vma.mm, high - 1, high)
        raise KernelError(0, f"{place}: the device has no page there", signal=7)


def _hugetlb_faults(
    machine: Machine, vma: Vma, vpns: Pfns, write: bool, remote: bool
) -> Routine[None]:
    """The first fault in 2 MiB brings the huge page; the others find it."""
    machine.called("handle_mm_fault", vpns.size - 1, up=1)
    cuts = np.flatnonzero(np.diff(vpns // PMD_PAGES)) + 1
    for block in np.split(vpns, cuts):
        done = True
        for part in (block[:1], block[1:]):
            if part.size:
                low, high = int(part[0]), int(part[-1]) + 1
                faults = Faults(vma.mm, part, write, remote)
                text = _fault_sentence(part, write, remote)
                yield machine.step(text, vma.mm, low, high, detail=faults)
                done = yield from hugetlb_fault(machine, vma, low, write)
            if not done:
                place = machine.names.place(vma.mm, low, high)
                raise KernelError(0, f"{place}: the pool has no huge page left", signal=7)


def _up_to_bus_error(machine: Machine, vma: Vma, root: int, vpns: Pfns) -> tuple[Pfns, bool]:
    """The faults up to the first that cannot be helped, and whether the last one is that."""
    if not device_file_of(machine, vma.file):
        return vpns, False
    words = read_range(machine, root, int(vpns[0]), int(vpns[-1]) + 1)[vpns - vpns[0]]
    if all_of(words):
        return vpns, False
    return vpns[: int(np.argmin(words != 0)) + 1], True


def _huge_faults(machine: Machine, vma: Vma, vpns: Pfns, write: bool) -> Routine[None]:
    """What faults do at the level of PMD words: fill with huge pages, or make those writable."""
    leaders = leaders_of_blocks(vpns, will_be_huge(machine, vma, vpns))
    if any_of(leaders):
        yield from do_huge_pmd_anonymous_pages(machine, vma, vpns[leaders], write)
    if not write:
        return
    vma = vma_at(machine, vma.row)
    root = mm_root(machine, vma.mm)
    huge = huge_blocks(machine, root, vpns)
    if any_of(huge):
        words = np.zeros(vpns.size, np.uint64)
        words[huge] = machine["pte"][row_numbers(rows_of(machine, root, vpns[huge]))]
        shielded = leaders_of_blocks(vpns, huge & ((words & RW) == 0))
        if any_of(shielded):
            yield from do_huge_pmd_wp_pages(machine, vma, vpns[shielded], vpns[shielded])


def _mark_alike(machine: Machine, root: int, vpns: Pfns, marks: int) -> None:
    """Words that one PMD word stands for stay alike."""
    huge = some(vpns, huge_blocks(machine, root, vpns))
    for first in (np.unique(huge // PMD_PAGES) * PMD_PAGES).tolist():  # over page tables
        rows = rows_of_range(machine, root, first, first + PMD_PAGES)
        machine.write("pte", rows, machine["pte"][rows] | np.uint64(marks))


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
    pfns, pages = alloc_pages(machine, vpns.size)
    page_add_new_anon_rmap(machine, pfns, vma, vpns, rows=pages)
    mlock_new_pages(machine, pfns, vma)
    machine.write("pte", rows, present_word(pfns, born_dirty(vma, prot)))
    yield machine.step(
        "First touch of {range} was a write: a new frame of zeros is mapped.", vma.mm, first, last
    )


@kernel("mm/memory.c")
def do_fault(machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, write: bool) -> Routine[None]:
    """Fill empty words of a file mapping: with the file's pages, or for a private write a copy."""
    pages = vma.pgoff_of(0) + vpns
    first, last = int(vpns[0]), int(vpns[-1]) + 1
    if not write:
        _fault_around(machine, vma, vpns)
    pfns = read_pages(machine, vma.file, pages)
    prot = vm_page_prot(vma.flags)
    if write and not vma.flags & VM_SHARED:
        vma = anon_vma_prepare(machine, vma)
        content = machine["page.content"][page_rows(machine, pfns)]
        pfns, new = alloc_pages(machine, vpns.size, content=content)
        page_add_new_anon_rmap(machine, pfns, vma, vpns, rows=new)
        mlock_new_pages(machine, pfns, vma)
        how = "a write to a private page of a file: a copy of its own is mapped."
    else:
        get_page(machine, pfns)
        page_add_file_rmap(machine, pfns, vma)
        if write:
            set_flags(machine, pfns, PG_DIRTY)
        how = "the file's page is mapped."
    words = present_word(pfns, born_dirty(vma, prot) if write else prot)
    machine.write("pte", rows, words)
    yield machine.step(f"First touch of {{range}} was {how}", vma.mm, first, last)


def fault_around_window(vma: Vma, vpns: Pfns) -> tuple[Pfns, Pfns]:
    """First page, and page past the last, that a read fault on each of ``vpns`` of a file maps.

    Sixteen pages from an aligned one on, or from the mapping's first; no further than the mapping
    and the page table go (``do_fault_around``).
    """
    low = np.maximum(vpns & -FAULT_AROUND, vma.start)
    table = (low & -PMD_PAGES) + PMD_PAGES
    return low, np.minimum(np.minimum(low + FAULT_AROUND, table), vma.end)


def brought_by_first_window(machine: Machine, vma: Vma, vpns: Pfns, empty: Bools) -> Bools:
    """Which ``empty`` ones of ``vpns`` (ascending) are there once those before them have faulted.

    A window that begins at the mapping's first page, unaligned, reaches into the next one.
    """
    low, high = fault_around_window(vma, vpns)
    first = empty & (low == vma.start)
    reach = int(high[first][0]) if first.any() else vma.start
    brought = empty & (low > vma.start) & (vpns < reach)
    if brought.any():
        brought &= cached(machine, vma.file, vma.pgoff_of(0) + vpns) > 0
    return brought


def _fault_around(machine: Machine, vma: Vma, vpns: Pfns) -> None:
    """Map what the cache has around each of ``vpns`` (``filemap_map_pages``)."""
    faulting = ~brought_by_first_window(machine, vma, vpns, np.ones(vpns.size, np.bool_))
    low, high = fault_around_window(vma, vpns[faulting])
    low, unique = np.unique(low, return_index=True)
    around = (low[:, None] + np.arange(FAULT_AROUND)).ravel()
    around = np.unique(around[around < np.repeat(high[unique], FAULT_AROUND)])
    around = around[~np.isin(around, vpns)]
    frames = cached(machine, vma.file, vma.pgoff_of(0) + around)
    around, frames = around[frames > 0], frames[frames > 0]
    if not around.size:
        return
    rows = row_numbers(rows_of(machine, mm_root(machine, vma.mm), around))
    empty = machine["pte"][rows] == 0
    rows, frames = rows[empty], frames[empty]
    get_page(machine, frames)
    page_add_file_rmap(machine, frames, vma)
    machine.write("pte", as_rows(rows), present_word(frames, vm_page_prot(vma.flags)))
