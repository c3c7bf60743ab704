"""Reclaim: pages of RAM are unmapped, written to swap and freed.

Source: mm/vmscan.c (``shrink_folio_list``), mm/rmap.c (``try_to_unmap``), mm/shmem.c
(``shmem_writepage``).
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import (
    DIRTY,
    SOFT_DIRTY,
    SWP_EXCLUSIVE,
    SWP_SOFT_DIRTY,
    Bools,
    Pfns,
    is_present,
    swap_word,
)
from hmmlab.model.filemap import drop_from_cache, swap_out_of_cache
from hmmlab.model.huge_memory import split_huge_pmds_at
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import vma_at
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
    PG_SWAPBACKED,
    folio_maybe_dma_pinned,
    page_mapping,
    set_flags,
)
from hmmlab.model.page_ref import put_page
from hmmlab.model.rmap import page_remove_rmap, rmap_walk
from hmmlab.model.rows import as_rows, unique_rows
from hmmlab.model.swap import (
    add_to_swap_cache,
    delete_from_swap_cache,
    folio_alloc_swap,
    swap_duplicate,
)

__all__ = ["reclaim_pages"]

#: Swap type of the only swap device.
_SWAP_DEVICE = 0


@kernel("mm/vmscan.c")
def reclaim_pages(machine: Machine, pfns: Pfns) -> Routine[None]:
    """Reclaim frames of RAM (int64, unique), in this order, as far as that goes."""
    heads = machine["page.compound"][pfns]
    cuts = np.flatnonzero(np.diff(heads)) + 1  # huge pages go one by one
    for part in np.split(pfns, cuts) if pfns.size else ():
        if machine["page.compound"][part[0]]:
            if (machine["page.refcount"][part] == machine["page.mapcount"][part]).all():
                yield from _shrink(machine, part, huge=True)
            continue
        for first, last in machine.chunks(0, part.size):
            with machine.bulk(last - first):
                yield from _shrink(machine, part[first:last])


def _shrink(machine: Machine, pfns: Pfns, *, huge: bool = False) -> Routine[None]:
    """Give each page a place in swap, unmap it, write it, free it (``shrink_folio_list``)."""
    flags = machine["page.flags"][pfns]
    anon, lazy = (flags & PG_ANON) != 0, (flags & PG_SWAPBACKED) == 0
    outside = anon & ~lazy & (machine["page.swap"][pfns] == 0)
    pinned = folio_maybe_dma_pinned(machine, pfns)
    stays = outside & pinned
    pfns, lost, outside = pfns[~stays], (anon & lazy)[~stays], outside[~stays]
    # Each page gets its slot in its turn, one of a file as late as it is written.
    wanting = outside if anon.all() else outside | _files_to_write(machine, pfns)
    slots = np.zeros(pfns.size, np.int64)
    slots[wanting] = folio_alloc_swap(machine, int(wanting.sum()))
    if outside.any():
        chosen = pfns[outside]
        add_to_swap_cache(machine, chosen, slots[outside])
        set_flags(machine, chosen, PG_DIRTY)
    if pfns.size:
        yield from try_to_unmap(machine, pfns, huge=huge)
        _write_out(machine, pfns[~lost], slots[~lost])  # lazily freed pages went when unmapped
    yield machine.step(f"{pfns.size} pages were unmapped, and written and freed where possible.")


@kernel("mm/rmap.c")
def try_to_unmap(machine: Machine, pfns: Pfns, *, huge: bool = False) -> Routine[None]:
    """Replace every word that maps one of ``pfns`` by its slot, each inside a CLEAR of its page.

    A ``huge`` page has a CLEAR for its PMD word, and one for all its small words.

    A page of a file needs no word to be found again. A page that was given up by MADV_FREE and not
    written since loses its word too, and so its content.
    """
    machine.called("try_to_unmap", 0 if huge else pfns.size - 1, up=1)
    found = rmap_walk(machine, pfns).until_unmapped()
    for vma, place in found.by_vma():
        mm = int(machine["vma.mm"][vma])
        range = MmuNotifierRange.each(mm, Event.CLEAR, place.vpn, vma=vma, order=place.which)
        if huge:
            low, high = int(place.vpn.min()), int(place.vpn.max()) + 1
            yield from split_huge_pmds_at(machine, vma_at(machine, vma), low)
            range = MmuNotifierRange.one(mm, Event.CLEAR, low, high, vma=vma)
        yield from invalidate_range_start(machine, range)
        mapped = place.only(place.maps)
        if mapped.which.size:
            _unmap(machine, mm, pfns[mapped.which], mapped.row)
        yield from invalidate_range_end(machine, range)


def _unmap(machine: Machine, mm: int, pfns: Pfns, rows: Pfns) -> None:
    words, flags = machine["pte"][rows], machine["page.flags"][pfns]
    dirty = (words & DIRTY) != 0
    if dirty.any():
        set_flags(machine, unique_rows(pfns[dirty]), PG_DIRTY)
        flags = machine["page.flags"][pfns]
    anon = (flags & PG_ANON) != 0
    lazy = anon & ((flags & PG_SWAPBACKED) == 0)
    # Given up, but written since, or held by somebody: it stays.
    held = machine["page.refcount"][pfns] != machine["page.mapcount"][pfns]
    stays = lazy & (((flags & PG_DIRTY) != 0) | held)
    if stays.any():
        set_flags(machine, unique_rows(pfns[stays]), PG_SWAPBACKED)
    to_slot = anon & ~lazy
    exclusive = to_slot & ((flags & PG_ANON_EXCLUSIVE) != 0)
    slots = machine["page.swap"][pfns]
    marks = np.where(exclusive, np.uint64(SWP_EXCLUSIVE), np.uint64(0))
    marks |= np.where((words & SOFT_DIRTY) != 0, np.uint64(SWP_SOFT_DIRTY), np.uint64(0))
    new = np.where(to_slot, swap_word(_SWAP_DEVICE, slots) | marks, np.uint64(0))
    gone = ~stays
    machine.write("pte", as_rows(rows[gone]), new[gone])
    if to_slot.any():
        swap_duplicate(machine, slots[to_slot])
    if exclusive.any():
        set_flags(machine, pfns[exclusive], off=PG_ANON_EXCLUSIVE)
    told = anon & mm_has_notifiers(machine, mm)
    machine.called_in_turn(  # a gather is under way, so words of PROT_NONE count too
        ("flush_tlb_mm_range", is_present(words)),
        ("__mmu_notifier_invalidate_range", told),
        ("page_remove_rmap", gone),
    )
    page_remove_rmap(machine, pfns[gone], noted=True)
    put_page(machine, pfns[gone])


def _files_to_write(machine: Machine, pfns: Pfns) -> Bools:
    """Which pages of files will be written: dirty, and held by their cache and mappings alone."""
    flags, mapcount = machine["page.flags"][pfns], machine["page.mapcount"][pfns]
    suited = ((flags & PG_ANON) == 0) & (machine["page.swap"][pfns] == 0)
    suited &= machine["page.refcount"][pfns] == mapcount + 1
    dirty = (flags & PG_DIRTY) != 0
    asked = np.flatnonzero(suited & ~dirty)
    found = rmap_walk(machine, pfns[asked])
    written = found.maps & ((machine["pte"][np.maximum(found.row, 0)] & DIRTY) != 0)
    dirty[asked[found.which[written]]] = True
    return suited & dirty


def _write_out(machine: Machine, pfns: Pfns, slots: Pfns) -> None:
    """Write and free what nobody but a cache holds (``pageout``, ``__remove_mapping``).

    ``slots`` are for those pages of files that are in no swap yet.
    """
    alone = (machine["page.mapcount"][pfns] == 0) & (machine["page.refcount"][pfns] == 1)
    alone &= page_mapping(machine, pfns)
    pfns, slots = pfns[alone], slots[alone]
    dirty = (machine["page.flags"][pfns] & PG_DIRTY) != 0
    shmem = (slots > 0) & (machine["page.swap"][pfns] == 0)
    if shmem.any():
        add_to_swap_cache(machine, pfns[shmem], slots[shmem])
        swap_out_of_cache(machine, pfns[shmem], slots[shmem])
    written = pfns[dirty]
    slots = machine["page.swap"][written]
    machine.write("swap.content", as_rows(slots), machine["page.content"][written])
    set_flags(machine, written, off=PG_DIRTY)
    in_swap = machine["page.swap"][pfns] != 0
    delete_from_swap_cache(machine, pfns[in_swap])
    drop_from_cache(machine, pfns[~in_swap])
