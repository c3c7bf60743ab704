"""TLB flushes, and pages that are freed only after one.

A page must not be freed while some CPU may still reach it through its TLB. So whoever unmaps
gathers the pages (``struct mmu_gather``), and when it ends, after the notifier's end, the TLB is
flushed, devices that walk the CPU's own page tables are told (``invalidate_range``), and then the
pages are freed. A device-private page is in no TLB, and is freed at once.

The model has no TLB. What can be seen is when pages are freed, and the calls.

Source: mm/mmu_gather.c, include/asm-generic/tlb.h, mm/swap_state.c
(``free_pages_and_swap_cache``), arch/x86/mm/tlb.c.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hmmlab.model.alike import some
from hmmlab.model.entry import PRESENT, Bools, Pfns, Words
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.lru import lru_add_drain
from hmmlab.model.machine import BULK, Machine
from hmmlab.model.mmu_notifier import mm_has_notifiers
from hmmlab.model.page import pfn_to_page
from hmmlab.model.page_ref import put_page
from hmmlab.model.rows import Rows, unique_rows
from hmmlab.model.swap import free_swap_cache

__all__ = ["MmuGather", "flush_tlb", "pte_accessible", "ptep_clear_flush_notify"]

#: Pages of the batch that is in the gather itself, of every other one, and how many of these.
_BUNDLE, _BATCH, _BATCHES = 8, 510, 19


def pte_accessible(words: Words) -> Bools:
    """Which words a TLB may hold: those of PROT_NONE count as present, and are in none."""
    return (words & np.uint64(PRESENT)) != 0


def flush_tlb(machine: Machine, times: int = 1) -> None:
    """Note ``times`` flushes of some range (``flush_tlb_mm_range``)."""
    machine.called("flush_tlb_mm_range", times)


def ptep_clear_flush_notify(machine: Machine, mm: int, times: int = 1) -> None:
    """Note that ``times`` words are emptied, the TLB is flushed, and devices are told."""
    flush_tlb(machine, times)
    if mm_has_notifiers(machine, mm):
        machine.called("__mmu_notifier_invalidate_range", times)


class MmuGather:
    """Pages that are unmapped and not yet freed (``struct mmu_gather``).

    Attributes
    ----------
    cleared
        Whether a TLB may hold something that has changed.
    """

    def __init__(self, machine: Machine, mm: int) -> None:
        self.machine, self.mm = machine, mm
        self.cleared = False
        self._pages: list[tuple[Pfns, Rows]] = []
        self._waiting, self._huge = 0, False

    def remove_pages(self, pfns: Pfns, rows: Rows, *, huge: bool = False) -> None:
        """Let pages, with their ``rows``, wait for the flush; when too many do, it is done now."""
        self.cleared = True
        if pfns.size:
            self._pages.append((pfns, rows))
            self._huge |= huge
            self._waiting += pfns.size // PMD_PAGES if huge else pfns.size
        if self._waiting > _BUNDLE + _BATCHES * _BATCH:
            self.flush()

    def remove_tables(self, count: int) -> None:
        """Let freed page tables wait too."""
        self.cleared |= count > 0
        self._waiting += count

    def flush_only(self) -> None:
        """Flush, and free nothing yet (``tlb_flush_mmu_tlbonly``)."""
        if self.cleared:
            ptep_clear_flush_notify(self.machine, self.mm)
        self.cleared = False

    def finish(self, *, nested: bool = False) -> None:
        """Flush, and free what waits (``tlb_finish_mmu``).

        While another gather of the same address space is under way, all is flushed once more, for
        nobody knows what the other has flushed.
        """
        self.cleared |= nested
        with self.machine.within("tlb_finish_mmu"):
            self.flush()

    def flush(self) -> None:
        """Flush, and free what waits (``tlb_flush_mmu``)."""
        self.flush_only()
        edges = [0, *range(_BUNDLE, self._waiting, _BATCH), self._waiting]
        if self._waiting and (self._huge or self.machine.grain == BULK):
            lru_add_drain(self.machine, len(edges) - 1)
            for pfns, rows in self._pages:
                self._free(pfns, rows)
        elif self._waiting:
            pages = np.concatenate([np.zeros(0, np.int64), *(pfns for pfns, _ in self._pages)])
            for first, last in pairwise(edges):
                lru_add_drain(self.machine)
                pfns = pages[first:last]
                self._free(pfns, pfn_to_page(self.machine, pfns))
        self._waiting, self._huge = 0, False
        self._pages.clear()

    def _free(self, pfns: Pfns, rows: Rows) -> None:
        cached = unique_rows(some(pfns, self.machine.alike("page.swap", rows) != 0))
        put_page(self.machine, pfns, rows)
        free_swap_cache(self.machine, cached)
