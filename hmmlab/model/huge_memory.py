"""Huge pages: so far only what their mere possibility costs.

Source: mm/huge_memory.c.
"""

from __future__ import annotations

from hmmlab.model.geometry import PMD_PAGES, align_down
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import Vma, mm_root
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.page_table import table_of

__all__ = ["vma_adjust_trans_huge"]


@kernel("mm/huge_memory.c")
def vma_adjust_trans_huge(machine: Machine, vma: Vma, edge: int) -> Routine[None]:
    """Split what a mapping may hold across ``edge``, before its border comes to stand there.

    Linux does not look first whether a huge page is there: a PMD table and room for one in the
    mapping are enough for the CLEAR.
    """
    first = align_down(edge, PMD_PAGES)
    inside = first < edge and vma.start <= first and first + PMD_PAGES <= vma.end
    if inside and table_of(machine, mm_root(machine, vma.mm), edge, "pmd"):
        yield from split_huge_pmd(machine, vma, first)


@kernel("mm/huge_memory.c", "__split_huge_pmd")
def split_huge_pmd(machine: Machine, vma: Vma, first: int) -> Routine[None]:
    """Make small entries of a huge one, inside a CLEAR of its 2 MiB."""
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, first, first + PMD_PAGES, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    yield machine.step(
        "A border will cut {range}, where a huge page could be; none is, but the event is raised.",
        vma.mm,
        first,
        first + PMD_PAGES,
    )
    yield from invalidate_range_end(machine, range)
