"""migrate_vma: move pages between RAM and a device's memory, in three steps of the driver.

``migrate_vma_setup`` collects pages and puts migration entries in their place; the driver then
allocates and copies; ``migrate_vma_pages`` moves each page's identity or fills a hole;
``migrate_vma_finalize`` puts the new pages, or the old ones, back. A page may be refused at every
step, and its src entry tells at which.

Source: mm/migrate_device.c, mm/migrate.c (``remove_migration_pte``), mm/rmap.c
(``try_to_migrate_one``).
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.alike import alike, all_of, any_of, how_many, rows_where, some
from hmmlab.model.anon_vma import anon_vma_prepare
from hmmlab.model.entry import (
    DIRTY,
    MIGRATE_PFN_MIGRATE,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    Bools,
    Pfns,
    is_present,
    migrate_pfn,
    pfn_of,
    present_word,
    swap_word,
)
from hmmlab.model.lru import folio_add_lru, lru_add_drain
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.memremap import is_device_private_page
from hmmlab.model.migrate_vma import MigrateVma, walk_page_range
from hmmlab.model.migration import remove_migration_ptes, try_to_migrate
from hmmlab.model.mm_types import (
    VM_HUGETLB,
    VM_SPECIAL,
    VM_WRITE,
    Vma,
    mm_root,
    vm_page_prot,
    vma_at,
)
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page import (
    PG_ANON_EXCLUSIVE,
    PG_LOCKED,
    PG_LRU,
    ZERO_PFN,
    is_zone_device,
    page_mapping,
    page_rows,
    pfn_to_page,
    set_flags,
    some_rows,
)
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.page_table import alloc_tables, rows_of
from hmmlab.model.rmap import ksm_migrate_page, page_add_new_anon_rmap
from hmmlab.model.rows import as_rows, row_numbers

__all__ = [
    "migrate_device_coherent_pages",
    "migrate_device_finalize",
    "migrate_device_pages",
    "migrate_device_range",
    "migrate_vma_finalize",
    "migrate_vma_pages",
    "migrate_vma_setup",
]


# --- setup ----------------------------------------------------------------------------------------


@kernel("mm/migrate_device.c")
def migrate_vma_setup(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    """Collect the pages and put migration entries in their place; the caller holds the mmap_lock.

    Raises
    ------
    KernelError
        EINVAL when the mapping cannot be migrated or the pages are not all in it.
    """
    vma, vpns = migrate.vma, migrate.vpns
    if vma is None or vma.flags & (VM_SPECIAL | VM_HUGETLB) or not vpns.size:
        raise KernelError(22, "no mapping, or one that cannot be migrated")
    if not vma.start <= vpns[0] <= vpns[-1] < vma.end:
        raise KernelError(22, f"pages {vpns[0]:#x} to {vpns[-1]:#x} are not in one mapping")
    if migrate.each:
        range = MmuNotifierRange.each(
            vma.mm, Event.MIGRATE, vpns, owner=migrate.pgmap_owner, vma=vma.row
        )
    else:
        first = vpns[:: migrate.batch or vpns.size]
        last = np.append(first[1:], vpns[-1] + 1)
        range = MmuNotifierRange(
            vma.mm, Event.MIGRATE, first, last, owner=migrate.pgmap_owner, vma=vma.row
        )
    yield from invalidate_range_start(machine, range)
    yield from walk_page_range(machine, migrate, vma)
    yield from invalidate_range_end(machine, range)
    if migrate.cpages:
        yield from migrate_device_unmap(machine, migrate)


@kernel("mm/migrate_device.c")
def migrate_device_unmap(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    """Unmap the pages everywhere else, and give up those that somebody holds."""
    lru_add_drain(machine)
    valid, _ = migrate.valid_and_migrating()
    if not any_of(valid):
        return
    pfns = some(migrate.src_pfns, valid)
    rows = pfn_to_page(machine, pfns)
    mapped = machine.alike("page.mapcount", rows) > 0
    if any_of(mapped):
        migrate.elsewhere = True
        elsewhere, keys = some(pfns, mapped), some(some(migrate.vpns, valid), mapped)
        with machine.bulk(elsewhere.size if machine.grain > 1 else 1):
            for first, last in machine.chunks(0, elsewhere.size):
                yield from try_to_migrate(machine, elsewhere[first:last], keys[first:last])
    # One reference is ours; the test is by one more generous for device memory and by one for the
    # frame of the fault.
    extra = np.ones(1, np.int32)
    for more in (
        is_zone_device(machine, pfns, rows),
        migrate.faulted(pfns),
        page_mapping(machine, pfns, rows),
    ):
        extra = extra + more
    mapcount = machine.alike("page.mapcount", rows)
    refcount = machine.alike("page.refcount", rows)
    refused = (mapcount > 0) | (refcount - extra > mapcount)
    if any_of(refused):
        back = some(pfns, refused)
        system = some(back, ~is_zone_device(machine, back))
        if system.size:
            folio_add_lru(machine, system)
        migrate.src[some(row_numbers(rows_where(valid, migrate.vpns.size)), refused)] = 0
        remove_migration_ptes(machine, back, back)
        set_flags(machine, back, off=PG_LOCKED)
        put_page(machine, back)
        migrate.cpages = migrate.marked()
    vma, vpns = migrate.vma, migrate.vpns
    held = how_many(refused, pfns.size)
    yield machine.step(
        f"Of {{range}}, {migrate.cpages} can move; held by somebody: {held}.",
        vma.mm if vma else 0,
        int(vpns[0]) if vma else 0,
        int(vpns[-1]) + 1 if vma else 0,
        detail=migrate.now(machine),
    )


# --- pages ----------------------------------------------------------------------------------------


@kernel("mm/migrate_device.c")
def migrate_vma_pages(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    """Move each page's identity to the frame in ``dst``, or fill the hole with it.

    Afterwards MIGRATE stands for success. The driver may update its page table now.
    """
    yield from _migrate_pages(machine, migrate)


@kernel("mm/migrate_device.c")
def migrate_device_pages(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    """The same for frames that :func:`migrate_device_range` collected."""
    yield from _migrate_pages(machine, migrate)


def _migrate_pages(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    pages = migrate.vpns.size
    migrate.keep(migrate.dst != 0)
    valid, migrating = migrate.valid_and_migrating()
    holes, movers = migrating & ~valid, migrating & valid
    if any_of(holes) and migrate.vma is not None:
        where = row_numbers(rows_where(holes, pages))
        yield from _fill_holes(machine, migrate, migrate.vma, where)
    if any_of(movers):
        src, dst = some(migrate.src_pfns, movers), some(migrate.dst_pfns, movers)
        old, new = pfn_to_page(machine, src), pfn_to_page(machine, dst)
        cached = page_mapping(machine, src, old)
        # Exactly the references that we know of: one more than ours and it must stay.
        expected = np.ones(1, np.int32) + migrate.faulted(src) + cached
        moves = machine.alike("page.refcount", old) == expected
        # Only private memory can live on a device.
        moves = moves & ~(cached & is_zone_device(machine, dst, new))
        if not all_of(moves):
            stay = some(row_numbers(rows_where(movers, pages)), ~moves)
            migrate.src[stay] &= ~np.uint64(MIGRATE_PFN_MIGRATE)
            src, dst = some(src, moves), some(dst, moves)
            old, new = pfn_to_page(machine, src), pfn_to_page(machine, dst)
        ksm_migrate_page(machine, src, dst, old)
        for column in ("mapping", "index"):
            machine.write(f"page.{column}", new, machine[f"page.{column}"][old])
        carried = machine.alike("page.flags", old)
        carried = carried & np.uint32(~(PG_LRU | PG_ANON_EXCLUSIVE) & 0xFFFFFFFF)
        machine.write("page.flags", new, carried | machine.alike("page.flags", new))
    vma, vpns = migrate.vma, migrate.vpns
    yield machine.step(
        f"{migrate.marked()} pages of {{range}} have their new frames.",
        vma.mm if vma else 0,
        int(vpns[0]) if vma else 0,
        int(vpns[-1]) + 1 if vma else 0,
        detail=migrate.now(machine),
    )


def _fill_holes(machine: Machine, migrate: MigrateVma, vma: Vma, holes: Pfns) -> Routine[None]:
    """Insert new frames where nothing, or the zero page, was (``migrate_vma_insert_page``)."""
    vpns = migrate.vpns
    batch = migrate.batch or vpns.size
    first = holes[np.diff(holes // batch, prepend=-1) != 0]
    last = vpns[np.minimum((first // batch + 1) * batch, vpns.size) - 1]
    # Each migration fills its holes last, so it is told with its last page.
    range = MmuNotifierRange(
        vma.mm,
        Event.MIGRATE,
        vpns[first],
        last + 1,
        owner=migrate.pgmap_owner,
        vma=vma.row,
        order=last,
    )
    yield from invalidate_range_start(machine, range)
    root = mm_root(machine, vma.mm)
    alloc_tables(machine, root, int(vpns[0]), int(vpns[-1]) + 1)
    vma = anon_vma_prepare(machine, vma_at(machine, vma.row))
    rows = row_numbers(rows_of(machine, root, vpns[holes]))
    words = machine["pte"][rows]
    zero = is_present(words) & ((words & SPECIAL) != 0) & (pfn_of(words) == ZERO_PFN)
    free = (words == 0) | zero
    migrate.src[holes[~free]] = 0
    holes, rows = holes[free], rows[free]
    pfns = migrate.dst_pfns[holes]
    prot = vm_page_prot(vma.flags)
    writable = bool(vma.flags & VM_WRITE)
    device = is_device_private_page(machine, pfns)
    entries = np.where(
        device,
        swap_word(SWP_DEVICE_WRITE if writable else SWP_DEVICE_READ, pfns),
        present_word(pfns, prot | (DIRTY | SOFT_DIRTY | RW if writable else 0)),
    )
    machine.called_in_turn(
        ("page_add_new_anon_rmap", np.ones(pfns.size, np.bool_)),
        ("flush_tlb_mm_range", zero[free]),
        ("__mmu_notifier_invalidate_range", zero[free]),  # who migrates has subscribed
    )
    page_add_new_anon_rmap(machine, pfns, vma, vpns[holes], noted=True, lru=False)
    get_page(machine, pfns)
    machine.write("pte", as_rows(rows), entries)
    yield from invalidate_range_end(machine, range)


# --- finalize -------------------------------------------------------------------------------------


@kernel("mm/migrate_device.c")
def migrate_vma_finalize(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    """Put the new frames in place of the migration entries, or the old ones back."""
    yield from _finalize(machine, migrate)


@kernel("mm/migrate_device.c")
def migrate_device_finalize(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    """The same for frames that :func:`migrate_device_range` collected."""
    yield from _finalize(machine, migrate)


def _finalize(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    valid, migrating = migrate.valid_and_migrating()
    given = alike(migrate.dst != 0)
    moved = valid & migrating & given
    busy = valid | given
    frames = (migrate.vpns, migrate.src_pfns, migrate.dst_pfns)
    pages = [some(array, busy) for array in frames]
    marks = [some(mask, busy) for mask in (valid, moved)]
    for first, last in machine.chunks(0, pages[0].size):
        part = slice(first, last)
        masks = (mask if mask.size == 1 else mask[part] for mask in marks)
        _finalize_pages(machine, migrate, *(array[part] for array in pages), *masks)
    vma, vpns = migrate.vma, migrate.vpns
    yield machine.step(
        f"The migration entries of {{range}} are gone: {how_many(moved, vpns.size)} moved, "
        f"{how_many(valid & ~moved, vpns.size)} did not.",
        vma.mm if vma else 0,
        int(vpns[0]) if vma else 0,
        int(vpns[-1]) + 1 if vma else 0,
        detail=migrate.now(machine),
    )


def _finalize_pages(
    machine: Machine,
    migrate: MigrateVma,
    vpns: Pfns,
    src: Pfns,
    dst: Pfns,
    valid: Bools,
    moved: Bools,
) -> None:
    unused = ~moved & (dst != 0) if not all_of(moved) else ~moved
    if any_of(unused):  # filled holes keep their page through its own reference
        set_flags(machine, some(dst, unused), off=PG_LOCKED)
        put_page(machine, some(dst, unused))
    if any_of(valid):
        old = some(src, valid)
        new = some(dst if all_of(moved) else np.where(moved, dst, src), valid)
        new_rows, old_rows = pfn_to_page(machine, new), pfn_to_page(machine, old)
        system = ~is_zone_device(machine, new, new_rows)
        if any_of(system):
            folio_add_lru(machine, some(new, system), rows=some_rows(new_rows, system))
        places = migrate.places(machine, some(vpns, valid))
        remove_migration_ptes(machine, old, new, places, new_rows)
        set_flags(machine, old, off=PG_LOCKED, rows=old_rows)
        put_page(machine, old, old_rows)
    if any_of(moved):
        if not (all_of(moved) and all_of(valid)):
            new = some(dst, moved)
            new_rows = pfn_to_page(machine, new)
        set_flags(machine, new, off=PG_LOCKED, rows=new_rows)
        put_page(machine, new, new_rows)


# --- eviction -------------------------------------------------------------------------------------


@kernel("mm/migrate_device.c")
def migrate_device_range(machine: Machine, pfns: Pfns, owner: int) -> Routine[MigrateVma]:
    """Set up a migration of device frames, ascending, wherever they are mapped.

    Returns the migration; the driver copies, and goes on with :func:`migrate_device_pages` and
    :func:`migrate_device_finalize`.
    """
    migrate = MigrateVma(None, pfns, owner, 0)
    rows = page_rows(machine, pfns)
    usable = (machine["page.refcount"][rows] > 0) & ((machine["page.flags"][rows] & PG_LOCKED) == 0)
    frames = pfns[usable]
    if frames.size:
        get_page(machine, frames)
        set_flags(machine, frames, PG_LOCKED)
        migrate.src[usable] = migrate_pfn(frames) | np.uint64(MIGRATE_PFN_MIGRATE)
        migrate.cpages = migrate.marked()
    yield from migrate_device_unmap(machine, migrate)
    return migrate


@kernel("mm/migrate_device.c", "migrate_device_coherent_page")
def migrate_device_coherent_pages(machine: Machine, pfns: Pfns) -> Routine[None]:
    """Bring device-coherent frames home to RAM, where they can be pinned, one by one."""
    migrate = MigrateVma(None, np.arange(pfns.size), 0, 0)
    get_page(machine, pfns)
    set_flags(machine, pfns, PG_LOCKED)
    migrate.src[:] = migrate_pfn(pfns) | np.uint64(MIGRATE_PFN_MIGRATE)
    migrate.cpages = migrate.marked()
    with machine.bulk(pfns.size):
        yield from migrate_device_unmap(machine, migrate)
    wanted = np.flatnonzero(migrate.migrating)
    content = machine["page.content"][page_rows(machine, pfns[wanted])]
    new, rows = alloc_pages(machine, wanted.size, content=content)
    set_flags(machine, new, PG_LOCKED, rows=rows)
    migrate.dst[wanted] = migrate_pfn(new)
    yield from _migrate_pages(machine, migrate)
    yield from _finalize(machine, migrate)
