"""KSM: pages of equal content become one, which nobody may write in place.

A scan visits every present private page of every mapping that was advised, address space by address
space in the order in which they were registered. A page that equals one merged already joins it; a
page that has not changed since the last scan is kept in a tree of its own until the scan ends, and
merges with the first later page that equals it. Each page visited has an item (``ksm_item.*``),
each merged page a node (``ksm_node.*``), and so many pages may share one that there can be several
of one content.

Source: mm/ksm.c.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hmmlab.model.entry import DIRTY, RW, SPECIAL, is_present, pfn_of, present_word
from hmmlab.model.lru import lru_add_drain, mlock_pages
from hmmlab.model.machine import Actor, KernelError, Machine, Routine, kernel
from hmmlab.model.memory import handle_mm_fault
from hmmlab.model.migration import split_huge_page
from hmmlab.model.mm_types import (
    VM_DONTEXPAND,
    VM_HUGETLB,
    VM_IO,
    VM_LOCKED,
    VM_MAYSHARE,
    VM_MERGEABLE,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_SHARED,
    Vma,
    find_vma,
    find_vma_prev,
    mm_is_alive,
    mm_lock,
    mm_root,
    vm_page_prot,
    vma_lookup,
    vmas_of,
)
from hmmlab.model.mmap import change_vma_flags
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
    PG_KSM,
    is_zone_device,
    set_flags,
)
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.page_table import walk, word_row
from hmmlab.model.rmap import page_add_anon_rmap, page_remove_rmap
from hmmlab.model.swap import folio_free_swap
from hmmlab.model.tlb import ptep_clear_flush_notify

__all__ = ["ksm_fork", "ksm_scan", "pages_sharing", "unmerge_ksm_pages"]

_NO_MERGE = (
    VM_MERGEABLE
    | VM_SHARED
    | VM_MAYSHARE
    | VM_PFNMAP
    | VM_IO
    | VM_DONTEXPAND
    | VM_HUGETLB
    | VM_MIXEDMAP
)

#: Pages that may share one merged page (``max_page_sharing``).
_MAX_SHARING = 256

#: Scans that are waited for.
_SCANS = 3

Machine.declare("mm.ksm", np.int32, "place of the address space among those that are scanned")
Machine.declare("ksm.registered", np.int32, "address spaces registered so far")
Machine.declare("ksm.order", np.int64, "places among nodes and items given so far")
Machine.declare("ksm_node.order", np.int64, "place among those of its content, latest first")


class _Found(NamedTuple):
    """A page that a scan comes to; ``pfn`` is 0 where an item has lost its page."""

    mm: int
    vpn: int
    pfn: int
    item: int


# --- registration ---------------------------------------------------------------------------------


@kernel("mm/ksm.c")
def ksm_scan(machine: Machine, mm: int, start: int, stop: int) -> Routine[int]:
    """Advise pages as mergeable, scan three times, and return how many are saved by sharing."""
    yield from _advise_mergeable(machine, mm, start, stop)
    ksmd = Actor("ksmd")
    for _ in range(_SCANS):
        yield from machine.run_as(ksmd, _ksm_do_scan(machine))
    return pages_sharing(machine)


@kernel("mm/madvise.c", "__x64_sys_madvise")
def _advise_mergeable(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        yield from _ksm_madvise(machine, mm, start, stop)
    finally:
        machine.up_write(lock)


def _ksm_madvise(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    at = start
    vma, prev = find_vma_prev(machine, mm, start)
    if vma and vma.start < start:
        prev = vma
    while vma and at < stop and vma.start < stop:
        at = max(at, vma.start)
        prev, end = vma, min(vma.end, stop)
        if not vma.flags & _NO_MERGE:
            if not machine["mm.ksm"][mm]:
                _ksm_enter(machine, mm)
            before = find_vma_prev(machine, mm, at)[1] if vma.start == at else vma
            flags = vma.flags | VM_MERGEABLE
            prev = yield from change_vma_flags(machine, vma, before, at, end, flags)
        at = max(end, prev.end)
        vma = find_vma(machine, mm, prev.end)
    yield machine.step("{range} may be merged with its likes.", mm, start, stop)


def _ksm_enter(machine: Machine, mm: int) -> None:
    machine.add("ksm.registered", 0, 1)
    machine.write("mm.ksm", mm, int(machine["ksm.registered"][0]))


def ksm_fork(machine: Machine, mm: int, oldmm: int) -> None:
    """Let a child be scanned when its parent is."""
    if machine["mm.ksm"][oldmm]:
        _ksm_enter(machine, mm)


# --- one scan -------------------------------------------------------------------------------------


@kernel("mm/ksm.c", "ksm_do_scan")
def _ksm_do_scan(machine: Machine) -> Routine[None]:
    """Visit all pages once.

    What happens to one page depends on the pages before it, and only merged ones cost anything:
    the loop is over pages whose content is not unique.
    """
    lru_add_drain(machine)
    found = _visit(machine)
    unstable: dict[int, _Found] = {}
    contents: list[int] = machine["page.content"][
        np.array([page.pfn for page in found], np.int64)
    ].tolist()
    for page, content in zip(found, contents, strict=True):
        if page.pfn:
            yield from _cmp_and_merge_page(machine, page, content, unstable)
        else:
            _remove_item(machine, page.item)
    yield machine.step(f"A scan of {sum(page.pfn > 0 for page in found)} pages is over.")


def _visit(machine: Machine) -> list[_Found]:
    """Pages and items to look at, in order: those of dead processes come first."""
    spaces = np.flatnonzero(machine["mm.ksm"])
    ranks = {
        mm: rank if mm_is_alive(machine, mm) else 0
        for mm, rank in zip(spaces.tolist(), machine["mm.ksm"][spaces].tolist(), strict=True)
    }
    pages = [_pages_of(machine, mm) for mm, rank in ranks.items() if rank]
    columns = np.concatenate([np.zeros((0, 3), np.int64), *pages])
    items = np.flatnonzero(machine["ksm_item.mm"])
    known = {
        (int(machine["ksm_item.mm"][item]), int(machine["ksm_item.vpn"][item])): int(item)
        for item in items
    }
    found = []
    for mm, vpn, pfn in columns.tolist():
        item = known.pop((mm, vpn), 0) or _new_item(machine, mm, vpn)
        found.append(_Found(mm, vpn, pfn, item))
    found += [_Found(mm, vpn, 0, item) for (mm, vpn), item in known.items()]
    return sorted(found, key=lambda page: (ranks.get(page.mm, 0), page.vpn))


def _pages_of(machine: Machine, mm: int) -> np.ndarray:
    """Address space, page and frame of its mergeable pages, int64 of shape (n, 3)."""
    parts = [np.zeros((0, 3), np.int64)]
    for vma in vmas_of(machine, mm):
        if not vma.flags & VM_MERGEABLE or not vma.anon_vma:
            continue
        for run in walk(machine, mm_root(machine, mm), vma.start, vma.end):
            if run.row < 0:
                continue
            words = machine["pte"][run.row : run.row + run.stop - run.start]
            normal = is_present(words) & ((words & SPECIAL) == 0)
            pfns = np.where(normal, pfn_of(words), 0)
            anon = (
                machine["page.flags"][np.where(normal, pfns, 0) % machine.ram_pages] & PG_ANON
            ) != 0
            wanted = np.flatnonzero(normal & ~is_zone_device(machine, pfns) & anon)
            vpns = run.start + wanted
            parts.append(np.stack([np.full(vpns.size, mm), vpns, pfns[wanted]], axis=1))
    return np.concatenate(parts)


def _new_item(machine: Machine, mm: int, vpn: int) -> int:
    item = machine.take("ksm_item.mm")
    machine.write("ksm_item.mm", item, mm)
    machine.write("ksm_item.vpn", item, vpn)
    return item


def _remove_item(machine: Machine, item: int) -> None:
    for column in ("mm", "vpn", "anon_vma", "node", "order", "seen"):
        machine.write(f"ksm_item.{column}", item, 0)


def _leave_node(machine: Machine, item: int) -> None:
    if machine["ksm_item.node"][item]:
        for column in ("anon_vma", "node", "order"):
            machine.write(f"ksm_item.{column}", item, 0)


def _join_node(machine: Machine, item: int, node: int, anon_vma: int) -> None:
    machine.write("ksm_item.node", item, node)
    machine.write("ksm_item.anon_vma", item, anon_vma)
    machine.write("ksm_item.order", item, _next_place(machine))


def _next_place(machine: Machine) -> int:
    machine.add("ksm.order", 0, 1)
    return int(machine["ksm.order"][0])


def _nodes(machine: Machine) -> np.ndarray:
    """Nodes whose merged page is still there."""
    nodes = np.flatnonzero(machine["ksm_node.pfn"])
    pfns = machine["ksm_node.pfn"][nodes]
    merged = (machine["page.flags"][pfns] & PG_KSM) != 0
    alive = merged & (machine["page.mapping"][pfns] == nodes)
    for node in nodes[~alive & ~is_zone_device(machine, pfns)].tolist():
        machine.write("ksm_node.pfn", node, 0)
    return nodes[alive]


def pages_sharing(machine: Machine) -> int:
    """Pages that are saved: users of merged pages, but the first of each."""
    nodes = machine["ksm_item.node"][np.flatnonzero(machine["ksm_item.node"])]
    return int(nodes.size - np.unique(nodes).size)


def _stable_tree_search(machine: Machine, content: int) -> int:
    """The first merged page of this content that somebody shares and one more may; 0 for none.

    It is asked first from now on, while it has room for more (``stable_node_dup``). A page that
    only relatives of its sharers map, whom KSM does not know, takes nobody.
    """
    nodes = _nodes(machine)
    nodes = nodes[machine["page.content"][machine["ksm_node.pfn"][nodes]] == content]
    nodes = nodes[np.argsort(-machine["ksm_node.order"][nodes])]
    users = np.bincount(machine["ksm_item.node"], minlength=int(nodes.max(initial=0)) + 1)[nodes]
    usable = np.flatnonzero((users > 0) & (users < _MAX_SHARING))
    if not usable.size:
        return 0
    first = int(usable[0])
    node = int(nodes[first])
    if first and users[first] + 1 < _MAX_SHARING:
        _ask_first(machine, node)
    return node


def _ask_first(machine: Machine, node: int) -> None:
    machine.write("ksm_node.order", node, _next_place(machine))


def _cmp_and_merge_page(
    machine: Machine, page: _Found, content: int, unstable: dict[int, _Found]
) -> Routine[None]:
    if _frame_at(machine, page) != page.pfn:  # a merge before it has replaced it
        return
    vma = vma_lookup(machine, page.mm, page.vpn)
    if vma is None:
        return
    if machine["page.flags"][page.pfn] & PG_KSM:
        node = int(machine["page.mapping"][page.pfn])
        if machine["ksm_item.node"][page.item] != node:  # a child came to share it by fork
            _leave_node(machine, page.item)
            _join_node(machine, page.item, node, vma.anon_vma)
        return
    node = _stable_tree_search(machine, content)
    _leave_node(machine, page.item)
    if node:
        kpage = int(machine["ksm_node.pfn"][node])
        if (yield from _try_to_merge_one_page(machine, vma, page, kpage)):
            _join_node(machine, page.item, node, vma.anon_vma)
        return
    if int(machine["ksm_item.seen"][page.item]) != _mark(content):
        machine.write("ksm_item.seen", page.item, _mark(content))
        return
    other = unstable.get(content)
    if other is None or _frame_at(machine, other) != other.pfn:
        unstable.setdefault(content, page)
        return
    if other.pfn != page.pfn:
        yield from _try_to_merge_two_pages(machine, vma, page, other, content, unstable)


def _mark(content: int) -> int:
    """A checksum of a page; 0 says that there is none yet, and what has it is no usual content."""
    return content ^ 0x9E3779B97F4A7C15


def _frame_at(machine: Machine, page: _Found) -> int:
    """Frame that is mapped where a page was found, 0 for none."""
    row = word_row(machine, mm_root(machine, page.mm), page.vpn)
    word = machine["pte"][row : row + 1] if row >= 0 else np.zeros(1, np.uint64)
    return int(pfn_of(word)[0]) if is_present(word)[0] else 0


# --- merging --------------------------------------------------------------------------------------


def _try_to_merge_two_pages(
    machine: Machine,
    vma: Vma,
    page: _Found,
    other: _Found,
    content: int,
    unstable: dict[int, _Found],
) -> Routine[None]:
    """Let ``page`` be the merged one, and ``other`` be replaced by it."""
    heads = machine["page.compound"][[page.pfn, other.pfn]]
    if heads[0] and heads[0] == heads[1]:  # both references keep their huge page from splitting
        yield from split_huge_page(machine, int(heads[0]))
        return
    if not (yield from _try_to_merge_one_page(machine, vma, page, 0)):
        return
    node = machine.take("ksm_node.pfn")
    machine.write("ksm_node.pfn", node, page.pfn)
    _ask_first(machine, node)
    machine.write("page.mapping", page.pfn, node)
    set_flags(machine, np.array([page.pfn]), PG_KSM | PG_DIRTY)
    theirs = vma_lookup(machine, other.mm, other.vpn)
    # The merged page must be found by whoever unmaps it: its users join before the second merge.
    merged = theirs is not None and (
        yield from _try_to_merge_one_page(machine, theirs, other, page.pfn)
    )
    if merged and theirs is not None:
        unstable.pop(content, None)
        _join_node(machine, other.item, node, theirs.anon_vma)
        _join_node(machine, page.item, node, vma.anon_vma)
        return
    yield from _break_ksm(machine, vma, page.vpn)
    machine.write("ksm_node.pfn", node, 0)


def _try_to_merge_one_page(machine: Machine, vma: Vma, page: _Found, kpage: int) -> Routine[bool]:
    """Write-protect a page, and replace it by ``kpage`` unless that is 0."""
    head = int(machine["page.compound"][page.pfn])
    if head and not (yield from split_huge_page(machine, head)):
        return False
    if not (yield from _write_protect_page(machine, vma, page)):
        return False
    if kpage:
        yield from _replace_page(machine, vma, page, kpage)
    return True


@kernel("mm/ksm.c", "write_protect_page")
def _write_protect_page(machine: Machine, vma: Vma, page: _Found) -> Routine[bool]:
    """Take the right to write from the page's word, inside a CLEAR, unless somebody holds it."""
    range = MmuNotifierRange.one(page.mm, Event.CLEAR, page.vpn, page.vpn + 1, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    row = word_row(machine, mm_root(machine, page.mm), page.vpn)
    word = machine["pte"][row]
    exclusive = machine["page.flags"][page.pfn] & PG_ANON_EXCLUSIVE
    known = machine["page.mapcount"][page.pfn] + (machine["page.swap"][page.pfn] != 0)
    held = bool(machine["page.refcount"][page.pfn] != known)
    usable = True
    if word & np.uint64(RW | DIRTY) or exclusive:
        usable = not held
        if usable:
            dirty = PG_DIRTY if word & np.uint64(DIRTY) else 0
            set_flags(machine, np.array([page.pfn]), dirty, off=PG_ANON_EXCLUSIVE)
            machine.write("pte", row, word & np.uint64(~(RW | DIRTY) & (1 << 64) - 1))
    yield machine.step(
        "{range} may not be written in place any more."
        if usable
        else "{range} is held by somebody, and so not merged.",
        page.mm,
        page.vpn,
        page.vpn + 1,
    )
    yield from invalidate_range_end(machine, range)
    return usable


@kernel("mm/ksm.c", "replace_page")
def _replace_page(machine: Machine, vma: Vma, page: _Found, kpage: int) -> Routine[None]:
    """Map the merged page instead, inside a CLEAR."""
    range = MmuNotifierRange.one(page.mm, Event.CLEAR, page.vpn, page.vpn + 1, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    row = word_row(machine, mm_root(machine, page.mm), page.vpn)
    merged, old = np.array([kpage]), np.array([page.pfn])
    get_page(machine, merged)
    page_add_anon_rmap(machine, merged, vma, np.array([page.vpn]), np.zeros(1, np.bool_))
    machine.write("pte", row, present_word(merged, vm_page_prot(vma.flags))[0])
    ptep_clear_flush_notify(machine, page.mm)
    page_remove_rmap(machine, old)
    if vma.flags & VM_LOCKED:
        mlock_pages(machine, old)
    if not machine["page.mapcount"][page.pfn]:
        folio_free_swap(machine, old)
    put_page(machine, old)
    yield machine.step(
        "{range} shares a merged page of the same content.", page.mm, page.vpn, page.vpn + 1
    )
    yield from invalidate_range_end(machine, range)


# --- breaking -------------------------------------------------------------------------------------


def _break_ksm(machine: Machine, vma: Vma, vpn: int) -> Routine[None]:
    """Give a page of its own back, by a write fault on behalf of the process."""
    yield from handle_mm_fault(machine, vma, np.array([vpn]), True, remote=True)


def unmerge_ksm_pages(machine: Machine, vma: Vma, start: int, stop: int) -> Routine[None]:
    """Give every merged page of a part of a mapping back to itself."""
    if not vma.flags & VM_MERGEABLE or not vma.anon_vma:
        return
    for run in list(walk(machine, mm_root(machine, vma.mm), start, stop)):
        if run.row < 0:
            continue
        words = machine["pte"][run.row : run.row + run.stop - run.start]
        normal = is_present(words) & ((words & SPECIAL) == 0)
        pfns = np.where(normal, pfn_of(words), 0)
        pfns = np.where(is_zone_device(machine, pfns), 0, pfns)
        merged = np.flatnonzero((machine["page.flags"][pfns] & PG_KSM) != 0)
        if merged.size:
            with machine.bulk(merged.size):
                try:
                    yield from handle_mm_fault(machine, vma, run.start + merged, True, remote=True)
                except KernelError:
                    return
