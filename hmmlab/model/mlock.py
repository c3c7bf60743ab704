"""Keeping pages in RAM: mlock marks the mappings and brings every page in.

Source: mm/mlock.c, mm/gup.c (``__mm_populate``).
"""

from __future__ import annotations

from hmmlab.model.access import check_vma_flags, populate
from hmmlab.model.lru import lru_add_drain
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mm_types import (
    VM_HUGETLB,
    VM_IO,
    VM_LOCKED,
    VM_PFNMAP,
    VM_SHARED,
    VM_SPECIAL,
    VM_WRITE,
    Vma,
    find_vma_prev,
    mm_lock,
    vma_at,
    vmas_in,
)
from hmmlab.model.mmap import change_vma_flags

__all__ = ["populate_vma_page_range", "sys_mlock"]

_ENOMEM, _EAGAIN, _EFAULT = 12, 11, 14


@kernel("mm/mlock.c", "__x64_sys_mlock")
def sys_mlock(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Lock pages ``start`` to ``stop - 1`` in RAM, and bring in those that are not there.

    Raises
    ------
    KernelError
        ENOMEM where some are not mapped; the mappings before are locked then, but nothing has been
        brought in. ENOMEM too where a page cannot be had; all is locked then. EAGAIN when RAM is
        used up.
    """
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    try:
        yield from _apply_vma_lock_flags(machine, mm, start, stop)
    finally:
        machine.up_write(lock)
    yield from machine.down_read(lock)
    try:
        for vma in list(vmas_in(machine, mm, start, stop)):
            if not vma.flags & (VM_IO | VM_PFNMAP):
                yield from populate_vma_page_range(
                    machine, vma, max(vma.start, start), min(vma.end, stop)
                )
    except KernelError as error:
        errno = _EAGAIN if error.errno == _ENOMEM else _ENOMEM
        raise KernelError(errno, str(error)) from error
    finally:
        machine.up_read(lock)


def _apply_vma_lock_flags(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Mark mapping by mapping, up to the first page that is not mapped."""
    at = start
    while at < stop:
        vma, prev = find_vma_prev(machine, mm, at)
        if vma is None or vma.start > at:
            raise KernelError(_ENOMEM, f"{machine.names.place(mm, at, at + 1)} is not mapped")
        end = min(vma.end, stop)
        held = yield from mlock_fixup(machine, vma, vma if vma.start < at else prev, at, end)
        at = max(end, held.end)


@kernel("mm/mlock.c")
def mlock_fixup(
    machine: Machine, vma: Vma, prev: Vma | None, start: int, stop: int
) -> Routine[Vma]:
    """Mark a part of one mapping as locked; returns the mapping that holds the part now."""
    if vma.flags & (VM_LOCKED | VM_SPECIAL | VM_HUGETLB):
        return vma
    vma = yield from change_vma_flags(machine, vma, prev, start, stop, vma.flags | VM_LOCKED)
    lru_add_drain(machine)
    machine.called("walk_page_range")
    lru_add_drain(machine)
    yield machine.step("{range} {are} to stay in RAM from now on.", vma.mm, start, stop)
    return vma


@kernel("mm/gup.c")
def populate_vma_page_range(machine: Machine, vma: Vma, start: int, stop: int) -> Routine[None]:
    """Bring in pages of one mapping, for writing where writes are its own.

    Raises
    ------
    KernelError
        EFAULT where nothing may be accessed, or a page cannot be had.
    """
    write = vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE
    if not check_vma_flags(vma, write, force=True):
        place = machine.names.place(vma.mm, start, stop)
        raise KernelError(_EFAULT, f"{place}: the mapping is {vma.permissions}")
    yield from populate(machine, vma_at(machine, vma.row), start, stop, write)
    lru_add_drain(machine)
