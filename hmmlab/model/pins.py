"""References that others hold to a process's pages: pages in a pipe, and long-term pins.

A pipe into which pages were spliced holds one reference to each; a buffer registered with io_uring
pins its pages, which counts 1024 references each, so that a pin can be told from a reference.

A process has at most one of each, from its first use on, and shares it with the children that it
forks: what it holds is let go when the last of them has closed it.

Source: mm/gup.c (``pin_user_pages``, ``check_and_migrate_movable_pages``), fs/splice.c
(``vmsplice``), io_uring/rsrc.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.access import get_user_pages
from hmmlab.model.entry import Pfns
from hmmlab.model.filemap import device_file_of
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.migrate import migrate_device_coherent_pages
from hmmlab.model.mm_types import Vma, mm_lock, vmas_in
from hmmlab.model.page import GUP_PIN_COUNTING_BIAS, is_zone_device, page_rows
from hmmlab.model.page_ref import note_held, put_page
from hmmlab.model.rows import as_rows

__all__ = [
    "close_holders",
    "pin_user_pages",
    "share_holders",
    "unpin_user_pages",
    "vmsplice",
    "vmsplice_end",
]

_ENXIO, _EBADF, _EAGAIN, _EFAULT, _EBUSY, _EINVAL, _EOPNOTSUPP = 6, 9, 11, 14, 16, 22, 95

#: Pages that the pipe takes (1 MiB), and that are taken at a time (``iter_to_pipe``).
_PIPE, _BATCH = 256, 16

#: References that a pipe and an io_uring hold to a page.
_PIPE_REFERENCES, _PIN_REFERENCES = 1, GUP_PIN_COUNTING_BIAS

Machine.declare("mm.pipe", np.int32, "pipe that the process has open; 0 for none")
Machine.declare("mm.ring", np.int32, "io_uring that the process has open; 0 for none")
Machine.declare("holder.users", np.int32, "processes that have a pipe or an io_uring open; 0: free")


@kernel("fs/splice.c", "__x64_sys_vmsplice")
def vmsplice(machine: Machine, mm: int, start: int, stop: int) -> Routine[int]:
    """Put pages into a pipe, which holds a reference to each. Returns how many.

    They are taken some at a time, and those for which there is no room are given back.

    Raises
    ------
    KernelError
        EAGAIN when the pipe is full; EFAULT when not even the first page can be had.
    """
    pipe = _open(machine, "mm.pipe", mm)
    room = _PIPE - _rows(machine, pipe).size
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
    note_held(machine, pipe, pfns, _PIPE_REFERENCES)
    yield machine.step("A pipe holds {range}.", mm, start, start + pfns.size)
    return int(pfns.size)


@kernel("fs/pipe.c", "pipe_release")
def vmsplice_end(machine: Machine, mm: int) -> Routine[None]:
    """The pipe is closed; with its last user it gives up its pages."""
    _close(machine, "mm.pipe", mm)
    yield machine.step("The pipe is closed.", mm)


@kernel("mm/gup.c")
def pin_user_pages(machine: Machine, mm: int, start: int, stop: int) -> Routine[None]:
    """Pin pages for long, for writing. Device memory comes home first: it cannot be pinned.

    Raises
    ------
    KernelError
        EFAULT when one cannot be had or written; EBUSY when a buffer is registered already,
        or somebody holds device memory; EINVAL across the mappings of two files;
        EOPNOTSUPP where a device file is mapped.
    """
    ring = _open(machine, "mm.ring", mm)
    if _rows(machine, ring).size:
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
            refused = _file_that_is_refused(machine, list(vmas_in(machine, mm, start, stop)))
            if refused:
                put_page(machine, pfns)
                raise refused
            break
    finally:
        machine.up_read(lock)
    machine.add("page.refcount", as_rows(page_rows(machine, pfns)), _PIN_REFERENCES - 1)
    note_held(machine, ring, pfns, _PIN_REFERENCES)
    yield machine.step("{range} {are} pinned.", mm, start, stop)


def _file_that_is_refused(machine: Machine, vmas: list[Vma]) -> KernelError | None:
    """What ``io_pin_pages`` says of the files that are mapped, page after page."""
    for vma in vmas:
        if vma.file != vmas[0].file:
            return KernelError(_EINVAL, "the pages are of different files")
        if device_file_of(machine, vma.file):
            return KernelError(_EOPNOTSUPP, "a device file is mapped there")
    return None


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
    """Give up the pins, whoever has made them.

    Raises
    ------
    KernelError
        EBADF when no io_uring is open; ENXIO when it has no pins.
    """
    ring = int(machine["mm.ring"][mm])
    if not ring:
        raise KernelError(_EBADF, "no io_uring is open")
    if not _rows(machine, ring).size:
        raise KernelError(_ENXIO, "no buffer is registered")
    _let_go(machine, ring)
    yield machine.step("The pins are gone.", mm)


# --- who has a pipe or an io_uring open -----------------------------------------------------------


def share_holders(machine: Machine, mm: int, oldmm: int) -> None:
    """Let a child have open what its parent has."""
    for column in ("mm.pipe", "mm.ring"):
        holder = int(machine[column][oldmm])
        if holder:
            machine.write(column, mm, holder)
            machine.add("holder.users", holder, 1)


def close_holders(machine: Machine, mm: int) -> None:
    """Close what a process that ends has open."""
    for column in ("mm.pipe", "mm.ring"):
        _close(machine, column, mm)


def _open(machine: Machine, column: str, mm: int) -> int:
    if not machine[column][mm]:
        holder = machine.take("holder.users")
        machine.write("holder.users", holder, 1)
        machine.write(column, mm, holder)
    return int(machine[column][mm])


def _close(machine: Machine, column: str, mm: int) -> None:
    holder = int(machine[column][mm])
    if holder:
        machine.write(column, mm, 0)
        machine.add("holder.users", holder, -1)
        if not machine["holder.users"][holder]:
            _let_go(machine, holder)


def _let_go(machine: Machine, holder: int) -> None:
    rows = _rows(machine, holder)
    pfns, references = machine["held.pfn"][rows], machine["held.references"][rows]
    for column in ("pfn", "holder", "references"):
        machine.write(f"held.{column}", rows, 0)
    machine.add("page.refcount", page_rows(machine, pfns), 1 - references)
    put_page(machine, pfns)


def _rows(machine: Machine, holder: int) -> NDArray[np.int64]:
    return np.flatnonzero(machine["held.holder"] == holder)
