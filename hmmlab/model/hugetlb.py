"""hugetlb: huge pages of 2 MiB from a pool that was set aside at boot.

A mapping of hugetlb reserves its pages in the pool when it is made, and holds nothing else than
huge pages: it cannot be cut inside of one. As for other huge pages, the PMD word has the HUGE bit
and the table behind it holds the words that it stands for. The pool holds one reference to each
frame of its pages, so a page without any other is free.

Source: mm/hugetlb.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.anon_vma import anon_vma_prepare
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    RW,
    Bools,
    Pfns,
    Words,
    pfn_of,
    present_word,
    with_protection,
)
from hmmlab.model.geometry import PMD_PAGES, align_down
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import (
    Vma,
    find_vmas_of_file,
    is_cow_mapping,
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
    folio_maybe_dma_pinned,
    frames_of,
    pfn_to_page,
    set_flags,
)
from hmmlab.model.page_alloc import alloc_huge_pages, node_of
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.page_table import (
    alloc_tables,
    drop_table,
    is_huge,
    rows_of_range,
    set_huge,
    walk,
)
from hmmlab.model.rmap import hugepage_add_new_anon_rmap, page_dup_rmap, page_remove_rmap
from hmmlab.model.rows import as_rows
from hmmlab.model.state import State
from hmmlab.model.tlb import MmuGather, ptep_clear_flush_notify

__all__ = [
    "POOL",
    "clear_vma_resv_huge_pages",
    "copy_hugetlb_page_range",
    "dequeue_huge_page",
    "hugetlb_change_protection",
    "hugetlb_fault",
    "hugetlb_reserve_pages",
    "hugetlb_vm_op_close",
    "is_hugetlb",
    "move_hugetlb_page_tables",
    "pool_heads",
    "replace_huge_page",
    "unmap_hugepage_range",
]

#: Huge pages of the pool, half of them on each node.
POOL = 16

_UNMAPPED = -1

Machine.declare("hugetlb.head", np.int64, "first frame of each page of the pool, once it was used")
Machine.declare("hugetlb.reserved", np.int64, "pages of the pool that are promised to mappings")
Machine.declare("resv.used", np.uint64, "huge pages of a reservation that were taken, a bit each")


# --- the pool -------------------------------------------------------------------------------------


def pool_heads(state: State) -> Pfns:
    """First frames of the pool's pages; none before the first mapping of hugetlb."""
    heads = state["hugetlb.head"]
    return heads[heads > 0]


def is_hugetlb(state: State, rows: Pfns) -> Bools:
    """Whether frames of RAM, by row, belong to the pool."""
    heads = state["page.compound"][rows]
    return (heads != 0) & np.isin(heads, pool_heads(state))


def _free_heads(state: State) -> Pfns:
    heads = pool_heads(state)
    references = state["page.refcount"][frames_of(heads)].reshape(heads.size, PMD_PAGES)
    return heads[(references == 1).all(axis=1)]


def _available(state: State) -> int:
    """Pages of the pool that are free and promised to nobody."""
    return int(_free_heads(state).size - state["hugetlb.reserved"][0])


