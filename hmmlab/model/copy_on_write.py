"""A write to a page that is not writable: the frame is used as it is, or copied.

Source: mm/memory.c.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import all_of, any_of, some
from hmmlab.model.anon_vma import anon_vma_prepare
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    RW,
    SOFT_DIRTY,
    SPECIAL,
    Bools,
    Pfns,
    Words,
    present_word,
)
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.lru import drain_new, lru_add_drain, mlock_pages, off_lru, waits_new
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_LOCKED, VM_SHARED, VM_WRITE, Vma, vm_page_prot
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
    ZERO_PFN,
    frames_of,
    is_zone_device,
    pfn_to_page,
    set_flags,
    some_rows,
)
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_ref import put_page
from hmmlab.model.rmap import page_add_new_anon_rmap, page_remove_rmap
from hmmlab.model.rows import Rows, unique_rows
from hmmlab.model.swap import free_swap_cache, give_up_swap
from hmmlab.model.tlb import ptep_clear_flush_notify

#: Frames with more references are copied at once (``do_wp_page``).
_HOPELESS = 3

__all__ = ["VmFault", "born_dirty", "do_wp_page"]


class VmFault(NamedTuple):
    """Write faults on pages that are there (``struct vm_fault``): one value a page.

    ``rows`` and ``words`` are those of the ``pte`` column; ``marks``, maybe one for all, and
    ``frames`` are what the words say.
    """

    vpns: Pfns
    rows: Rows
    words: Words
    marks: Words
    frames: Pfns

    def only(self, chosen: Bools) -> VmFault:
        """Some of them."""
        if all_of(chosen):
            return self
        return VmFault(
            some(self.vpns, chosen),
            some_rows(self.rows, chosen),
            some(self.words, chosen),
            some(self.marks, chosen),
            some(self.frames, chosen),
        )

    @property
    def normal(self) -> Bools:
        """Which words name a frame whose ``struct page`` counts; maybe one for all."""
        return (self.marks & np.uint64(SPECIAL)) == 0


@kernel("mm/memory.c")
def do_wp_page(machine: Machine, vma: Vma, faults: VmFault) -> Routine[None]:
    """A write to pages that are present and not writable: reuse the frame, or copy it."""
    vpns, rows, words, _, frames = faults
    at = named = pfn_to_page(machine, frames)
    normal = faults.normal
    if not all_of(normal):
        frames = np.where(normal, frames, ZERO_PFN)
        at = pfn_to_page(machine, frames)
    flags = machine.alike("page.flags", at)
    anon = normal & ((flags & np.uint32(PG_ANON)) != 0)
    exclusive = anon & ((flags & np.uint32(PG_ANON_EXCLUSIVE)) != 0)
    alone = anon & ~exclusive & ((flags & np.uint32(PG_KSM)) == 0)
    if any_of(alone):
        _drain_for(machine, frames, at, alone)
    give_up_swap(machine, some(frames, alone), some_rows(at, alone))
    alone = alone & (_folio_ref_count(machine, at, alone) == 1)
    shared = normal & ~anon & bool(vma.flags & VM_SHARED)
    if any_of(shared):  # wp_page_shared
        set_flags(machine, some(frames, shared), PG_DIRTY)
    reuse = exclusive | alone | shared
    if any_of(alone):  # page_move_anon_rmap: the last one left owns it from now on
        set_flags(machine, some(frames, alone), PG_ANON_EXCLUSIVE)
        machine.write("page.mapping", some_rows(at, alone), vma.anon_vma)
    if any_of(reuse):
        rights = np.uint64(ACCESSED | DIRTY | SOFT_DIRTY | (RW if vma.flags & VM_WRITE else 0))
        machine.write("pte", some_rows(rows, reuse), some(words, reuse) | rights)
        mine = some(vpns, reuse)
        yield machine.step(
            "Nobody else has the frame of {range}: it becomes writable in place."
            if not any_of(shared)
            else "All shall see what is written to {range}: it becomes writable in place.",
            vma.mm,
            int(mine[0]),
            int(mine[-1]) + 1,
        )
    if not all_of(reuse):
        yield from wp_page_copy(machine, vma, faults.only(~reuse), some_rows(named, ~reuse))


def _drain_for(machine: Machine, frames: Pfns, rows: Rows, maybe: Bools) -> None:
    """Drain the CPU's batches where one may be all that holds a frame besides its mapping."""
    if any_of(maybe & waits_new(machine, frames)):
        lru_add_drain(machine)
    off = maybe & off_lru(machine, frames, rows)
    if any_of(off):
        device = is_zone_device(machine, frames)
        off = off & (machine["page.refcount"][rows] + ~device <= _HOPELESS)
        if any_of(off & device):
            lru_add_drain(machine)
        elif any_of(off):
            drain_new(machine)


