"""Moving pages between the two NUMA nodes.

Source: mm/migrate.c (``do_pages_move``, ``migrate_pages``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import SPECIAL, Bools, Pfns, is_present, pfn_of
from hmmlab.model.filemap import replace_in_cache
from hmmlab.model.hugetlb import is_hugetlb, replace_huge_page
from hmmlab.model.lru import lru_add_drain
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.migration import remove_migration_ptes, try_to_migrate
from hmmlab.model.mm_types import mm_lock, mm_root, vmas_in
from hmmlab.model.page import (
    PG_ANON_EXCLUSIVE,
    PG_LOCKED,
    PG_LRU,
    frames_of,
    is_zone_device,
    page_mapping,
    page_rows,
    set_flags,
)
from hmmlab.model.page_alloc import alloc_huge_pages, alloc_pages, node_of
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.page_table import read_range
from hmmlab.model.rmap import ksm_migrate_page
from hmmlab.model.rows import as_rows
from hmmlab.model.swap import replace_in_swap_cache

__all__ = ["sys_move_pages"]

_ENOENT, _EACCES, _EFAULT, _EBUSY = 2, 13, 14, 16

#: How often a page is tried (``NR_MAX_MIGRATE_PAGES_RETRY``).
_PASSES = 10


@kernel("mm/migrate.c", "__x64_sys_move_pages")
def sys_move_pages(
    machine: Machine, mm: int, start: int, stop: int, node: int
) -> Routine[tuple[int, NDArray[np.int64]]]:
    """Move pages ``start`` to ``stop - 1`` to ``node``, those that only this process maps.

    Returns
    -------
    How many could not be moved, and the status of each page, int64 of shape (stop - start,): the
    node where it is, or minus the errno; 0 where nothing was written.
    """
    status = np.zeros(stop - start, np.int64)
    lru_add_drain(machine, 0)  # lru_cache_disable: nothing waits in a batch meanwhile
    lock = mm_lock(machine, mm)
    yield from machine.down_read(lock)
    try:
        codes, pfns = _look(machine, mm, start, stop, node)
        at = 0
        while at < codes.size:
            end = at + int(np.argmax(codes[at:] <= 0)) if (codes[at:] <= 0).any() else codes.size
            if end < codes.size:
                status[end] = codes[end] if codes[end] else node
            if end > at:
                vpns = np.arange(start + at, start + end)
                failed = yield from _move(machine, pfns[at:end], vpns, node)
                if failed:
                    return failed + codes.size - min(end + 1, codes.size), status
                status[at:end] = node
            at = end + 1
        yield machine.step(f"{{range}} was to move to node {node}.", mm, start, stop)
    finally:
        machine.up_read(lock)
    return 0, status


def _look(
    machine: Machine, mm: int, start: int, stop: int, node: int
) -> tuple[NDArray[np.int64], Pfns]:
    """For each page 1 when it can be queued, 0 when it is there, or minus an errno; its frame."""
    codes = np.full(stop - start, -_EFAULT)
    words = read_range(machine, mm_root(machine, mm), start, stop)
    normal = is_present(words) & ((words & SPECIAL) == 0)
    pfns = np.where(normal, pfn_of(words), 0)
    rows = page_rows(machine, pfns)
    for vma in vmas_in(machine, mm, start, stop):
        part = slice(max(vma.start, start) - start, min(vma.end, stop) - start)
        empty = (words[part] == 0) | (is_present(words[part]) & ~normal[part])
        codes[part] = np.where(empty & vma.is_anonymous, -_EFAULT, -_ENOENT)
    usable = normal & ~is_zone_device(machine, pfns)
    codes[usable] = 1
    codes[usable & (machine["page.mapcount"][rows] > 1)] = -_EACCES
    codes[usable & (node_of(machine, pfns) == node)] = 0
    # Pages of a device file are in no list from which they could be taken.
    heads = machine["page.compound"][rows]
    pool = is_hugetlb(machine, rows)
    codes[(codes == 1) & ((machine["page.flags"][rows] & PG_LRU) == 0) & ~pool] = -_EBUSY
    tails = np.flatnonzero((codes == 1) & pool & (heads != pfns))
    queued = pfns[(codes == 1) & pool & (heads == pfns)]
    # A tail is refused; but that moves the queue, and then the other tails are there.
    first = np.diff(heads[tails], prepend=-1) != 0
    codes[tails] = np.where(first | ~np.isin(heads[tails], queued), -_EACCES, 0)
    queued = np.flatnonzero((codes == 1) & (heads != 0))
    if queued.size > 1:
        # A huge page that waits in the queue cannot be queued again; but that moves the queue, and
        # then its other parts are there.
        moves = np.cumsum(codes <= 0)
        _, leads, which = np.unique(heads[queued], return_index=True, return_inverse=True)
        place = np.arange(queued.size) - leads[which]
        waits = (place == 1) & (moves[queued] == moves[queued[leads]][which])
        codes[queued[place > 0]] = 0
        codes[queued[waits]] = -_EBUSY
    return codes, pfns


@kernel("mm/migrate.c", "migrate_pages")
def _move(machine: Machine, pfns: Pfns, vpns: Pfns, node: int) -> Routine[int]:
    """Move frames to ``node``, trying those that are held again and again; returns how many are."""
    heads = machine["page.compound"][page_rows(machine, pfns)]
    left, keys, huge = pfns, vpns, heads
    for _ in range(_PASSES):
        kept = np.zeros(left.size, np.bool_)
        small = np.flatnonzero(huge == 0)
        for first, last in machine.chunks(0, small.size):
            part = small[first:last]
            with machine.bulk(part.size):
                kept[part] = yield from _move_small(machine, left[part], keys[part], node)
        for number in np.flatnonzero(huge != 0).tolist():  # over huge pages
            kept[number] = yield from _move_huge(
                machine, int(huge[number]), int(keys[number]), node
            )
        left, keys, huge = left[kept], keys[kept], huge[kept]
        if not left.size:
            break
    return int(left.size)


def _move_small(machine: Machine, pfns: Pfns, vpns: Pfns, node: int) -> Routine[Bools]:
    get_page(machine, pfns)
    yield from try_to_migrate(machine, pfns, vpns)
    held = _held(machine, pfns)
    new, _ = alloc_pages(machine, int((~held).sum()), node)
    _take_over(machine, pfns[~held], new, vpns[~held], drains=new.size)
    _put_back(machine, pfns[held])
    put_page(machine, pfns)
    return held


def _move_huge(machine: Machine, head: int, vpn: int, node: int) -> Routine[bool]:
    pfns = frames_of(np.array([head]))
    mine = machine["page.compound"][pfns] == head  # a part that is gone may be somebody else's
    pfns = pfns[mine & (machine["page.refcount"][pfns] > 0)]
    of_pool = bool(is_hugetlb(machine, pfns[:1])[0])
    get_page(machine, pfns)
    yield from try_to_migrate(machine, pfns, np.full(pfns.size, vpn), huge=True)
    if _held(machine, pfns, int(of_pool)).any():
        _put_back(machine, pfns)
        put_page(machine, pfns)
        return True
    if of_pool:
        new_head = replace_huge_page(machine, head, node)
        if not new_head:
            _put_back(machine, pfns)
            put_page(machine, pfns)
            return True
        frames = frames_of(np.array([new_head]))
    else:
        frames = frames_of(alloc_huge_pages(machine, 1, node))
    new = frames[pfns - head]
    put_page(machine, np.delete(frames, pfns - head))  # in place of those that are gone already
    _take_over(machine, pfns, new, np.full(pfns.size, vpn), drains=int(not of_pool))
    put_page(machine, pfns)
    return False


def _held(machine: Machine, pfns: Pfns, known: int = 0) -> Bools:
    """Which frames somebody besides us, a cache and ``known`` others has a reference to."""
    return machine["page.refcount"][pfns] > 1 + known + page_mapping(machine, pfns)


def _put_back(machine: Machine, pfns: Pfns) -> None:
    """Let frames stay where they were."""
    remove_migration_ptes(machine, pfns, pfns)
    set_flags(machine, pfns, off=PG_LOCKED)


def _take_over(machine: Machine, old: Pfns, new: Pfns, vpns: Pfns, *, drains: int) -> None:
    """Let new frames, which have one reference each, be what the old ones were."""
    if not old.size:
        return
    rows = as_rows(new)
    for column in ("content", "mapping", "index"):
        machine.write(f"page.{column}", rows, machine[f"page.{column}"][old])
    flags = machine["page.flags"][old]
    carried = np.uint32(~(PG_ANON_EXCLUSIVE | PG_LOCKED) & 0xFFFFFFFF)
    machine.write("page.flags", rows, flags & carried)
    ksm_migrate_page(machine, old, new)
    in_cache = page_mapping(machine, old)
    swapped = machine["page.swap"][old] != 0
    replace_in_swap_cache(machine, old[swapped], new[swapped])
    replace_in_cache(machine, old[in_cache & ~swapped], new[in_cache & ~swapped])
    if drains:
        lru_add_drain(machine, drains)
    remove_migration_ptes(machine, old, new)
    set_flags(machine, old, off=PG_LOCKED)
    put_page(machine, new)
