"""Advice on mapped pages.

Source: mm/madvise.c.
"""

from __future__ import annotations

from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.memory import unmap_page_range
from hmmlab.model.mm_types import Vma, mm_lock, vmas_in
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)

__all__ = ["sys_madvise_dontneed"]

_ENOMEM = 12


@kernel("mm/madvise.c", "__x64_sys_madvise")
def sys_madvise_dontneed(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Throw the pages away and keep the mapping (MADV_DONTNEED).

    Raises
    ------
    KernelError
        ENOMEM when part of the range is not mapped; the rest has been emptied all the same.
    """
    lock = mm_lock(machine, mm)
    yield from machine.down_read(lock)
    try:
        at = start
        for vma in list(vmas_in(machine, mm, start, stop)):
            yield from zap_page_range_single(
                machine, vma, max(vma.start, start), min(vma.end, stop)
            )
            at = vma.end if vma.start <= at else at
        if at < stop:
            raise KernelError(_ENOMEM, f"{machine.names.place(mm, at, stop)}: not all mapped")
    finally:
        machine.up_read(lock)


@kernel("mm/memory.c")
def zap_page_range_single(machine: Machine, vma: Vma, start: int, stop: int) -> Routine[None]:
    """Empty a part of one mapping inside a CLEAR of it."""
    machine.called("lru_add_drain")
    range = MmuNotifierRange.one(vma.mm, Event.CLEAR, start, stop, vma=vma.row)
    yield from invalidate_range_start(machine, range)
    yield from unmap_page_range(machine, vma, start, stop)
    yield from invalidate_range_end(machine, range)