def _fill_pool(machine: Machine) -> None:
    """Take the pool's pages from RAM, before the first of them is asked for.

    Linux does so at boot; a small machine has a small pool.
    """
    share = min(POOL // 2, machine.ram_pages // PMD_PAGES // 8)
    heads = np.concatenate([alloc_huge_pages(machine, share, node) for node in (0, 1)])
    machine.write("hugetlb.head", slice(1, 1 + heads.size), heads)


def dequeue_huge_page(machine: Machine, node: int = 0, *, only: bool = False) -> int:
    """First frame of a page of the pool, zeroed and referenced once more; 0 when none is free.

    It comes from ``node`` or, unless ``only`` that will do, from the other.
    """
    for zone in (node,) if only else (node, 1 - node):
        free = _free_heads(machine)
        free = free[node_of(machine, free) == zone]
        if free.size:
            pfns = frames_of(free[:1])
            for column in ("flags", "content", "mapping", "index"):
                machine.write(f"page.{column}", as_rows(pfns), 0)
            get_page(machine, pfns)
            return int(free[0])
    return 0


def replace_huge_page(machine: Machine, head: int, node: int) -> int:
    """First frame of a page on ``node`` that may take the place of the pool's page ``head``.

    It is a free one that nobody was promised, or else a new one, which belongs to the pool from now
    on, in place of the other; 0 when RAM has none.
    """
    if _available(machine) > 0:
        free = dequeue_huge_page(machine, node, only=True)
        if free:
            return free
    fresh = alloc_huge_pages(machine, 1, node)
    if not fresh.size:
        return 0
    heads = machine["hugetlb.head"]
    machine.write("hugetlb.head", int(np.flatnonzero(heads == head)[0]), int(fresh[0]))
    get_page(machine, frames_of(fresh))
    put_page(machine, head + np.arange(PMD_PAGES))
    return int(fresh[0])


# --- reservations ---------------------------------------------------------------------------------


def hugetlb_reserve_pages(machine: Machine, pages: int) -> int:
    """Reserve a mapping's pages in the pool. Returns the reservation's number, 0 for none."""
    wanted = pages // PMD_PAGES
    if not pool_heads(machine).size:
        _fill_pool(machine)
    if wanted > _available(machine):
        return 0
    machine.add("hugetlb.reserved", 0, wanted)
    number = machine.take("resv.users")
    machine.write("resv.users", number, 1)
    machine.write("resv.used", number, 0)
    return number


def _bit(vma: Vma, vpn: int) -> np.uint64:
    return np.uint64(1 << (vma.pgoff_of(vpn) // PMD_PAGES % 64))


def hugetlb_vm_op_close(machine: Machine, vma: Vma) -> None:
    """A mapping goes: what it has reserved and not taken is promised no more."""
    number = int(machine["vma.resv"][vma.row])
    if number > 0:
        used = int(machine["resv.used"][number])
        blocks = range(vma.start, vma.end, PMD_PAGES)
        unused = sum(not used & int(_bit(vma, at)) for at in blocks)
        machine.add("hugetlb.reserved", 0, -unused)
        clear_vma_resv_huge_pages(machine, vma)


def clear_vma_resv_huge_pages(machine: Machine, vma: Vma) -> None:
    """Let a mapping have no part in its reservation any more; another one has it."""
    number = int(machine["vma.resv"][vma.row])
    if number > 0:
        machine.add("resv.users", number, -1)
    machine.write("vma.resv", vma.row, 0)


def _alloc_huge_page(machine: Machine, vma: Vma, vpn: int, *, avoid_reserve: bool = False) -> int:
    """A page of the pool for ``vpn``: the reserved one, or one that is promised to nobody, or 0."""
    number = int(machine["vma.resv"][vma.row])
    used = machine["resv.used"][number] if number > 0 else np.uint64(0)
    reserved = number > 0 and not used & _bit(vma, vpn) and not avoid_reserve
    if not reserved and _available(machine) <= 0:
        return 0
    head = dequeue_huge_page(machine)
    if head and reserved:
        machine.add("hugetlb.reserved", 0, -1)
    if head and number > 0:
        machine.write("resv.used", number, used | _bit(vma, vpn))
    return head


# --- faults ---------------------------------------------------------------------------------------


@kernel("mm/hugetlb.c")
def hugetlb_fault(machine: Machine, vma: Vma, vpn: int, write: bool) -> Routine[bool]:
    """Make the huge page around ``vpn`` present, or writable. False when the pool has none left."""
    root, first = mm_root(machine, vma.mm), align_down(vpn, PMD_PAGES)
    if not is_huge(machine, root, first):
        return (yield from _hugetlb_no_page(machine, vma, first, write))
    rows = rows_of_range(machine, root, first, first + PMD_PAGES)
    words = machine["pte"][rows]
    if write and not words[0] & np.uint64(RW):
        return (yield from _hugetlb_wp(machine, vma, first))
    machine.write("pte", rows, words | np.uint64(ACCESSED | (DIRTY if write else 0)))
    yield machine.step("The huge page of {range} is there already.", vma.mm, vpn, vpn + 1)
    return True


def _hugetlb_no_page(machine: Machine, vma: Vma, first: int, write: bool) -> Routine[bool]:
    head = 0
    if machine["vma.resv"][vma.row] != _UNMAPPED:
        head = _alloc_huge_page(machine, vma, first)
    if not head:
        return False
    vma = anon_vma_prepare(machine, vma)
    vpns = first + np.arange(PMD_PAGES)
    pfns = head + np.arange(PMD_PAGES)
    hugepage_add_new_anon_rmap(machine, pfns, vma, vpns)
    _map(machine, vma.mm, first, present_word(pfns, _prot(vma, write)))
    yield machine.step(
        "First touch around {range}: a huge page of the pool is mapped.", vma.mm, first, first + 1
    )
    return True


def _prot(vma: Vma, writable: bool) -> int:
    return vm_page_prot(vma.flags) | (DIRTY | RW if writable else 0)


def _map(machine: Machine, mm: int, first: int, words: Words) -> None:
    root = mm_root(machine, mm)
    alloc_tables(machine, root, first, first + PMD_PAGES)
    set_huge(machine, root, first, huge=True)
    machine.write("pte", rows_of_range(machine, root, first, first + PMD_PAGES), words)


def _hugetlb_wp(machine: Machine, vma: Vma, first: int) -> Routine[bool]:
    """A write to a page that may not be written: reuse it where nobody else maps it, or copy it."""
    root, last = mm_root(machine, vma.mm), first + PMD_PAGES
    rows = rows_of_range(machine, root, first, last)
    while True:
        words = machine["pte"][rows].copy()
        old = pfn_of(words)
        if machine["page.mapcount"][old[0]] == 1:
            if not machine["page.flags"][old[0]] & PG_ANON_EXCLUSIVE:
                set_flags(machine, old, PG_ANON_EXCLUSIVE)
                machine.write("page.mapping", as_rows(old), vma.anon_vma)
            machine.write("pte", rows, words | np.uint64(ACCESSED | DIRTY | RW))
            yield machine.step(
                "Nobody else maps the huge page of {range}: it becomes writable in place.",
                vma.mm,
                first,
                last,
            )
            return True
        owner = bool(machine["vma.resv"][vma.row] > 0)
        head = _alloc_huge_page(machine, vma, first, avoid_reserve=owner)
        if head:
            break
        if not owner:
            return False
        yield from _unmap_ref_private(machine, vma, first, int(old[0]))
    vma = anon_vma_prepare(machine, vma)
    new = head + np.arange(PMD_PAGES)
    machine.write("page.content", as_rows(new), machine["page.content"][old])
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, first, last, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    ptep_clear_flush_notify(machine, vma.mm)
    page_remove_rmap(machine, old, huge=True)
    hugepage_add_new_anon_rmap(machine, new, vma, first + np.arange(PMD_PAGES))
    machine.write("pte", rows, present_word(new, _prot(vma, writable=True)))
    yield machine.step("A huge page of its own for {range}.", vma.mm, first, last)
    yield from invalidate_range_end(machine, range)
    put_page(machine, old)
    return True


def _unmap_ref_private(machine: Machine, vma: Vma, first: int, head: int) -> Routine[None]:
    """The pool is empty: who made the mapping takes the page from those who share it by fork."""
    offset = vma.pgoff_of(first)
    for row in find_vmas_of_file(machine, vma.file):
        other = vma_at(machine, row)
        at = other.start + offset - other.pgoff
        if row == vma.row or not other.start <= at < other.end or machine["vma.resv"][row] > 0:
            continue
        # The kernel takes the address of the fault for both: fork keeps addresses.
        tlb = MmuGather(machine, other.mm)
        yield from unmap_hugepage_range(machine, tlb, other, first, first + PMD_PAGES, only=head)
        tlb.finish()


# --- taking away ----------------------------------------------------------------------------------


@kernel("mm/hugetlb.c", "__unmap_hugepage_range")
def unmap_hugepage_range(
    machine: Machine, tlb: MmuGather, vma: Vma, start: int, stop: int, *, only: int = 0
) -> Routine[None]:
    """Unmap huge pages inside one UNMAP; ``only`` that page where it is given.

    A mapping that loses its page so may not have another: a fault there is deadly.
    """
    range = MmuNotifierRange.one(vma.mm, Event.UNMAP, start, stop, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    root = mm_root(machine, vma.mm)
    for run in list(walk(machine, root, start, stop)):
        for at in np.arange(run.start, run.stop, PMD_PAGES).tolist() if run.huge else ():
            rows = rows_of_range(machine, root, at, at + PMD_PAGES)
            pfns = pfn_of(machine["pte"][rows])
            if only and pfns[0] != only:
                continue
            if only:
                machine.write("vma.resv", vma.row, _UNMAPPED)
            machine.write("pte", rows, 0)
            drop_table(machine, root, at)
            pages = pfn_to_page(machine, pfns)
            page_remove_rmap(machine, pfns, huge=True, rows=pages)
            tlb.remove_pages(pfns, pages, huge=True)
    yield machine.step("{range}: huge pages are no longer mapped.", vma.mm, start, stop)
    yield from invalidate_range_end(machine, range)


# --- fork, mprotect, mremap -----------------------------------------------------------------------


@kernel("mm/hugetlb.c")
def copy_hugetlb_page_range(machine: Machine, child: Vma, vma: Vma) -> Routine[None]:
    """Let a child map what its parent maps, inside a CLEAR of the whole mapping.

    A page that may be pinned is copied for the child.

    Raises
    ------
    KernelError
        ENOMEM when the pool has no page for such a copy.
    """
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, vma.start, vma.end, vma=vma.row)
    if is_cow_mapping(vma.flags):
        yield from invalidate_range_start(machine, range)
    for run in list(walk(machine, mm_root(machine, vma.mm), vma.start, vma.end)):
        for at in np.arange(run.start, run.stop, PMD_PAGES).tolist() if run.huge else ():
            try:
                _copy_huge_page(machine, child, vma, at)
            except KernelError:
                if is_cow_mapping(vma.flags):
                    yield from invalidate_range_end(machine, range)
                raise
            yield machine.step("The child maps {range} too.", vma.mm, at, at + PMD_PAGES)
    if is_cow_mapping(vma.flags):
        yield from invalidate_range_end(machine, range)


def _copy_huge_page(machine: Machine, child: Vma, vma: Vma, first: int) -> None:
    rows = rows_of_range(machine, mm_root(machine, vma.mm), first, first + PMD_PAGES)
    words = machine["pte"][rows].copy()
    pfns = pfn_of(words)
    exclusive = bool(machine["page.flags"][pfns[0]] & PG_ANON_EXCLUSIVE)
    if exclusive and folio_maybe_dma_pinned(machine, pfns[:1])[0]:
        head = _alloc_huge_page(machine, child, first, avoid_reserve=True)
        if not head:
            raise KernelError(12, "the pool has no huge page for the child")
        new = head + np.arange(PMD_PAGES)
        machine.write("page.content", as_rows(new), machine["page.content"][pfns])
        hugepage_add_new_anon_rmap(machine, new, child, first + np.arange(PMD_PAGES))
        _map(machine, child.mm, first, present_word(new, _prot(child, writable=True)))
        return
    get_page(machine, pfns)
    page_dup_rmap(machine, pfns)
    words &= ~np.uint64(RW)
    machine.write("pte", rows, words)
    _map(machine, child.mm, first, words)


@kernel("mm/hugetlb.c")
def hugetlb_change_protection(machine: Machine, vma: Vma, start: int, stop: int) -> Routine[None]:
    """Change words, inside one PROTECTION_VMA of the range, whether anything is mapped or not."""
    tlb = MmuGather(machine, vma.mm)
    range = MmuNotifierRange.one(vma.mm, Event.PROTECTION_VMA, start, stop, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    for run in list(walk(machine, mm_root(machine, vma.mm), start, stop)):
        if run.huge:
            rows = slice(run.row, run.row + run.stop - run.start)
            words = with_protection(machine["pte"][rows], vm_page_prot(vma.flags))
            machine.write("pte", rows, words)
            tlb.cleared = True
    tlb.flush_only()
    yield machine.step(
        f"{{range}}: the huge pages have the rights of {vma.permissions} now.", vma.mm, start, stop
    )
    yield from invalidate_range_end(machine, range)
    tlb.finish(nested=True)  # mprotect has a gather of its own


@kernel("mm/hugetlb.c")
def move_hugetlb_page_tables(
    machine: Machine, vma: Vma, start: int, stop: int, to: int
) -> Routine[None]:
    """Move huge pages to page ``to`` on, inside one CLEAR of the old place."""
    tlb = MmuGather(machine, vma.mm)
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, start, stop, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    root = mm_root(machine, vma.mm)
    for run in list(walk(machine, root, start, stop)):
        for at in np.arange(run.start, run.stop, PMD_PAGES).tolist() if run.huge else ():
            rows = rows_of_range(machine, root, at, at + PMD_PAGES)
            words = machine["pte"][rows].copy()
            machine.write("pte", rows, 0)
            drop_table(machine, root, at)
            _map(machine, vma.mm, at + to - start, words)
            tlb.cleared = True
    tlb.flush_only()
    yield machine.step("What {range} held has moved to its new place.", vma.mm, start, stop)
    yield from invalidate_range_end(machine, range)
    tlb.finish()
