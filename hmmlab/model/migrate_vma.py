"""A migration, and which pages it takes: how they are collected, how many at once.

Source: include/linux/migrate.h, mm/migrate_device.c.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np

from hmmlab.model.alike import all_of, any_of, how_many, rows_where, some
from hmmlab.model.entry import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    RW,
    SPECIAL,
    SWP_DEVICE_WRITE,
    Bools,
    Pfns,
    Words,
    is_device_private,
    is_present,
    marks_and_pfns,
    migrate_flags,
    migrate_pfn,
    migrate_pfn_to_pfn,
    pfn_of,
    swap_type,
)
from hmmlab.model.geometry import LEVEL_PAGES, PMD_PAGES, align_down
from hmmlab.model.huge_memory import split_huge_pmd
from hmmlab.model.machine import BLOCK, BULK, Machine, Routine, kernel
from hmmlab.model.memremap import of_pagemap
from hmmlab.model.migration import Places, freeze, split_huge_page
from hmmlab.model.mm_types import VM_HUGETLB, VM_SPECIAL, Vma, mm_root
from hmmlab.model.mmu_notifier import series_commute
from hmmlab.model.page import (
    GUP_PIN_COUNTING_BIAS,
    PG_ANON,
    PG_ANON_EXCLUSIVE,
    PG_DIRTY,
    PG_LOCKED,
    PG_LRU,
    PG_SWAPBACKED,
    ZERO_PFN,
    is_zone_device,
    pfn_to_page,
)
from hmmlab.model.page_alloc import free_ram
from hmmlab.model.page_table import read_range, rows_of, walk
from hmmlab.model.rows import Rows, are_unique
from hmmlab.model.tlb import flush_tlb

__all__ = [
    "SELECT_DEVICE_COHERENT",
    "SELECT_DEVICE_PRIVATE",
    "SELECT_SYSTEM",
    "MigrateVma",
    "commuting_migrations",
    "walk_page_range",
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
        How many entries of ``src`` had MIGRATE when it was set up; ``migrate_vma_pages`` may refuse
        some of them yet.
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
    def src_pfns(self) -> Pfns:
        """Frame of each entry of ``src``; 0 where it names none."""
        return migrate_pfn_to_pfn(self.src)

    @property
    def dst_pfns(self) -> Pfns:
        """Frame of each entry of ``dst``; 0 where the driver gave none."""
        return migrate_pfn_to_pfn(self.dst)

    def valid_and_migrating(self) -> tuple[Bools, Bools]:
        """Which entries of ``src`` name a page, and which have MIGRATE; each maybe one for all."""
        flags = migrate_flags(self.src)
        valid: Bools = (flags & np.uint8(MIGRATE_PFN_VALID)) != 0
        return valid, (flags & np.uint8(MIGRATE_PFN_MIGRATE)) != 0

    def places(self, machine: Machine, vpns: Pfns) -> Places | None:
        """Where the migration entries of some pages are, unless the reverse mapping must tell."""
        if self.vma is None or self.elsewhere:
            return None
        rows = rows_of(machine, mm_root(machine, self.vma.mm), vpns)
        return Places(self.vma.row, vpns, rows)

    def faulted(self, pfns: Pfns) -> Bools:
        """Which of ``pfns`` the CPU is faulting on, or one for all."""
        if not self.fault_pages.size:
            return np.array([False])
        if np.array_equal(pfns, self.fault_pages):
            return np.array([True])
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
        if not all_of(which):
            self.src[~which] &= ~np.uint64(MIGRATE_PFN_MIGRATE)

    def marked(self) -> int:
        """How many entries of ``src`` have MIGRATE now."""
        return how_many(self.valid_and_migrating()[1], self.vpns.size)


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
    marks, pfns = marks_and_pfns(words)
    present = is_present(marks)
    zero = present & ((marks & np.uint64(SPECIAL)) != 0)
    private = ~present & is_device_private(marks)
    chosen = np.array([False])
    if flags & SELECT_DEVICE_PRIVATE:
        chosen = private
    if flags & (SELECT_SYSTEM | SELECT_DEVICE_COHERENT):
        chosen = chosen | (present & ~zero)
    rows = pfn_to_page(machine, pfns)
    alone = machine.alike("page.refcount", rows) == 1
    alone = alone & (machine.alike("page.mapcount", rows) == 1)
    unusual = machine.alike("page.flags", rows) & np.uint32(~_USUAL & 0xFFFFFFFF)
    alone = alone & (unusual == 0)
    for column in ("compound", "swap"):
        alone = alone & (machine.alike(f"page.{column}", rows) == 0)
    odd = chosen & ~alone
    if any_of(zero):
        odd = odd | (zero & (pfns != ZERO_PFN))
    if not all_of(present):
        odd = odd | (~present & ~private & (marks != 0))
    if any_of(odd):
        end = start + int(np.argmax(odd))
    if end - start > free_ram(machine):
        return last
    return max(last, end if end == stop else end - (end - start) % batch)


# --- collecting -----------------------------------------------------------------------------------


@kernel("mm/pagewalk.c")
def walk_page_range(machine: Machine, migrate: MigrateVma, vma: Vma) -> Routine[None]:
    """Collect table by table; where no table is, nothing is there and may be filled."""
    low, high = int(migrate.vpns[0]), int(migrate.vpns[-1]) + 1
    table_by_table = machine.grain < PMD_PAGES
    for run in list(walk(machine, mm_root(machine, vma.mm), low, high)):
        if run.row < 0:
            pages = LEVEL_PAGES[run.level]
            machine.called("migrate_vma_collect_hole", -(-run.stop // pages) - run.start // pages)
            part = slice(*np.searchsorted(migrate.vpns, (run.start, run.stop)))
            migrate.src[part] = MIGRATE_PFN_MIGRATE if vma.is_anonymous else 0
            migrate.cpages = migrate.marked()
            continue
        at = run.start
        while at < run.stop:  # over page tables, or all at once
            end = run.stop
            if table_by_table or run.huge:
                end = min(end, align_down(at, PMD_PAGES) + PMD_PAGES)
            part = slice(*np.searchsorted(migrate.vpns, (at, end)))
            row = run.row + at - run.start
            if part.start < part.stop:
                yield from migrate_vma_collect_pmd(
                    machine, migrate, vma, part, row - at, huge=run.huge
                )
            at = end


def _split_huge(machine: Machine, vma: Vma, vpn: int, row: int) -> Routine[bool]:
    """Take apart what a PMD word maps, the page of zeros or memory. Returns whether it is."""
    word = machine["pte"][row]
    if word & np.uint64(SPECIAL):
        yield from split_huge_pmd(machine, vma, align_down(vpn, PMD_PAGES))
        return True
    head = int(machine["page.compound"][pfn_of(np.array([word]))[0]])
    return (yield from split_huge_page(machine, head))


@kernel("mm/migrate_device.c")
def migrate_vma_collect_pmd(
    machine: Machine, migrate: MigrateVma, vma: Vma, part: slice, offset: int, *, huge: bool = False
) -> Routine[None]:
    """Look at words, and freeze those that can move behind a migration entry.

    ``part`` of the migration's pages is looked at; the word of page ``vpn`` is in row
    ``vpn + offset``. A ``huge`` PMD word is split first.
    """
    vpns = migrate.vpns[part]
    if huge and not (yield from _split_huge(machine, vma, int(vpns[0]), int(vpns[0]) + offset)):
        return
    src = migrate.src[part]
    word_rows = _rows_of_ascending(vpns, offset)
    words = machine["pte"][word_rows]
    marks, pfns = marks_and_pfns(words)
    present = is_present(marks)
    zero = present & ((marks & np.uint64(SPECIAL)) != 0)
    hole = (marks == 0) & vma.is_anonymous
    if migrate.flags & SELECT_SYSTEM:
        hole = hole | zero
    rows = pfn_to_page(machine, pfns)
    selected = _selected(machine, migrate, marks, present & ~zero, pfns, rows)
    flags = machine.alike("page.flags", rows)
    selected = selected & ((flags & np.uint32(PG_LOCKED)) == 0)
    selected = selected & (machine.alike("page.compound", rows) == 0)
    exclusive = selected & ((flags & np.uint32(PG_ANON_EXCLUSIVE)) != 0)
    # A page that may be pinned stays exclusive, and so stays where it is.
    pinned = exclusive & (machine.alike("page.refcount", rows) >= GUP_PIN_COUNTING_BIAS)
    selected = selected & ~pinned
    exclusive = exclusive & ~pinned
    if not isinstance(rows, slice):
        selected = _first_of_each(pfns, np.broadcast_to(selected, pfns.shape))
    writable = present & ((marks & np.uint64(RW)) != 0)
    if not all_of(present):
        writable = writable | (swap_type(marks) == SWP_DEVICE_WRITE)
    if any_of(hole):
        src[rows_where(hole, vpns.size)] = MIGRATE_PFN_MIGRATE
    if machine.observed:
        flushed, removed = present & (exclusive | pinned), selected
        machine.called_in_turn(
            ("flush_tlb_mm_range", np.broadcast_to(flushed, vpns.shape)),
            ("page_remove_rmap", np.broadcast_to(removed, vpns.shape)),
        )
    frozen, empty = how_many(selected, vpns.size), how_many(hole, vpns.size)
    if frozen:
        at = rows_where(selected, vpns.size)
        pfns, writable = some(pfns, selected), some(writable, selected)
        migrated = writable.astype(np.uint64) << np.uint64(_WRITE_BIT)
        src[at] = migrate_pfn(pfns, migrated | np.uint64(MIGRATE_PFN_MIGRATE))
        if frozen < vpns.size:
            word_rows = _rows_of_ascending(vpns[at], offset)
            rows = pfn_to_page(machine, pfns)
        marks, exclusive = some(marks, selected), some(exclusive, selected)
        freeze(machine, word_rows, marks, pfns, rows, writable, exclusive)
        flush_tlb(machine, int((selected & present).any()))
    migrate.cpages += frozen + empty
    yield machine.step(
        f"{frozen} pages of {{range}} are frozen behind migration entries, "
        f"{empty} are empty and may be filled.",
        vma.mm,
        int(vpns[0]),
        int(vpns[-1]) + 1,
        detail=migrate.now(machine),
    )


def _rows_of_ascending(vpns: Pfns, offset: int) -> Rows:
    """Rows ``vpns + offset``, as a slice where they follow one another; that the ends tell."""
    first, last = int(vpns[0]) + offset, int(vpns[-1]) + offset
    return slice(first, last + 1) if last - first == vpns.size - 1 else vpns + offset


def _selected(
    machine: Machine, migrate: MigrateVma, marks: Words, normal: Bools, pfns: Pfns, rows: Rows
) -> Bools:
    """Which pages are of a kind that the migration collects; ``normal`` ones are present."""
    selected = np.array([False])
    device = is_zone_device(machine, pfns, rows)
    if migrate.flags & SELECT_SYSTEM:
        selected = normal & ~device
    if migrate.flags & (SELECT_DEVICE_PRIVATE | SELECT_DEVICE_COHERENT) and any_of(device):
        owned = of_pagemap(machine, "owner", pfns, rows) == migrate.pgmap_owner
        if migrate.flags & SELECT_DEVICE_COHERENT:
            selected = selected | (normal & device & owned)
        if migrate.flags & SELECT_DEVICE_PRIVATE:
            selected = selected | (is_device_private(marks) & owned)
    return selected


def _first_of_each(pfns: Pfns, among: Bools) -> Bools:
    """Which of ``among`` are the first with their frame: the others find it locked."""
    first = among.copy()
    if all_of(among) and are_unique(pfns):
        return first
    members = np.flatnonzero(among)
    frames = pfns[members]
    if not are_unique(frames):
        unique, at = np.unique(frames, return_index=True)
        if unique.size != members.size:
            first[:] = False
            first[members[at]] = True
    return first
