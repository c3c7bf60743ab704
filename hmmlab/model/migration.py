"""Migration entries: what stands in for a page while it is between two frames.

:func:`try_to_migrate` freezes every word that maps a page, :func:`remove_migration_ptes` lets each
map the new frame, or the old one again. Both serve moves to and from devices, moves between nodes,
and the splitting of huge pages.

Source: mm/rmap.c (``try_to_migrate_one``), mm/migrate.c (``remove_migration_pte``).
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    RW,
    SOFT_DIRTY,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    SWP_MIG_DIRTY,
    SWP_MIG_YOUNG,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    SWP_SOFT_DIRTY,
    Bools,
    Pfns,
    Words,
    is_migration,
    is_present,
    is_swap_type,
    present_word,
    swap_offset,
    swap_type,
    swap_word,
)
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.huge_memory import split_huge_pmds_at
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_WRITE, Vma, find_vmas_of_anon_vma, vm_page_prot, vma_at
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
    PG_LOCKED,
    as_rows,
    frames_of,
    get_page,
    is_device_private_page,
    page_rows,
    put_page,
    set_flags,
)
from hmmlab.model.rmap import (
    Mappings,
    page_add_anon_rmap,
    page_add_file_rmap,
    page_remove_rmap,
    rmap_walk,
)
from hmmlab.model.state import unique_rows

__all__ = ["freeze", "remove_migration_ptes", "split_huge_page", "try_to_migrate"]


def freeze(
    machine: Machine,
    word_rows: Pfns | slice | int,
    words: Words,
    pfns: Pfns,
    writable: Bools,
    exclusive: Bools,
) -> None:
    """Replace entries by migration entries; what they held, the migration holds from now on."""
    present = is_present(words)
    dirty = present & ((words & DIRTY) != 0)
    young = present & ((words & ACCESSED) != 0)
    soft_dirty = np.where(present, (words & SOFT_DIRTY) != 0, (words & SWP_SOFT_DIRTY) != 0)
    kind = np.where(
        writable,
        SWP_MIGRATION_WRITE,
        np.where(exclusive, SWP_MIGRATION_READ_EXCLUSIVE, SWP_MIGRATION_READ),
    )
    offset = pfns + np.where(young, SWP_MIG_YOUNG, 0) + np.where(dirty, SWP_MIG_DIRTY, 0)
    entries = swap_word(kind, offset) | np.where(
        soft_dirty, np.uint64(SWP_SOFT_DIRTY), np.uint64(0)
    )
    rows = as_rows(page_rows(machine, pfns))
    flags = machine["page.flags"][rows] | np.uint32(PG_LOCKED)
    flags = np.where(dirty, flags | np.uint32(PG_DIRTY), flags) & np.uint32(
        ~PG_ANON_EXCLUSIVE & 0xFFFFFFFF
    )
    machine.write("page.flags", rows, flags)
    machine.write("pte", word_rows, entries)
    page_remove_rmap(machine, pfns)


@kernel("mm/rmap.c")
def try_to_migrate(
    machine: Machine, pfns: Pfns, order: Pfns, *, huge: bool = False
) -> Routine[None]:
    """Freeze every entry that maps one of ``pfns``, each inside a CLEAR of its page.

    A mapping that could hold the page and does not gets the CLEAR too, until the page is found to
    be mapped nowhere any more. ``order`` says in which iteration of the caller's loop each page is;
    a ``huge`` page has one CLEAR in each mapping.
    """
    machine.called("try_to_migrate", pfns.size - 1, up=1)
    found = rmap_walk(machine, pfns)
    words = machine["pte"][np.maximum(found.row, 0)]
    frozen = is_swap_type(words) & is_migration(words)
    found = found._replace(maps=found.maps & ~frozen).until_unmapped()
    for vma_row in dict.fromkeys(found.vma.tolist()):
        place = found.only(found.vma == vma_row)
        mm = int(machine["vma.mm"][vma_row])
        range = MmuNotifierRange.each(
            mm, Event.CLEAR, place.vpn, vma=vma_row, order=order[place.which]
        )
        if huge:
            low, high = int(place.vpn.min()), int(place.vpn.max()) + 1
            range = MmuNotifierRange.one(mm, Event.CLEAR, low, high, vma=vma_row, order=order[:1])
        yield from invalidate_range_start(machine, range)
        _freeze_mapped(machine, pfns, place)
        yield from invalidate_range_end(machine, range)


def _freeze_mapped(machine: Machine, pfns: Pfns, place: Mappings) -> None:
    """Freeze the words in one mapping that map some of ``pfns``, and drop their references."""
    mapped = place.only(place.maps)
    if not mapped.which.size:
        return
    frames, entries = pfns[mapped.which], machine["pte"][mapped.row]
    writable = np.where(
        is_present(entries), (entries & RW) != 0, swap_type(entries) == SWP_DEVICE_WRITE
    )
    exclusive = (machine["page.flags"][page_rows(machine, frames)] & PG_ANON_EXCLUSIVE) != 0
    freeze(machine, mapped.row, entries, frames, writable, exclusive)
    put_page(machine, frames)


def remove_migration_ptes(machine: Machine, old: Pfns, new: Pfns) -> None:
    """Let every migration entry of ``old`` map ``new`` instead, with the mapping's rights of now.

    Writable only where the entry was and the mapping is; old unless it was young before.
    """
    machine.called("remove_migration_ptes", old.size)
    found = rmap_walk(machine, old)
    found = found.only(found.maps)
    entries = machine["pte"][found.row]
    frozen = is_swap_type(entries) & is_migration(entries)
    found, entries = found.only(frozen), entries[frozen]
    for vma_row in unique_rows(found.vma).tolist():
        mine = found.vma == vma_row
        frames = new[found.which[mine]]
        vma, place = vma_at(machine, vma_row), found.only(mine)
        _thaw(machine, vma, place.vpn, place.row, entries[mine], frames)


def _thaw(machine: Machine, vma: Vma, vpns: Pfns, rows: Pfns, entries: Words, pfns: Pfns) -> None:
    offsets, kind = swap_offset(entries), swap_type(entries)
    exclusive = kind != SWP_MIGRATION_READ
    writable = (kind == SWP_MIGRATION_WRITE) & bool(vma.flags & VM_WRITE)
    soft_dirty = (entries & np.uint64(SWP_SOFT_DIRTY)) != 0
    frame_flags = machine["page.flags"][page_rows(machine, pfns)]
    dirty = ((offsets & SWP_MIG_DIRTY) != 0) & ((frame_flags & PG_DIRTY) != 0)
    words = present_word(pfns, vm_page_prot(vma.flags))
    words = np.where((offsets & SWP_MIG_YOUNG) != 0, words, words & ~np.uint64(ACCESSED))
    words = np.where(writable, words | np.uint64(RW), words & ~np.uint64(RW))
    words = np.where(dirty, words | np.uint64(DIRTY | SOFT_DIRTY), words)
    words = np.where(soft_dirty, words | np.uint64(SOFT_DIRTY), words)
    device = swap_word(np.where(writable, SWP_DEVICE_WRITE, SWP_DEVICE_READ), pfns)
    device = np.where(soft_dirty, device | np.uint64(SWP_SOFT_DIRTY), device)
    get_page(machine, pfns)
    anon = (frame_flags & PG_ANON) != 0
    if anon.any():
        page_add_anon_rmap(machine, pfns[anon], vma, vpns[anon], exclusive[anon])
    if not anon.all():
        page_add_file_rmap(machine, pfns[~anon])
    machine.write(
        "pte", as_rows(rows), np.where(is_device_private_page(machine, pfns), device, words)
    )


# --- splitting huge pages -------------------------------------------------------------------------


@kernel("mm/huge_memory.c", "split_huge_page_to_list")
def split_huge_page(machine: Machine, head: int) -> Routine[bool]:
    """Make 512 small pages of a huge one, wherever it is mapped. Returns whether it was possible.

    It is not while somebody holds a reference besides the mappings. In each mapping there is a
    CLEAR for the PMD word, and one for the small words that are frozen meanwhile.
    """
    pfns = frames_of(np.array([head]))
    pfns = pfns[(machine["page.compound"][pfns] == head) & (machine["page.refcount"][pfns] > 0)]
    if (machine["page.refcount"][pfns] != machine["page.mapcount"][pfns]).any():
        yield machine.step("Somebody holds the huge page: it cannot be split.")
        return False
    get_page(machine, pfns)
    found = rmap_walk(machine, pfns)
    one = int(pfns[0])
    low = int(machine["page.index"][one]) - (one - head)
    for vma_row in find_vmas_of_anon_vma(machine, int(machine["page.mapping"][one])):
        vma = vma_at(machine, vma_row)
        first = max(low - vma.pgoff_of(0), vma.start)
        last = min(low + PMD_PAGES - vma.pgoff_of(0), vma.end)
        if first >= last:
            continue
        if not (machine["page.mapcount"][pfns] > 0).any():
            break
        yield from split_huge_pmds_at(machine, vma, first, freeze=True)
        range = MmuNotifierRange.one(vma.mm, Event.CLEAR, first, last, vma=vma_row)
        yield from invalidate_range_start(machine, range)
        _freeze_mapped(machine, pfns, found.only(found.vma == vma_row))
        yield from invalidate_range_end(machine, range)
    machine.write("page.compound", as_rows(pfns), 0)
    remove_migration_ptes(machine, pfns, pfns)
    set_flags(machine, pfns, off=PG_LOCKED)
    put_page(machine, pfns)
    yield machine.step("The huge page is 512 pages of their own now.")
    return True
