"""The reaper: it takes back the memory of a process that was killed because memory is used up.

Whoever waits for memory waits for the reaper, so the reaper waits for nobody: its notifier ranges
are the only ones that are not blockable. The mark it leaves for later faults (MMF_UNSTABLE) and its
ten attempts are left out.

Source: mm/oom_kill.c.
"""

from __future__ import annotations

from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import VM_HUGETLB, VM_PFNMAP, VM_SHARED, mm_lock, vmas_of
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
)
from hmmlab.model.tlb import MmuGather
from hmmlab.model.zap import unmap_page_range

__all__ = ["oom_reap_task_mm"]

_EAGAIN = 11


@kernel("mm/oom_kill.c")
def oom_reap_task_mm(machine: Machine, mm: int) -> Routine[bool]:
    """Empty the mappings that a dying process has for itself; they stay, without their pages.

    Returns whether nothing is left to do. A mapping whose subscriber would have to sleep is passed
    over, and so is everything while a writer holds the mmap_lock.
    """
    lock = mm_lock(machine, mm)
    if machine["lock.writer"][lock]:
        yield machine.step("The mmap_lock is taken, and the reaper does not wait.", mm)
        return False
    yield from machine.down_read(lock)
    done = True
    for vma in list(vmas_of(machine, mm)):
        if vma.flags & (VM_HUGETLB | VM_PFNMAP):
            continue
        if not vma.is_anonymous and vma.flags & VM_SHARED:
            continue
        range = MmuNotifierRange.one(
            mm, Event.UNMAP, vma.start, vma.end, vma=vma.row, blockable=False
        )
        try:
            yield from invalidate_range_start(machine, range)
        except KernelError as error:
            if error.errno != _EAGAIN:
                raise
            done = False
            yield machine.step(
                "{range}: somebody would have to sleep, so the reaper passes it over.",
                mm,
                vma.start,
                vma.end,
            )
            continue
        tlb = MmuGather(machine, mm)
        yield from unmap_page_range(machine, tlb, vma, vma.start, vma.end)
        yield from invalidate_range_end(machine, range)
        tlb.finish()
    machine.up_read(lock)
    return done