def _folio_ref_count(machine: Machine, rows: Rows, leaving: Bools) -> NDArray[np.int32]:
    """References to the pages, those to all of its frames for part of a huge page; or one for all.

    The parts of a huge page that are ``leaving`` it for copies do so one after another, so that the
    last part may find itself alone.
    """
    compound = machine.alike("page.compound", rows)
    if not any_of(compound):
        return machine.alike("page.refcount", rows)
    counts: NDArray[np.int32] = machine["page.refcount"][rows].copy()
    compound = np.broadcast_to(compound, counts.shape)
    leaving = np.broadcast_to(leaving, counts.shape)
    parts = np.flatnonzero(compound)
    heads, which = np.unique(compound[parts], return_inverse=True)
    frames = frames_of(heads).reshape(heads.size, PMD_PAGES)
    mine = machine["page.compound"][frames] != 0  # some may be free, and used for other things
    counts[parts] = (machine["page.refcount"][frames] * mine).sum(axis=1)[which]
    for number in range(heads.size):  # over huge pages
        going = parts[which == number]
        going = going[leaving[going]]
        counts[going] -= np.arange(going.size, dtype=counts.dtype)
    return counts


@kernel("mm/memory.c")
def wp_page_copy(machine: Machine, vma: Vma, faults: VmFault, at: Rows) -> Routine[None]:
    """Copy on write: each page gets a frame of its own, inside a CLEAR of that page.

    Where the word has changed since it was read, the copy is given up (``pte_same``). ``at`` are
    the rows of the faults' frames.
    """
    vma = anon_vma_prepare(machine, vma)
    new, pages = alloc_pages(machine, faults.vpns.size, content=machine["page.content"][at])
    range = MmuNotifierRange.each(vma.mm, Event.CLEAR, faults.vpns, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    same = machine["pte"][faults.rows] == faults.words
    if not all_of(same):
        put_page(machine, new[~same])
        if not any_of(same):
            yield from invalidate_range_end(machine, range)
            return
        faults, at = faults.only(same), some_rows(at, same)
        new, pages = new[same], some_rows(pages, same)
    ptep_clear_flush_notify(machine, vma.mm, faults.vpns.size)
    page_add_new_anon_rmap(machine, new, vma, faults.vpns, rows=pages)
    machine.write("pte", faults.rows, present_word(new, born_dirty(vma, vm_page_prot(vma.flags))))
    normal = faults.normal
    old, at = some(faults.frames, normal), some_rows(at, normal)
    page_remove_rmap(machine, old, rows=at)
    if vma.flags & VM_LOCKED:  # the new page and the old one, in turn
        mlock_pages(machine, np.stack([-new, np.where(normal, faults.frames, 0)], axis=1).ravel())
    yield machine.step(
        "A frame of its own for {range}: "
        + ("the old one keeps its readers." if all_of(normal) else "so far it was the zero page."),
        vma.mm,
        int(faults.vpns[0]),
        int(faults.vpns[-1]) + 1,
    )
    yield from invalidate_range_end(machine, range)
    put_page(machine, old, at)
    cached = machine.alike("page.swap", at) != 0
    if any_of(cached):
        free_swap_cache(machine, unique_rows(some(old, cached)))


def born_dirty(vma: Vma, prot: int) -> int:
    """``prot`` for a page that is mapped to be written (``maybe_mkwrite``)."""
    return prot | DIRTY | SOFT_DIRTY | RW if vma.flags & VM_WRITE else prot
