"""What a page fault does, and how a range is emptied.

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

from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    SWP_DEVICE_READ,
    SWP_EXCLUSIVE,
    SWP_SOFT_DIRTY,
    Pfns,
    Words,
    is_device_exclusive,
    is_device_private,
    is_migration,
    is_present,
    is_swapped,
    pfn_of,
    present_word,
    repeats_device_private,
    swap_offset,
    swap_offset_pfn,
    swap_type,
)
from hmmlab.model.exclusive import remove_device_exclusive_entries
from hmmlab.model.filemap import cached, device_file_of, read_pages
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.huge_memory import (
    do_huge_pmd_anonymous_pages,
    do_huge_pmd_wp_pages,
    hugepage_vma_check,
    leaders_of_blocks,
    split_huge_pmds_across,
    will_be_huge,
)
from hmmlab.model.hugetlb import hugetlb_fault, unmap_hugepage_range
from hmmlab.model.lru import lru_add_drain
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_HUGETLB,
    VM_LOCKED,
    VM_SHARED,
    VM_WRITE,
    Vma,
    anon_vma_prepare,
    mm_root,
    vm_page_prot,
    vma_at,
)
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
    mm_has_notifiers,
)
from hmmlab.model.page import (
    PG_ANON,
    PG_ANON_EXCLUSIVE,
    PG_DIRTY,
    PG_KSM,
    PG_LRU,
    PG_SWAPBACKED,
    ZERO_PFN,
    alloc_pages,
    as_rows,
    frames_of,
    get_page,
    of_pagemap,
    page_mapping,
    page_rows,
    pagemap_of,
    pfn_to_page,
    put_page,
    set_flags,
)
from hmmlab.model.page_table import (
    alloc_tables,
    drop_table,
    huge_blocks,
    read_range,
    rows_of,
    rows_of_range,
    walk,
)
from hmmlab.model.rmap import (
    page_add_anon_rmap,
    page_add_file_rmap,
    page_add_new_anon_rmap,
    page_remove_rmap,
)
from hmmlab.model.state import Rows, are_unique, row_numbers, some, unique_rows
from hmmlab.model.swap import (
    folio_free_swap,
    free_swap_and_cache,
    free_swap_cache,
    note_swap_cache_hits,
    swap_free,
    swap_vma_window,
    swapin_readahead,
)
from hmmlab.model.tlb import MmuGather, ptep_clear_flush_notify

__all__ = [
    "FAULT_FLAG_REMOTE",
    "FAULT_FLAG_WRITE",
    "Faults",
    "audiences",
    "do_swap_page",
    "fault_around_window",
    "handle_mm_fault",
    "unmap_page_range",
    "unmap_single_vma",
]

#: What a driver is told of the fault that brings its page home (``enum fault_flag``).
FAULT_FLAG_WRITE, FAULT_FLAG_REMOTE = 1 << 0, 1 << 7

#: Pages of the aligned window in which a read fault of a file maps what is cached.
FAULT_AROUND = 16


@dataclass(frozen=True, slots=True)
class Faults:
    """Calls of ``handle_mm_fault``: one for each of ``vpns`` (int64), in the kernel's order."""

    mm: int
    vpns: NDArray[np.int64]
    write: bool
    remote: bool


