"""migrate_vma: move pages between RAM and a device's memory, in three steps of the driver.

``migrate_vma_setup`` collects pages and puts migration entries in their place; the driver then
allocates and copies; ``migrate_vma_pages`` moves each page's identity or fills a hole;
``migrate_vma_finalize`` puts the new pages, or the old ones, back. A page may be refused at every
step, and its src entry tells at which.

Source: mm/migrate_device.c, mm/migrate.c (``remove_migration_pte``), mm/rmap.c
(``try_to_migrate_one``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np

from hmmlab.model.entry import (
    DIRTY,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    SWP_DEVICE_READ,
    SWP_DEVICE_WRITE,
    Bools,
    Pfns,
    Words,
    is_device_private,
    is_present,
    migrate_pfn,
    migrate_pfn_to_pfn,
    named_pfn,
    pfn_of,
    present_word,
    swap_type,
    swap_word,
)
from hmmlab.model.geometry import LEVEL_PAGES, PMD_PAGES, align_down
from hmmlab.model.huge_memory import split_huge_pmd
from hmmlab.model.lru import lru_add_drain
from hmmlab.model.machine import BLOCK, BULK, KernelError, Machine, Routine, kernel
from hmmlab.model.migration import (
    Places,
    freeze,
    remove_migration_ptes,
    split_huge_page,
    try_to_migrate,
)
from hmmlab.model.mm_types import (
    VM_HUGETLB,
    VM_SPECIAL,
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
    series_commute,
)
from hmmlab.model.page import (
    GUP_PIN_COUNTING_BIAS,
    PG_ANON,
    PG_ANON_EXCLUSIVE,
    PG_DIRTY,
    PG_LOCKED,
    PG_LRU,
    PG_SWAPBACKED,
    ZERO_PFN,
    alloc_pages,
    as_rows,
    free_ram,
    get_page,
    is_device_private_page,
    is_zone_device,
    of_pagemap,
    page_mapping,
    page_rows,
    pfn_to_page,
    put_page,
    set_flags,
)
from hmmlab.model.page_table import alloc_tables, read_range, rows_of, walk
from hmmlab.model.rmap import (
    ksm_migrate_page,
    page_add_new_anon_rmap,
)
from hmmlab.model.state import are_unique, row_numbers, rows_where, some
from hmmlab.model.tlb import flush_tlb

__all__ = [
    "SELECT_DEVICE_COHERENT",
    "SELECT_DEVICE_PRIVATE",
    "SELECT_SYSTEM",
    "MigrateVma",
    "commuting_migrations",
    "migrate_device_coherent_pages",
    "migrate_device_finalize",
    "migrate_device_pages",
    "migrate_device_range",
    "migrate_vma_finalize",
    "migrate_vma_pages",
    "migrate_vma_setup",
]

_WRITE_BIT = MIGRATE_PFN_WRITE.bit_length() - 1

SELECT_SYSTEM = 1
SELECT_DEVICE_PRIVATE = 2
SELECT_DEVICE_COHERENT = 4


@dataclass
class MigrateVma:
    """A migration (``struct migrate_vma``).

    Attributes
    ----------
    vma
        The mapping; None when device frames are evicted wherever they are mapped.
    vpns
        Page numbers, int64 of shape (n,), ascending.
    pgmap_owner
        Device on whose behalf it is done.
    flags
        SELECT_* bits: which pages are collected.
    fault_pages
        Frames that the CPU is faulting on (``fault_page``), each held by one more reference; int64,
        maybe empty.
    each
        Whether every page is a migration of its own, one after another, as faults are.
    batch
        Pages of one migration, where this stands for several of them, one after another, that
        :func:`commuting_migrations` has found to commute; 0 where it is one.
    src, dst
        MIGRATE_PFN_* entries, uint64 of shape (n,).
    cpages
        How many entries of ``src`` have MIGRATE.
    elsewhere
        Whether pages were frozen at other places besides.
    """

    vma: Vma | None
    vpns: Pfns
    pgmap_owner: int
    flags: int
    fault_pages: Pfns = field(default_factory=lambda: np.zeros(0, np.int64))
    each: bool = False
    batch: int = 0
    src: Words = field(init=False)
    dst: Words = field(init=False)
    cpages: int = 0
    elsewhere: bool = False

    def __post_init__(self) -> None:
        self.src = np.zeros(self.vpns.size, np.uint64)
        self.dst = np.zeros(self.vpns.size, np.uint64)

    @property
    def batches(self) -> int:
        """How many migrations it stands for."""
        return -(-self.vpns.size // self.batch) if self.batch else 1

    @property
    def migrating(self) -> Bools:
        """Which entries of ``src`` have MIGRATE."""
        return (self.src & np.uint64(MIGRATE_PFN_MIGRATE)) != 0

    @property
    def valid(self) -> Bools:
        """Which entries of ``src`` name a page."""
        return (self.src & np.uint64(MIGRATE_PFN_VALID)) != 0

    @property
    def writable(self) -> Bools:
        """Which entries of ``src`` were writable."""
        return (self.src & np.uint64(MIGRATE_PFN_WRITE)) != 0

    @property
    def src_pfns(self) -> Pfns:
        """Frame of each entry of ``src``; 0 where it names none."""
        return migrate_pfn_to_pfn(self.src)

    @property
    def dst_pfns(self) -> Pfns:
        """Frame of each entry of ``dst``; 0 where the driver gave none."""
        return migrate_pfn_to_pfn(self.dst)

    def places(self, machine: Machine, vpns: Pfns) -> Places | None:
        """Where the migration entries of some pages are, unless the reverse mapping must tell."""
        if self.vma is None or self.elsewhere:
            return None
        rows = rows_of(machine, mm_root(machine, self.vma.mm), vpns)
        return Places(self.vma.row, vpns, rows)

    def faulted(self, pfns: Pfns) -> Bools:
        """Which of ``pfns`` the CPU is faulting on."""
        if not self.fault_pages.size:
            return np.zeros(pfns.size, np.bool_)
        if np.array_equal(pfns, self.fault_pages):
            return np.ones(pfns.size, np.bool_)
        return np.isin(pfns, self.fault_pages)

    def now(self, machine: Machine) -> MigrateVma | None:
        """A copy with the arrays as they are, for a step to carry; None where nobody listens."""
        if not machine.observed:
            return None
        copied = copy.copy(self)
        copied.src, copied.dst = self.src.copy(), self.dst.copy()
        return copied

    def keep(self, which: Bools) -> None:
        """Clear MIGRATE where ``which`` is False."""
        if not which.all():
            self.src[~which] &= ~np.uint64(MIGRATE_PFN_MIGRATE)
            self.count()

    def count(self) -> None:
        """Count the entries that have MIGRATE."""
        self.cpages = int(np.count_nonzero(self.migrating))


# --- several at once ------------------------------------------------------------------------------

#: Flags that a page may have that moves without concern to anybody else.
_USUAL = PG_ANON | PG_ANON_EXCLUSIVE | PG_DIRTY | PG_LRU | PG_SWAPBACKED


def commuting_migrations(
    machine: Machine, vma: Vma, start: int, stop: int, batch: int, flags: int
) -> int:
    """End of the batches from ``start`` on, at least one, that may be taken as one migration.

    Each of their pages is empty, or stays for what it is, or moves for sure: nobody else maps or
    holds it. ``stop`` is within ``vma``. One batch is all there is at any grain but bulk.
    """
    last = min(start + batch, stop)
    if machine.grain < BULK or last == stop or not vma.is_anonymous:
        return last
    if vma.flags & (VM_SPECIAL | VM_HUGETLB) or not series_commute(machine, vma.mm, start, stop):
        return last
    end = min(stop, start + max(BLOCK // batch, 1) * batch)
    root = mm_root(machine, vma.mm)
    end = min([end, *(run.start for run in walk(machine, root, start, end) if run.huge)])
    words = read_range(machine, root, start, end)
    present = is_present(words)
    zero = present & ((words & np.uint64(SPECIAL)) != 0)
    private = absent = ~present
    if absent.any():
        private = is_device_private(words)
    pfns = named_pfn(words)
    chosen = np.zeros(words.size, np.bool_)
    if flags & SELECT_DEVICE_PRIVATE:
        chosen |= private
    if flags & (SELECT_SYSTEM | SELECT_DEVICE_COHERENT):
        chosen |= present & ~zero
    rows = pfn_to_page(machine, pfns)
    alone = machine["page.refcount"][rows] == 1
    alone &= machine["page.mapcount"][rows] == 1
    alone &= (machine["page.flags"][rows] & np.uint32(~_USUAL & 0xFFFFFFFF)) == 0
    alone &= machine["page.compound"][rows] == 0
    alone &= machine["page.swap"][rows] == 0
    odd = chosen & ~alone
    if zero.any():
        odd |= zero & (pfns != ZERO_PFN)
    if absent.any():
        odd |= absent & ~private & (words != 0)
    if odd.any():
        end = start + int(np.argmax(odd))
    if end - start > free_ram(machine):
        return last
    return max(last, end if end == stop else end - (end - start) % batch)


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


@kernel("mm/pagewalk.c")
def walk_page_range(machine: Machine, migrate: MigrateVma, vma: Vma) -> Routine[None]:
    """Collect table by table; where no table is, nothing is there and may be filled."""
    low, high = int(migrate.vpns[0]), int(migrate.vpns[-1]) + 1
    table_by_table = machine.grain < PMD_PAGES
    yield from _split_huge_pages(machine, vma, low, high)
    for run in walk(machine, mm_root(machine, vma.mm), low, high):
        if run.huge:  # it could not be split
            continue
        if run.row < 0:
            pages = LEVEL_PAGES[run.level]
            machine.called("migrate_vma_collect_hole", -(-run.stop // pages) - run.start // pages)
            part = slice(*np.searchsorted(migrate.vpns, (run.start, run.stop)))
            migrate.src[part] = MIGRATE_PFN_MIGRATE if vma.is_anonymous else 0
            migrate.count()
            continue
        at = run.start
        while at < run.stop:  # over page tables, or all at once
            end = (
                min(run.stop, align_down(at, PMD_PAGES) + PMD_PAGES) if table_by_table else run.stop
            )
            part = slice(*np.searchsorted(migrate.vpns, (at, end)))
            row = run.row + at - run.start
            if part.start < part.stop:
                yield from migrate_vma_collect_pmd(machine, migrate, vma, part, row - at)
            at = end


def _split_huge_pages(machine: Machine, vma: Vma, low: int, high: int) -> Routine[None]:
    """Take apart what is huge, pages of zeros and pages of memory."""
    for run in list(walk(machine, mm_root(machine, vma.mm), low, high)):
        if not run.huge:
            continue
        for at in np.arange(align_down(run.start, PMD_PAGES), run.stop, PMD_PAGES).tolist():
            word = machine["pte"][run.row + max(at, run.start) - run.start]
            if word & np.uint64(SPECIAL):
                yield from split_huge_pmd(machine, vma, at)
            else:
                head = int(machine["page.compound"][pfn_of(np.array([word]))[0]])
                yield from split_huge_page(machine, head)


@kernel("mm/migrate_device.c")
def migrate_vma_collect_pmd(
    machine: Machine, migrate: MigrateVma, vma: Vma, part: slice, offset: int
) -> Routine[None]:
    """Look at words, and freeze those that can move behind a migration entry.

    ``part`` of the migration's pages is looked at; the word of page ``vpn`` is in row
    ``vpn + offset``.
    """
    vpns = migrate.vpns[part]
    src = migrate.src[part]
    word_rows = as_rows(vpns + offset)
    words = machine["pte"][word_rows].copy()
    present = is_present(words)
    zero = present & ((words & np.uint64(SPECIAL)) != 0)
    absent = hole = ~present
    if absent.any():
        hole = (words == 0) & vma.is_anonymous
    if migrate.flags & SELECT_SYSTEM:
        hole |= zero
    pfns = named_pfn(words)
    selected = _selected(machine, migrate, words, present & ~zero, pfns)
    rows = pfn_to_page(machine, pfns)
    page_flags = machine["page.flags"][rows]
    selected &= (page_flags & np.uint32(PG_LOCKED)) == 0
    selected &= machine["page.compound"][rows] == 0
    exclusive = selected & ((page_flags & np.uint32(PG_ANON_EXCLUSIVE)) != 0)
    # A page that may be pinned stays exclusive, and so stays where it is.
    pinned = exclusive & (machine["page.refcount"][rows] >= GUP_PIN_COUNTING_BIAS)
    selected &= ~pinned
    exclusive &= ~pinned
    if not isinstance(rows, slice):
        selected &= _first_of_each(pfns, selected)
    writable = (words & np.uint64(RW)) != 0
    if absent.any():
        writable = (present & writable) | (swap_type(words) == SWP_DEVICE_WRITE)
    if hole.any():
        src[hole] = MIGRATE_PFN_MIGRATE
    if machine.observed:
        machine.called_in_turn(
            ("flush_tlb_mm_range", present & (exclusive | pinned)),
            ("page_remove_rmap", selected),
        )
    if selected.any():
        pfns, writable = some(pfns, selected), some(writable, selected)
        at = rows_where(selected)
        entries = migrate_pfn(pfns)
        entries |= np.uint64(MIGRATE_PFN_MIGRATE)
        entries |= writable.astype(np.uint64) << np.uint64(_WRITE_BIT)
        src[at] = entries
        if pfns.size < vpns.size:
            word_rows = as_rows(vpns[selected] + offset)
        freeze(
            machine,
            word_rows,
            some(words, selected),
            pfns,
            writable,
            some(exclusive, selected),
        )
        flush_tlb(machine, int((selected & present).any()))
    frozen, empty = np.count_nonzero(selected), np.count_nonzero(hole)
    migrate.cpages += int(frozen + empty)
    yield machine.step(
        f"{frozen} pages of {{range}} are frozen behind migration entries, "
        f"{empty} are empty and may be filled.",
        vma.mm,
        int(vpns[0]),
        int(vpns[-1]) + 1,
        detail=migrate.now(machine),
    )


def _selected(
    machine: Machine, migrate: MigrateVma, words: Words, normal: Bools, pfns: Pfns
) -> Bools:
    """Which pages are of a kind that the migration collects; ``normal`` ones are present."""
    selected = np.zeros(words.size, np.bool_)
    device = is_zone_device(machine, pfns)
    if migrate.flags & SELECT_SYSTEM:
        selected |= normal & ~device
    if migrate.flags & (SELECT_DEVICE_PRIVATE | SELECT_DEVICE_COHERENT) and device.any():
        owned = of_pagemap(machine, "owner", pfns) == migrate.pgmap_owner
        if migrate.flags & SELECT_DEVICE_COHERENT:
            selected |= normal & device & owned
        if migrate.flags & SELECT_DEVICE_PRIVATE:
            selected |= is_device_private(words) & owned
    return selected


def _first_of_each(pfns: Pfns, among: Bools) -> Bools:
    """Which of ``among`` are the first with their frame: the others find it locked."""
    first = among.copy()
    if among.all() and are_unique(pfns):
        return first
    members = np.flatnonzero(among)
    frames = pfns[members]
    if not are_unique(frames):
        unique, at = np.unique(frames, return_index=True)
        if unique.size != members.size:
            first[:] = False
            first[members[at]] = True
    return first


@kernel("mm/migrate_device.c")
def migrate_device_unmap(machine: Machine, migrate: MigrateVma) -> Routine[None]:
    """Unmap the pages everywhere else, and give up those that somebody holds."""
    lru_add_drain(machine)
    valid = migrate.valid
    if not valid.any():
        return
    pfns = some(migrate.src_pfns, valid)
    rows = pfn_to_page(machine, pfns)
    mapped = machine["page.mapcount"][rows] > 0
    if mapped.any():
        migrate.elsewhere = True
        elsewhere, keys = pfns[mapped], migrate.vpns[valid][mapped]
        with machine.bulk(elsewhere.size if machine.grain > 1 else 1):
            for first, last in machine.chunks(0, elsewhere.size):
                yield from try_to_migrate(machine, elsewhere[first:last], keys[first:last])
    # One reference is ours; the test is by one more generous for device memory and by one for the
    # frame of the fault.
    extra = np.ones(pfns.size, np.int32)
    for more in (
        is_zone_device(machine, pfns),
        migrate.faulted(pfns),
        page_mapping(machine, pfns, rows),
    ):
        extra += more
    mapcount, refcount = machine["page.mapcount"][rows], machine["page.refcount"][rows]
    refused = (mapcount > 0) | (refcount - extra > mapcount)
    if refused.any():
        back = pfns[refused]
        migrate.src[np.flatnonzero(valid)[refused]] = 0
        remove_migration_ptes(machine, back, back)
        set_flags(machine, back, off=PG_LOCKED)
        put_page(machine, back)
        migrate.count()
    vma, vpns = migrate.vma, migrate.vpns
    held = np.count_nonzero(refused)
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
    given = migrate.dst != 0
    migrate.keep(given)
    migrating, valid = migrate.migrating, migrate.valid
    holes = migrating & ~valid
    if holes.any() and migrate.vma is not None:
        yield from _fill_holes(machine, migrate, migrate.vma, np.flatnonzero(holes))
    movers = migrating & valid
    if movers.any():
        src, dst = some(migrate.src_pfns, movers), some(migrate.dst_pfns, movers)
        old = pfn_to_page(machine, src)
        cached = page_mapping(machine, src, old)
        # Exactly the references that we know of: one more than ours and it must stay.
        expected = np.ones(src.size, np.int32)
        expected += migrate.faulted(src)
        expected += cached
        moves = machine["page.refcount"][old] == expected
        # Only private memory can live on a device.
        moves &= ~(cached & is_zone_device(machine, dst))
        if not moves.all():
            stay = np.flatnonzero(movers)[~moves]
            migrate.src[stay] &= ~np.uint64(MIGRATE_PFN_MIGRATE)
            src, dst = src[moves], dst[moves]
            old = pfn_to_page(machine, src)
        new = pfn_to_page(machine, dst)
        ksm_migrate_page(machine, src, dst, old)
        for column in ("mapping", "index"):
            machine.write(f"page.{column}", new, machine[f"page.{column}"][old])
        carried = machine["page.flags"][old] & np.uint32(~(PG_LRU | PG_ANON_EXCLUSIVE) & 0xFFFFFFFF)
        machine.write("page.flags", new, carried | machine["page.flags"][new])
    migrate.count()
    vma, vpns = migrate.vma, migrate.vpns
    yield machine.step(
        f"{migrate.cpages} pages of {{range}} have their new frames.",
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
    page_add_new_anon_rmap(machine, pfns, vma, vpns[holes], noted=True)
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
    src, dst, valid = migrate.src_pfns, migrate.dst_pfns, migrate.valid
    moved = valid & migrate.migrating & (dst != 0)
    busy = valid | (dst != 0)
    pages = [some(array, busy) for array in (migrate.vpns, src, dst, valid, moved)]
    for first, last in machine.chunks(0, pages[0].size):
        _finalize_pages(machine, migrate, *(array[first:last] for array in pages))
    vma, vpns = migrate.vma, migrate.vpns
    yield machine.step(
        f"The migration entries of {{range}} are gone: {np.count_nonzero(moved)} moved, "
        f"{np.count_nonzero(valid & ~moved)} did not.",
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
    unused = (dst != 0) & ~moved
    if unused.any():  # filled holes keep their page through its own reference
        set_flags(machine, dst[unused], off=PG_LOCKED)
        put_page(machine, dst[unused])
    if valid.any():
        old, new = some(src, valid), some(dst if moved.all() else np.where(moved, dst, src), valid)
        system = ~is_zone_device(machine, new)
        if system.any():
            set_flags(machine, some(new, system), PG_LRU)
        remove_migration_ptes(machine, old, new, migrate.places(machine, some(vpns, valid)))
        rows = pfn_to_page(machine, old)
        set_flags(machine, old, off=PG_LOCKED, rows=rows)
        put_page(machine, old, rows)
    if moved.any():
        new = some(dst, moved)
        rows = pfn_to_page(machine, new)
        set_flags(machine, new, off=PG_LOCKED, rows=rows)
        put_page(machine, new, rows)


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
        migrate.count()
    yield from migrate_device_unmap(machine, migrate)
    return migrate


@kernel("mm/migrate_device.c", "migrate_device_coherent_page")
def migrate_device_coherent_pages(machine: Machine, pfns: Pfns) -> Routine[None]:
    """Bring device-coherent frames home to RAM, where they can be pinned, one by one."""
    migrate = MigrateVma(None, np.arange(pfns.size), 0, 0)
    get_page(machine, pfns)
    set_flags(machine, pfns, PG_LOCKED)
    migrate.src[:] = migrate_pfn(pfns) | np.uint64(MIGRATE_PFN_MIGRATE)
    migrate.count()
    with machine.bulk(pfns.size):
        yield from migrate_device_unmap(machine, migrate)
    wanted = np.flatnonzero(migrate.migrating)
    new = alloc_pages(machine, wanted.size)
    set_flags(machine, new, PG_LOCKED)
    content = machine["page.content"][page_rows(machine, pfns[wanted])]
    machine.write("page.content", as_rows(new), content)
    migrate.dst[wanted] = migrate_pfn(new)
    yield from _migrate_pages(machine, migrate)
    yield from _finalize(machine, migrate)
