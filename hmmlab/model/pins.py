"""References that others hold to a process's pages: pages in a pipe, and long-term pins.

A pipe into which pages were spliced holds one reference to each; a buffer registered with io_uring
pins its pages, which counts 1024 references each, so that a pin can be told from a reference.

Source: mm/gup.c (``pin_user_pages``, ``check_and_migrate_movable_pages``), fs/splice.c
(``vmsplice``), io_uring/rsrc.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.access import get_user_pages
from hmmlab.model.entry import Pfns
from hmmlab.model.filemap import device_file_of
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.migrate import migrate_device_coherent_pages
from hmmlab.model.mm_types import mm_lock, vmas_in
from hmmlab.model.page import GUP_PIN_COUNTING_BIAS, is_zone_device, page_rows
from hmmlab.model.page_ref import put_page
from hmmlab.model.rows import as_rows

__all__ = ["pin_user_pages", "unpin_user_pages", "vmsplice", "vmsplice_end"]

_ENXIO, _EAGAIN, _EFAULT, _EBUSY, _EOPNOTSUPP = 6, 11, 14, 16, 95

#: Pages that the pipe takes (1 MiB), and that are taken at a time (``iter_to_pipe``).
_PIPE, _BATCH = 256, 16

_HOLD, _PIN = 1, 2

Machine.declare("held.pfn", np.int64, "frame that somebody holds; 0 is a free row")
Machine.declare("held.mm", np.int32, "address space in whose name it is held")
Machine.declare("held.kind", np.int32, "1 a page in a pipe, 2 a long-term pin")


@kernel("fs/splice.c", "__x64_sys_vmsplice")
def vmsplice(machine: Machine, mm: int, start: int, stop: int) -> Routine[int]:
    """Put pages into a pipe, which holds a reference to each. Returns how many.

    They are taken some at a time, and those for which there is no room are given back.

    Raises
    ------
    KernelError
        EAGAIN when the pipe is full; EFAULT when not even the first page can be had.
    """
    room = _PIPE - _rows(machine, mm, _HOLD).size
    if not room:
        raise KernelError(_EAGAIN, "the pipe is full")
    last = min(stop, start + (room // _BATCH + 1) * _BATCH) if stop - start > room else stop
    lock = mm_lock(machine, mm)
    yield from machine.down_read(lock)
    try:
        pfns = yield from get_user_pages(machine, mm, start, last, False)
    finally:
        machine.up_read(lock)
    put_page(machine, pfns[room:])
    pfns = pfns[:room]
    _note(machine, mm, pfns, _HOLD)
    yield machine.step("A pipe holds {range}.", mm, start, start + pfns.size)
    return int(pfns.size)


@kernel("fs/pipe.c", "pipe_release")
def vmsplice_end(machine: Machine, mm: int) -> Routine[None]:
    """The pipe is closed, and gives up its pages."""
    put_page(machine, _forget(machine, mm, _HOLD))
    yield machine.step("The pipe is closed.", mm)


@kernel("mm/gup.c")
def pin_user_pages(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Pin pages for long, for writing. Device memory comes home first: it cannot be pinned.

    Raises
    ------
    KernelError
        EFAULT when one cannot be had or written; EBUSY when a buffer is registered already,
        or somebody holds device memory;
        EOPNOTSUPP where a device file is mapped.
    """
    if _rows(machine, mm, _PIN).size:
        raise KernelError(_EBUSY, "a buffer is registered already")
    lock = mm_lock(machine, mm)
    yield from machine.down_read(lock)
    try:
        while True:
            pfns = yield from get_user_pages(machine, mm, start, stop, True)
            device = pfns[is_zone_device(machine, pfns)]
            if device.size:
                put_page(machine, pfns)
                yield from _bring_home(machine, device)
                continue
            if pfns.size < stop - start:
                put_page(machine, pfns)
                raise KernelError(_EFAULT, f"{machine.names.place(mm, start, stop)}: not all")
            if any(device_file_of(machine, vma.file) for vma in vmas_in(machine, mm, start, stop)):
                put_page(machine, pfns)
                raise KernelError(_EOPNOTSUPP, "a device file is mapped there")
            break
    finally:
        machine.up_read(lock)
    machine.add("page.refcount", as_rows(page_rows(machine, pfns)), GUP_PIN_COUNTING_BIAS - 1)
    _note(machine, mm, pfns, _PIN)
    yield machine.step("{range} {are} pinned.", mm, start, stop)


def _bring_home(machine: Machine, pfns: Pfns) -> Routine[None]:
    """Move device memory to RAM, page after page, up to the first that somebody else holds."""
    rows = page_rows(machine, pfns)
    held = np.flatnonzero(machine["page.refcount"][rows] != machine["page.mapcount"][rows])
    for first, last in machine.chunks(0, int(held[0]) + 1 if held.size else pfns.size):
        yield from migrate_device_coherent_pages(machine, pfns[first:last])
    if held.size:
        raise KernelError(_EBUSY, "somebody holds device memory, which so cannot come home")


@kernel("mm/gup.c")
def unpin_user_pages(machine: Machine, mm: int) -> Routine[None]:
    """Give up the pins.

    Raises
    ------
    KernelError
        ENXIO when there are none.
    """
    pfns = _forget(machine, mm, _PIN)
    if not pfns.size:
        raise KernelError(_ENXIO, "no buffer is registered")
    machine.add("page.refcount", as_rows(page_rows(machine, pfns)), 1 - GUP_PIN_COUNTING_BIAS)
    put_page(machine, pfns)
    yield machine.step("The pins are gone.", mm)


def _rows(machine: Machine, mm: int, kind: int) -> Pfns:
    return np.flatnonzero((machine["held.mm"] == mm) & (machine["held.kind"] == kind))


def _note(machine: Machine, mm: int, pfns: Pfns, kind: int) -> None:
    used = np.flatnonzero(machine["held.pfn"])
    first = int(used[-1]) + 1 if used.size else 1
    rows = slice(first, first + pfns.size)
    for column, value in (("pfn", pfns), ("mm", mm), ("kind", kind)):
        machine.write(f"held.{column}", rows, value)


def _forget(machine: Machine, mm: int, kind: int) -> Pfns:
    rows = _rows(machine, mm, kind)
    pfns = machine["held.pfn"][rows].copy()
    for column in ("pfn", "mm", "kind"):
        machine.write(f"held.{column}", rows, 0)
    return pfns