def audiences(
    machine: Machine, vma: Vma, start: int, stop: int, write: bool
) -> Iterable[tuple[int, int]]:
    """Stretches of pages ``start`` to ``stop - 1`` whose faults the same subscribers hear of.

    A device does not hear that its own pages come home. Told kind after kind, it would keep the
    sequence number of another event than page after page; so such faults are taken at once only
    with their likes.
    """
    if stop - start < 2 or not mm_has_notifiers(machine, vma.mm):
        return ((start, stop),)
    words = read_range(machine, mm_root(machine, vma.mm), start, stop)
    private = is_device_private(words)
    if not private.any():
        return ((start, stop),)
    entries = some(words, private)
    kinds = 2 * of_pagemap(machine, "owner", swap_offset_pfn(entries))
    if write:
        kinds += swap_type(entries) == SWP_DEVICE_READ  # to be copied besides
    if private.all() and (kinds == kinds[0]).all():
        return ((start, stop),)
    kind = is_device_exclusive(words).astype(kinds.dtype)  # of which all hear
    if write:
        kind |= is_present(words) & ((words & np.uint64(RW)) == 0)
    kind[private] = kinds
    telling = np.flatnonzero(kind)
    cuts = start + telling[1:][np.diff(kind[telling]) != 0]
    return pairwise([start, *cuts.tolist(), stop])


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
    if hugepage_vma_check(vma) or huge_blocks(machine, root, vpns).any():
        yield from _huge_faults(machine, vma, vpns, write)
    if high - low == vpns.size:
        alloc_tables(machine, root, low, high)
    else:
        for vpn in unique_rows(vpns >> 9).tolist():  # over page tables
            alloc_tables(machine, root, vpn << 9, (vpn << 9) + 1)
    rows = rows_of(machine, root, vpns)
    words = machine["pte"][rows].copy()
    empty = words == 0
    if empty.all() and not lost:
        first_touch = do_anonymous_page if vma.is_anonymous else do_fault
        yield from first_touch(machine, vma, vpns, rows, write)
        return
    elsewhere = ~empty & ~is_present(words)
    shielded = ~empty & ~elsewhere & ((words & RW) == 0) if write else np.zeros_like(empty)
    ready = ~(empty | elsewhere | shielded)
    if empty.any() and not lost:
        fill = do_anonymous_page if vma.is_anonymous else do_fault
        yield from fill(machine, vma, some(vpns, empty), _some(rows, empty), write)
    if elsewhere.any():
        yield from do_swap_page(
            machine,
            vma,
            some(vpns, elsewhere),
            _some(rows, elsewhere),
            some(words, elsewhere),
            write,
            remote,
        )
    if shielded.any():
        yield from do_wp_page(
            machine, vma, some(vpns, shielded), _some(rows, shielded), some(words, shielded)
        )
    if ready.any():
        marks = ACCESSED | (DIRTY | SOFT_DIRTY if write else 0)
        machine.write("pte", _some(rows, ready), words[ready] | np.uint64(marks))
        _mark_alike(machine, root, vpns[ready], marks)
        yield machine.step(
            "{range}: there already, so only the age changes.",
            vma.mm,
            int(vpns[ready][0]),
            int(vpns[ready][-1]) + 1,
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
    if words.all():
        return vpns, False
    return vpns[: int(np.argmin(words != 0)) + 1], True


def _huge_faults(machine: Machine, vma: Vma, vpns: Pfns, write: bool) -> Routine[None]:
    """What faults do at the level of PMD words: fill with huge pages, or make those writable."""
    leaders = leaders_of_blocks(vpns, will_be_huge(machine, vma, vpns))
    if leaders.any():
        yield from do_huge_pmd_anonymous_pages(machine, vma, vpns[leaders], write)
    if not write:
        return
    vma = vma_at(machine, vma.row)
    root = mm_root(machine, vma.mm)
    huge = huge_blocks(machine, root, vpns)
    if huge.any():
        words = np.zeros(vpns.size, np.uint64)
        words[huge] = machine["pte"][row_numbers(rows_of(machine, root, vpns[huge]))]
        shielded = leaders_of_blocks(vpns, huge & ((words & RW) == 0))
        if shielded.any():
            yield from do_huge_pmd_wp_pages(machine, vma, vpns[shielded], vpns[shielded])


def _mark_alike(machine: Machine, root: int, vpns: Pfns, marks: int) -> None:
    """Words that one PMD word stands for stay alike."""
    huge = vpns[huge_blocks(machine, root, vpns)]
    for first in (np.unique(huge // PMD_PAGES) * PMD_PAGES).tolist():  # over page tables
        rows = rows_of_range(machine, root, first, first + PMD_PAGES)
        machine.write("pte", rows, machine["pte"][rows] | np.uint64(marks))


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
        _fault_around(machine, vma, vpns)
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


def fault_around_window(vma: Vma, vpns: Pfns) -> tuple[Pfns, Pfns]:
    """First page, and page past the last, that a read fault on each of ``vpns`` of a file maps.

    Sixteen pages from an aligned one on, or from the mapping's first; no further than the mapping
    and the page table go (``do_fault_around``).
    """
    low = np.maximum(vpns & -FAULT_AROUND, vma.start)
    table = (low & -PMD_PAGES) + PMD_PAGES
    return low, np.minimum(np.minimum(low + FAULT_AROUND, table), vma.end)


def _fault_around(machine: Machine, vma: Vma, vpns: Pfns) -> None:
    """Map what the cache has around each of ``vpns`` (``filemap_map_pages``)."""
    low, high = fault_around_window(vma, vpns)
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
    page_add_file_rmap(machine, frames)
    machine.write("pte", as_rows(rows), present_word(frames, vm_page_prot(vma.flags)))


def _born_dirty(vma: Vma, prot: int) -> int:
    return prot | DIRTY | SOFT_DIRTY | RW if vma.flags & VM_WRITE else prot


@kernel("mm/memory.c")
def do_wp_page(machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, words: Words) -> Routine[None]:
    """A write to pages that are present and not writable: reuse the frame, or copy it."""
    normal = (words & np.uint64(SPECIAL)) == 0
    frames = pfn_of(words)
    if not normal.all():
        frames = np.where(normal, frames, ZERO_PFN)
    at = pfn_to_page(machine, frames)
    flags = machine["page.flags"][at]
    anon = normal & ((flags & np.uint32(PG_ANON)) != 0)
    exclusive = anon & ((flags & np.uint32(PG_ANON_EXCLUSIVE)) != 0)
    alone = anon & ~exclusive & ((flags & np.uint32(PG_KSM)) == 0)
    _give_up_swap(machine, some(frames, alone))
    alone &= _folio_ref_count(machine, at) == 1
    shared = normal & ~anon & bool(vma.flags & VM_SHARED)
    if shared.any():  # wp_page_shared
        set_flags(machine, frames[shared], PG_DIRTY)
    reuse = exclusive | alone | shared
    if alone.any():  # page_move_anon_rmap: the last one left owns it from now on
        set_flags(machine, frames[alone], PG_ANON_EXCLUSIVE)
        machine.write("page.mapping", _some(at, alone), vma.anon_vma)
    if reuse.any():
        marks = np.uint64(ACCESSED | DIRTY | SOFT_DIRTY | (RW if vma.flags & VM_WRITE else 0))
        machine.write("pte", _some(rows, reuse), some(words, reuse) | marks)
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
        yield from wp_page_copy(
            machine, vma, some(vpns, copy), _some(rows, copy), some(words, copy)
        )


def _folio_ref_count(machine: Machine, rows: Rows) -> NDArray[np.int32]:
    """References to the pages, those to all of its frames for part of a huge page."""
    counts: NDArray[np.int32] = machine["page.refcount"][rows].copy()
    compound = machine["page.compound"][rows]
    if compound.any():
        parts = np.flatnonzero(compound)
        heads, which = np.unique(compound[parts], return_inverse=True)
        frames = frames_of(heads).reshape(heads.size, PMD_PAGES)
        mine = machine["page.compound"][frames] != 0  # some may be free, and used for other things
        counts[parts] = (machine["page.refcount"][frames] * mine).sum(axis=1)[which]
    return counts


def _give_up_swap(machine: Machine, pfns: Pfns) -> None:
    """Take frames out of the swap cache where only that and one mapping hold them."""
    rows = pfn_to_page(machine, pfns)
    cached = machine["page.swap"][rows] != 0
    if cached.any():
        mine = cached & (machine["page.refcount"][rows] == 2)
        folio_free_swap(machine, unique_rows(pfns[mine]))


@kernel("mm/memory.c")
def wp_page_copy(machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, words: Words) -> Routine[None]:
    """Copy on write: each page gets a frame of its own, inside a CLEAR of that page.

    Where the word has changed since ``words`` was read, the copy is given up (``pte_same``).
    """
    vma = anon_vma_prepare(machine, vma)
    normal = (words & np.uint64(SPECIAL)) == 0
    old = pfn_of(words)
    at = pfn_to_page(machine, old)
    new = alloc_pages(machine, vpns.size)
    machine.write("page.content", as_rows(new), machine["page.content"][at])
    range = MmuNotifierRange.each(vma.mm, Event.CLEAR, vpns, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    same = machine["pte"][rows] == words
    if not same.all():
        put_page(machine, new[~same])
        if not same.any():
            yield from invalidate_range_end(machine, range)
            return
        vpns, rows, old, new, normal = (
            vpns[same],
            _some(rows, same),
            old[same],
            new[same],
            normal[same],
        )
        at = pfn_to_page(machine, old)
    set_flags(machine, new, PG_LRU)
    ptep_clear_flush_notify(machine, vma.mm, vpns.size)
    page_add_new_anon_rmap(machine, new, vma, vpns)
    machine.write("pte", rows, present_word(new, _born_dirty(vma, vm_page_prot(vma.flags))))
    if not normal.all():
        old = old[normal]
        at = pfn_to_page(machine, old)
    page_remove_rmap(machine, old, rows=at)
    yield machine.step(
        "A frame of its own for {range}: "
        + ("the old one keeps its readers." if normal.all() else "so far it was the zero page."),
        vma.mm,
        int(vpns[0]),
        int(vpns[-1]) + 1,
    )
    yield from invalidate_range_end(machine, range)
    put_page(machine, old, at)
    cached = machine["page.swap"][at] != 0
    if cached.any():
        free_swap_cache(machine, unique_rows(old[cached]))


@kernel("mm/memory.c")
def do_swap_page(
    machine: Machine,
    vma: Vma,
    vpns: Pfns,
    rows: Rows,
    words: Words,
    write: bool,
    remote: bool = False,
) -> Routine[None]:
    """A fault on entries that are neither empty nor present."""
    private = is_device_private(words)
    if not private.all():
        words = yield from _migration_entry_wait(machine, vma, vpns, rows, words)
        exclusive = is_device_exclusive(words)
        if exclusive.any():
            yield from remove_device_exclusive_entries(
                machine, vma, vpns[exclusive], row_numbers(rows)[exclusive]
            )
        private = is_device_private(words)
    pfns, at = swap_offset_pfn(some(words, private)), some(vpns, private)
    if not are_unique(pfns):  # the first fault brings a shared page home for all
        first = ~repeats_device_private(words)[private]
        pfns, at = pfns[first], at[first]
    if pfns.size:
        maps = pagemap_of(machine, pfns)
        for pagemap in unique_rows(maps).tolist():
            mine = maps == pagemap
            theirs = some(pfns, mine)
            pages = pfn_to_page(machine, theirs)
            get_page(machine, theirs, pages)
            ops = machine.objects["pagemap"][pagemap]
            try:
                flags = (FAULT_FLAG_WRITE if write else 0) | (FAULT_FLAG_REMOTE if remote else 0)
                yield from ops.migrate_to_ram(machine, vma, some(at, mine), theirs, flags)
            finally:
                put_page(machine, theirs, pages)
    if private.all():
        return
    swapped = is_swapped(words)
    if swapped.any():
        at = row_numbers(rows)[swapped]
        yield from _swap_in(machine, vma, vpns[swapped], at, words[swapped], write)


def _migration_entry_wait(
    machine: Machine, vma: Vma, vpns: Pfns, rows: Rows, words: Words
) -> Routine[Words]:
    """Wait until none of some words is a migration entry; returns the words then."""
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
        moving = is_migration(words)
    return words


def _swap_in(
    machine: Machine, vma: Vma, vpns: Pfns, rows: Pfns, words: Words, write: bool
) -> Routine[None]:
    """Map what is in swap, as far as one read from swap goes, and then as far as the next.

    A page must be read into the swap cache when others share its slot; how far such a read goes
    ahead depends on what became of the reads before it, so they follow one another.
    """
    at = 0
    while at < vpns.size:
        slots = swap_offset(words[at:])
        shared = (machine["swap.count"][slots] > 1) & (machine["swap.cache"][slots] == 0)
        ready = int(np.argmax(shared)) if shared.any() else slots.size
        if ready:
            part = slice(at, at + ready)
            hits = machine["swap.cache"][slots[:ready]]
            if hits.any():
                last = int(vpns[part][hits > 0][-1])
                note_swap_cache_hits(machine, hits[hits > 0], vma.row, last)
            yield from _map_swapped(machine, vma, vpns[part], rows[part], words[part], write)
        else:
            low, high = swap_vma_window(machine, vma.row, int(vpns[at]))
            around = read_range(machine, mm_root(machine, vma.mm), low, high)
            ahead = swap_offset(around[is_swapped(around)])
            swapin_readahead(machine, np.append(ahead, slots[0]), int(slots[0]))
            if ahead.size:
                lru_add_drain(machine)
            part = slice(at, at + 1)
            yield from _map_swapped(machine, vma, vpns[part], rows[part], words[part], write)
        at = part.stop


def _map_swapped(
    machine: Machine, vma: Vma, vpns: Pfns, rows: Pfns, words: Words, write: bool
) -> Routine[None]:
    """Map pages from the swap cache, or read them into frames of their own."""
    slots = swap_offset(words)
    pfns = machine["swap.cache"][slots]
    fresh = pfns == 0
    if fresh.any():
        new = alloc_pages(machine, int(fresh.sum()))
        machine.write("page.content", as_rows(new), machine["swap.content"][slots[fresh]])
        set_flags(machine, new, PG_LRU | PG_SWAPBACKED)
        pfns[fresh] = new
    get_page(machine, pfns[~fresh])  # the mapping's; a fresh frame has it from the start
    swap_free(machine, slots)
    if vma.flags & VM_LOCKED:  # what stays in RAM needs no place in swap
        folio_free_swap(machine, unique_rows(pfns[~fresh]))
    elif write:
        _give_up_swap(machine, pfns)
    alone = fresh | ((words & SWP_EXCLUSIVE) != 0) | (machine["page.refcount"][pfns] == 1)
    mapped = present_word(pfns, vm_page_prot(vma.flags))
    mapped |= np.where((words & SWP_SOFT_DIRTY) != 0, np.uint64(SOFT_DIRTY), np.uint64(0))
    if write:
        marks = DIRTY | SOFT_DIRTY | (RW if vma.flags & VM_WRITE else 0)
        mapped |= np.where(alone, np.uint64(marks), np.uint64(0))
    page_add_anon_rmap(machine, pfns, vma, vpns, alone)
    machine.write("pte", as_rows(rows), mapped)
    yield machine.step("{range} come{s} back from swap.", vma.mm, int(vpns[0]), int(vpns[-1]) + 1)
    if write and not alone.all():
        yield from do_wp_page(machine, vma, vpns[~alone], as_rows(rows[~alone]), mapped[~alone])


# --- zap ------------------------------------------------------------------------------------------


def unmap_single_vma(
    machine: Machine, tlb: MmuGather, vma: Vma, start: int, stop: int, *, even_cows: bool = True
) -> Routine[None]:
    """Empty a part of one mapping, of huge pages or of others."""
    if vma.flags & VM_HUGETLB:
        yield from unmap_hugepage_range(machine, tlb, vma, start, stop)
    else:
        yield from unmap_page_range(machine, tlb, vma, start, stop, even_cows=even_cows)


@kernel("mm/memory.c")
def unmap_page_range(
    machine: Machine, tlb: MmuGather, vma: Vma, start: int, stop: int, *, even_cows: bool = True
) -> Routine[None]:
    """Empty the words of pages ``start`` to ``stop - 1``; what they mapped waits in ``tlb``.

    Without ``even_cows``, pages of a file go and private copies of them stay.
    """
    root = mm_root(machine, vma.mm)
    yield from split_huge_pmds_across(machine, vma, (start, stop))
    for run in list(walk(machine, root, start, stop)):
        if run.row < 0:
            continue
        words = machine["pte"][run.row : run.row + run.stop - run.start]
        used = np.flatnonzero(words)
        if not even_cows:
            frames = page_rows(machine, np.where(is_present(words), pfn_of(words), 0))
            anon = (machine["page.flags"][frames] & PG_ANON) != 0
            used = np.flatnonzero((words != 0) & is_present(words) & ~anon)
        parts = [(0, used.size)] if run.huge and used.size else machine.chunks(0, used.size)
        for first, last in parts:
            part = used[first:last]
            yield from _zap(machine, tlb, vma, run.row, run.start, part, huge=run.huge)
        if run.huge:
            for first in np.arange(run.start, run.stop, PMD_PAGES).tolist():  # over page tables
                drop_table(machine, root, first)


def _zap(
    machine: Machine,
    tlb: MmuGather,
    vma: Vma,
    row: int,
    start: int,
    used: NDArray[np.int64],
    *,
    huge: bool,
) -> Routine[None]:
    """Empty the words of pages ``start + used``, whose rows are ``row + used``.

    Of ``huge`` words these are whole PMD words, which have one mapping each.
    """
    rows = as_rows(row + used)
    words = machine["pte"][rows].copy()
    present = is_present(words)
    normal = present & ((words & SPECIAL) == 0)
    private = exclusive = absent = ~present
    named = pfn_of(words)
    if absent.any():
        private = absent & is_device_private(words)
        exclusive = absent & is_device_exclusive(words)
        named = np.where(present, named, swap_offset_pfn(words))
    machine.write("pte", rows, 0)
    held = normal | private
    dirty = named[normal & ((words & DIRTY) != 0)]
    dirty = dirty[page_mapping(machine, dirty)]
    if dirty.size:
        set_flags(machine, unique_rows(dirty), PG_DIRTY)
    page_remove_rmap(machine, named if held.all() else named[held], huge=huge)
    if present.any():
        tlb.remove_pages(named if normal.all() else named[normal], huge=huge)
    if private.any():
        put_page(machine, named[private])
    if exclusive.any():  # mapped nowhere, but held
        put_page(machine, swap_offset_pfn(words[exclusive]))
    swapped = is_swapped(words) if absent.any() else absent
    if swapped.any():
        free_swap_and_cache(machine, swap_offset(words[swapped]))
    first, last = start + int(used[0]), start + int(used[-1]) + 1
    yield machine.step("{range}: no longer mapped.", vma.mm, first, last)
