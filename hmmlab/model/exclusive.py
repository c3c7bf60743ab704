"""Pages that a device has to itself for atomic operations, while they stay in RAM.

The CPU's word becomes a device-exclusive entry, so that the next touch by the CPU faults and takes
the page back. Nothing maps the page meanwhile; the entry keeps the reference.

Source: mm/rmap.c (``make_device_exclusive_range``), mm/memory.c (``restore_exclusive_pte``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    PRESENT,
    RW,
    SOFT_DIRTY,
    SWP_DEVICE_EXCLUSIVE_READ,
    SWP_DEVICE_EXCLUSIVE_WRITE,
    SWP_SOFT_DIRTY,
    Bools,
    Pfns,
    is_device_exclusive,
    is_present,
    present_word,
    swap_offset_pfn,
    swap_type,
    swap_word,
)
from hmmlab.model.hugetlb import is_hugetlb
from hmmlab.model.lru import mlock_pages
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_LOCKED, VM_WRITE, Vma, vm_page_prot
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import PG_ANON, PG_DIRTY, PG_LOCKED, frames_of, page_rows, set_flags
from hmmlab.model.rmap import (
    huge_page_mappings,
    page_add_anon_rmap,
    page_remove_rmap,
    rmap_walk,
)
from hmmlab.model.rows import Rows, as_rows, row_numbers, unique_rows

__all__ = ["make_device_exclusive", "remove_device_exclusive_entries", "restore_exclusive_ptes"]


def make_device_exclusive(
    machine: Machine, mm: int, vpns: Pfns, pfns: Pfns, owner: int
) -> Routine[Bools]:
    """Put device-exclusive entries in place of all that maps ``pfns``, one page after another.

    Each mapping that could hold a page hears EXCLUSIVE of it, until nothing maps the page. Returns
    which pages are the caller's now: private ones that were writable at their page ``vpns`` of
    ``mm``, and are mapped nowhere. They are locked.
    """
    rows = page_rows(machine, pfns)
    flags, heads = machine["page.flags"][rows], machine["page.compound"][rows]
    usable = ((flags & PG_ANON) != 0) & ((flags & PG_LOCKED) == 0)
    usable &= ~is_hugetlb(machine, rows)
    usable &= (heads == 0) | (heads == pfns)  # a huge page is asked for by its head
    valid = np.zeros(pfns.size, np.bool_)
    numbers = np.flatnonzero(usable)
    for first, last in machine.chunks(0, numbers.size):
        part = numbers[first:last]
        with machine.bulk(part.size):
            small = part[heads[part] == 0]
            if small.size:
                valid[small] = yield from _make_exclusive(
                    machine, mm, vpns[small], pfns[small], owner
                )
            for number in part[heads[part] != 0].tolist():  # over huge pages
                valid[number] = yield from _make_huge_exclusive(
                    machine, mm, int(vpns[number]), int(pfns[number]), owner
                )
    return valid


def _make_huge_exclusive(
    machine: Machine, mm: int, vpn: int, head: int, owner: int
) -> Routine[bool]:
    """All that maps part of a huge page becomes exclusive with its head.

    The walk ends at the first word that is exclusive already, and the mappings behind it do not
    hear.
    """
    pfns = frames_of(np.array([head]))
    pfns = pfns[machine["page.compound"][pfns] == head]
    found = rmap_walk(machine, pfns)
    valid = False
    for vma, low, high in huge_page_mappings(machine, pfns):
        order = np.array([vpn])
        range = MmuNotifierRange.one(
            vma.mm, Event.EXCLUSIVE, low, high, owner=owner, vma=vma.row, order=order
        )
        yield from invalidate_range_start(machine, range)
        place = found.only(found.maps & (found.vma == vma.row))
        present = np.logical_and.accumulate(is_present(machine["pte"][place.row]))
        mine = place.only(present)
        writable = _name_as_exclusive(machine, pfns[mine.which], mine.row)
        valid |= vma.mm == mm and bool(writable[mine.vpn == vpn].any())
        yield machine.step(
            "The words of {range} name parts of a huge page that the device has to itself.",
            vma.mm,
            low,
            high,
        )
        yield from invalidate_range_end(machine, range)
        mapped = (machine["page.mapcount"][pfns] > 0).any()
        if not present.all() or not mapped:
            break
    if not valid or (machine["page.mapcount"][pfns] > 0).any():
        return False
    set_flags(machine, pfns[:1], PG_LOCKED)
    return True


def _make_exclusive(
    machine: Machine, mm: int, vpns: Pfns, pfns: Pfns, owner: int
) -> Routine[Bools]:
    valid = np.zeros(pfns.size, np.bool_)
    over = np.zeros(pfns.size, np.bool_)
    found = rmap_walk(machine, pfns).until_unmapped()
    for vma, place in found.by_vma():
        where = int(machine["vma.mm"][vma])
        place = place.only(~over[place.which])
        if not place.which.size:
            continue
        range = MmuNotifierRange.each(
            where, Event.EXCLUSIVE, place.vpn, owner=owner, vma=vma, order=vpns[place.which]
        )
        yield from invalidate_range_start(machine, range)
        mapped = place.only(place.maps)
        present = is_present(machine["pte"][mapped.row])
        over[mapped.which[~present]] = True
        mapped = mapped.only(present)
        writable = _name_as_exclusive(machine, pfns[mapped.which], mapped.row)
        if machine["vma.flags"][vma] & VM_LOCKED:
            mlock_pages(machine, pfns[mapped.which])
        expected = (vpns[mapped.which] == mapped.vpn) & (where == mm)
        valid[mapped.which[expected & writable]] = True
        yield machine.step(
            "The words of {range} name pages that the device has to itself.",
            where,
            int(place.vpn.min()),
            int(place.vpn.max()) + 1,
        )
        yield from invalidate_range_end(machine, range)
    valid &= machine["page.mapcount"][page_rows(machine, pfns)] == 0
    if valid.any():
        set_flags(machine, pfns[valid], PG_LOCKED)
    return valid


def _name_as_exclusive(machine: Machine, pfns: Pfns, rows: NDArray[np.int64]) -> Bools:
    """Put exclusive entries in place of present words; returns which were writable."""
    words = machine["pte"][rows]
    writable: Bools = (words & RW) != 0
    dirty = pfns[(words & DIRTY) != 0]
    if dirty.size:
        set_flags(machine, unique_rows(dirty), PG_DIRTY)
    kinds = np.where(writable, SWP_DEVICE_EXCLUSIVE_WRITE, SWP_DEVICE_EXCLUSIVE_READ)
    marks = np.where((words & SOFT_DIRTY) != 0, np.uint64(SWP_SOFT_DIRTY), np.uint64(0))
    machine.write("pte", rows, swap_word(kinds, pfns) | marks)
    every = np.ones(pfns.size, np.bool_)
    machine.called_in_turn(("flush_tlb_mm_range", every), ("page_remove_rmap", every))
    page_remove_rmap(machine, pfns, noted=True)
    return writable


def restore_exclusive_ptes(machine: Machine, vma: Vma, vpns: Rows, rows: Rows) -> None:
    """Let words of ``vpns`` that are device-exclusive entries map their pages again.

    Old, and writable only where the entry and the mapping both are.
    """
    entries = machine["pte"][rows]
    if np.bitwise_and.reduce(entries) & np.uint64(PRESENT):
        return
    mine = is_device_exclusive(entries)
    if not mine.any():
        return
    entries, pfns = entries[mine], swap_offset_pfn(entries[mine])
    writable = swap_type(entries) == SWP_DEVICE_EXCLUSIVE_WRITE
    prot = np.uint64(vm_page_prot(vma.flags) & ~ACCESSED)
    marks = np.where((entries & SWP_SOFT_DIRTY) != 0, np.uint64(SOFT_DIRTY), np.uint64(0))
    rights = DIRTY | SOFT_DIRTY | (RW if vma.flags & VM_WRITE else 0)
    marks |= np.where(writable, np.uint64(rights), np.uint64(0))
    back = row_numbers(vpns)[mine]
    page_add_anon_rmap(machine, pfns, vma, back, np.zeros(pfns.size, np.bool_))
    machine.write("pte", as_rows(row_numbers(rows)[mine]), present_word(pfns, int(prot)) | marks)


@kernel("mm/memory.c")
def remove_device_exclusive_entries(
    machine: Machine, vma: Vma, vpns: Pfns, rows: NDArray[np.int64]
) -> Routine[None]:
    """The CPU takes pages back, each inside an EXCLUSIVE of it that names no owner."""
    range = MmuNotifierRange.each(vma.mm, Event.EXCLUSIVE, vpns, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    restore_exclusive_ptes(machine, vma, vpns, rows)
    yield machine.step(
        "{range} {are} mapped again, and no longer the device's alone.",
        vma.mm,
        int(vpns[0]),
        int(vpns[-1]) + 1,
    )
    yield from invalidate_range_end(machine, range)
