"""Migration entries: what stands in for a page while it is between two frames.

:func:`try_to_migrate` freezes every word that maps a page, :func:`remove_migration_ptes` lets each
map the new frame, or the old one again. Both serve moves to and from devices, moves between nodes,
and the splitting of huge pages.

Source: mm/rmap.c (``try_to_migrate_one``), mm/migrate.c (``remove_migration_pte``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import all_of, any_of, some
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    RW,
    SOFT_DIRTY,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    SWP_MIGRATION_READ,
    SWP_MIGRATION_WRITE,
    SWP_SOFT_DIRTY,
    Bools,
    Pfns,
    Words,
    is_device_exclusive,
    is_migration,
    is_present,
    is_swap_type,
    marks_of,
    migration_marks,
    migration_word,
    present_word,
    swap_offset_pfn,
    swap_type,
    swap_word,
)
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.huge_memory import split_huge_pmds_at
from hmmlab.model.lru import mlock_page_drain
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.memremap import is_device_private_page
from hmmlab.model.mm_types import VM_LOCKED, VM_WRITE, Vma, mm_root, vm_page_prot, vma_at
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
    frames_of,
    page_rows,
    pfn_to_page,
    set_flags,
)
from hmmlab.model.page_ref import NOBODY, get_page, note_held, put_page
from hmmlab.model.page_table import is_huge
from hmmlab.model.rmap import (
    Mappings,
    huge_page_mappings,
    page_add_anon_rmap,
    page_add_file_rmap,
    page_remove_rmap,
    rmap_walk,
)
from hmmlab.model.rows import Rows, as_rows, row_numbers, unique_rows
from hmmlab.model.tlb import pte_accessible

__all__ = ["Places", "freeze", "remove_migration_ptes", "split_huge_page", "try_to_migrate"]


def freeze(
    machine: Machine,
    word_rows: Rows,
    marks: Words,
    pfns: Pfns,
    rows: Rows,
    writable: Bools,
    exclusive: Bools,
) -> None:
    """Replace entries by migration entries; what they held, the migration holds from now on.

    ``marks`` are the entries, with their frames or without; ``rows`` are those of the frames. The
    caller notes the calls of ``page_remove_rmap``, among others.
    """
    flags = machine.alike("page.flags", rows) & np.uint32(~PG_ANON_EXCLUSIVE & 0xFFFFFFFF)
    dirty = ((marks & np.uint64(DIRTY)) >> _PAGE_DIRTY_SHIFT).astype(np.uint32)
    machine.write("page.flags", rows, flags | dirty | np.uint32(PG_LOCKED))
    machine.write("pte", word_rows, migration_word(marks, pfns, writable, exclusive))
    page_remove_rmap(machine, pfns, noted=True, rows=rows)


@kernel("mm/rmap.c")
def try_to_migrate(
    machine: Machine, pfns: Pfns, order: Pfns, *, huge: bool = False
) -> Routine[None]:
    """Freeze every entry that maps one of ``pfns``, each inside a CLEAR of its page.

    A mapping that could hold the page and does not gets the CLEAR too, until the page is found to
    be mapped nowhere any more. ``order`` says in which iteration of the caller's loop each page is;
    a ``huge`` page has one CLEAR in each mapping.
    """
    machine.called("try_to_migrate", 0 if huge else pfns.size - 1, up=1)
    found = rmap_walk(machine, pfns)
    words = machine["pte"][np.maximum(found.row, 0)]
    frozen = is_swap_type(words) & is_migration(words)
    found = found._replace(maps=found.maps & ~frozen).until_unmapped()
    for vma_row, place in found.by_vma():
        mm = int(machine["vma.mm"][vma_row])
        range = MmuNotifierRange.each(
            mm, Event.CLEAR, place.vpn, vma=vma_row, order=order[place.which]
        )
        if huge:
            low, high = int(place.vpn.min()), int(place.vpn.max()) + 1
            range = MmuNotifierRange.one(mm, Event.CLEAR, low, high, vma=vma_row, order=order[:1])
        yield from invalidate_range_start(machine, range)
        _freeze_mapped(machine, pfns, place, calls=1 if huge else None)
        yield from invalidate_range_end(machine, range)


def _freeze_mapped(
    machine: Machine, pfns: Pfns, place: Mappings, *, calls: int | None = None
) -> None:
    """Freeze the words in one mapping that map some of ``pfns``, and drop their references.

    ``calls`` says for how many words that is noted, where it is not for each.
    """
    mapped = place.only(place.maps)
    if not mapped.which.size:
        return
    frames, entries = pfns[mapped.which], machine["pte"][mapped.row]
    writable = np.where(
        is_present(entries), (entries & RW) != 0, swap_type(entries) == SWP_DEVICE_WRITE
    )
    exclusive = (machine["page.flags"][page_rows(machine, frames)] & PG_ANON_EXCLUSIVE) != 0
    machine.called_in_turn(
        ("flush_tlb_mm_range", pte_accessible(entries)[:calls]),
        ("page_remove_rmap", np.ones(frames.size, np.bool_)[:calls]),
    )
    rows = pfn_to_page(machine, frames)
    freeze(machine, mapped.row, entries, frames, rows, writable, exclusive)
    if machine["vma.flags"][mapped.vma[0]] & VM_LOCKED:
        mlock_page_drain(machine)
    put_page(machine, frames)


#: From the bit PG_DIRTY to the bit DIRTY of a word, and on to SOFT_DIRTY; from True to RW.
_PAGE_DIRTY_SHIFT = np.uint64(DIRTY.bit_length() - PG_DIRTY.bit_length())
_SOFT_DIRTY_SHIFT = np.uint64(SOFT_DIRTY.bit_length() - DIRTY.bit_length())
_RW_SHIFT = np.uint64(RW.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Places:
    """Where some pages are mapped, each at one place of one mapping.

    ``vma`` is the row of the mapping, ``vpns`` the page numbers, ``rows`` the rows of their words.
    """

    vma: int
    vpns: Pfns
    rows: Rows


def remove_migration_ptes(
    machine: Machine,
    old: Pfns,
    new: Pfns,
    places: Places | None = None,
    rows: Rows | None = None,
) -> None:
    """Let every migration entry of ``old`` map ``new`` instead, with the mapping's rights of now.

    Writable only where the entry was and the mapping is; old unless it was young before. Who has
    frozen the only entry of each page says at which ``places``; all others ask the reverse mapping.
    ``rows`` are those of ``new``, if known.
    """
    machine.called("remove_migration_ptes", old.size)
    if places is not None:
        _thaw(machine, places, old, new, rows)
        return
    found = rmap_walk(machine, old)
    found = found.only(found.maps)
    for vma_row in unique_rows(found.vma).tolist():
        place = found.only(found.vma == vma_row)
        places = Places(vma_row, place.vpn, as_rows(place.row))
        _thaw(machine, places, old[place.which], new[place.which])


def _thaw(machine: Machine, places: Places, old: Pfns, new: Pfns, rows: Rows | None = None) -> None:
    """Let words map ``new`` where they are migration entries of ``old``.

    Device-exclusive entries are taken for such, read-only ones; Linux forgets that they hold a
    reference (``check_pte`` in mm/page_vma_mapped.c).
    """
    word_rows = places.rows
    entries = machine["pte"][word_rows]
    frozen = swap_offset_pfn(entries) == old
    marks = marks_of(entries)
    frozen &= is_migration(marks) | is_device_exclusive(marks)
    if not any_of(frozen):
        return
    pfns, vpns = new, places.vpns
    if not all_of(frozen):
        marks, pfns, vpns = some(marks, frozen), pfns[frozen], vpns[frozen]
        word_rows, rows = as_rows(row_numbers(word_rows)[frozen]), None
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    lost = is_device_exclusive(marks)
    if any_of(lost):
        note_held(machine, NOBODY, some(pfns, lost), 1)
    vma = vma_at(machine, places.vma)
    kind = swap_type(marks)
    exclusive = kind != SWP_MIGRATION_READ
    writable = (kind == SWP_MIGRATION_WRITE) & bool(vma.flags & VM_WRITE)
    flags = machine.alike("page.flags", rows)
    device = is_device_private_page(machine, pfns, rows)
    if not all_of(device):
        words = _mapping_word(vma, pfns, writable, marks, flags)
    if any_of(device):
        kind = SWP_DEVICE_READ - writable.view(np.uint8) * (SWP_DEVICE_READ - SWP_DEVICE_WRITE)
        named = swap_word(kind, pfns)
        named |= marks & np.uint64(SWP_SOFT_DIRTY)
        words = named if all_of(device) else np.where(device, named, words)
    anon = (flags & np.uint32(PG_ANON)) != 0
    get_page(machine, pfns, rows)
    if all_of(anon):
        page_add_anon_rmap(machine, pfns, vma, vpns, exclusive, rows)
    else:
        mapped = np.broadcast_to(anon, pfns.shape)
        page_add_anon_rmap(machine, pfns[mapped], vma, vpns[mapped], some(exclusive, mapped))
        page_add_file_rmap(machine, pfns[~mapped], vma)
    machine.write("pte", word_rows, words)
    if vma.flags & VM_LOCKED:
        mlock_page_drain(machine)


def _mapping_word(
    vma: Vma, pfns: Pfns, writable: Bools, entries: Words, flags: NDArray[np.uint32]
) -> Words:
    """Present words in place of migration entries; dirty only where the page still is."""
    prot = vm_page_prot(vma.flags)
    kept = migration_marks(entries)
    dirty = (flags & np.uint32(PG_DIRTY)).astype(np.uint64) << _PAGE_DIRTY_SHIFT
    dirty = dirty & kept
    kept &= np.uint64((prot & ACCESSED) | SOFT_DIRTY)
    words = present_word(pfns, prot & ~(ACCESSED | RW))
    words |= kept | dirty | (dirty << _SOFT_DIRTY_SHIFT) | (writable.astype(np.uint64) << _RW_SHIFT)
    return words


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
    yield from _freeze_huge_page(machine, pfns)
    machine.write("page.compound", as_rows(pfns), 0)
    remove_migration_ptes(machine, pfns, pfns)
    machine.called("remove_migration_ptes", PMD_PAGES - pfns.size)  # of what nobody maps
    set_flags(machine, pfns, off=PG_LOCKED)
    put_page(machine, pfns)
    yield machine.step("The huge page is 512 pages of their own now.")
    return True


@kernel("mm/rmap.c", "try_to_migrate")
def _freeze_huge_page(machine: Machine, pfns: Pfns) -> Routine[None]:
    """Freeze all that maps ``pfns``, the frames of a huge page: PMD words as they are split."""
    found = rmap_walk(machine, pfns)
    for vma, first, last in huge_page_mappings(machine, pfns):
        if not (machine["page.mapcount"][pfns] > 0).any():
            break
        huge = is_huge(machine, mm_root(machine, vma.mm), first)
        yield from split_huge_pmds_at(machine, vma, first, freeze=True)
        range = MmuNotifierRange.one(vma.mm, Event.CLEAR, first, last, vma=vma.row)
        yield from invalidate_range_start(machine, range)
        place = found.only(found.vma == vma.row)
        _freeze_mapped(machine, pfns, place, calls=0 if huge else None)
        yield from invalidate_range_end(machine, range)
