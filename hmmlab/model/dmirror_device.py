"""The test device's memory, after lib/test_hmm.c: its units, their chunks, and the free list.

A unit takes device memory a chunk at a time, hands frames out last in, first out, and gives them up
chunk by chunk. One thing is this driver's habit and no rule of the kernel; it is marked "habit".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import any_of, rows_where, some
from hmmlab.model.driver import backing
from hmmlab.model.entry import (
    MIGRATE_PFN_WRITE,
    Pfns,
    migrate_flags,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from hmmlab.model.geometry import SECTION_PAGES
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.memremap import (
    MEMORY_DEVICE_COHERENT,
    MEMORY_DEVICE_PRIVATE,
    free_mem_region,
    memremap_pages,
    memunmap_pages,
    pagemap_of,
)
from hmmlab.model.migrate import migrate_device_finalize, migrate_device_pages, migrate_device_range
from hmmlab.model.migrate_vma import MigrateVma
from hmmlab.model.mm_types import Vma
from hmmlab.model.page import PG_LOCKED, page_rows, pfn_to_page, set_flags
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_ref import put_page
from hmmlab.model.rows import as_rows

if TYPE_CHECKING:
    from hmmlab.model.test_hmm import Dmirror

__all__ = ["CHUNK_PAGES", "UNITS", "DmirrorDevice", "fill_dst"]

#: Frames of one chunk of device memory: 256 MiB.
CHUNK_PAGES = 2 * SECTION_PAGES

#: Units with device-private memory, and with device-coherent memory.
PRIVATE_UNITS = (0, 1)
COHERENT_UNITS = (2, 3)
UNITS = PRIVATE_UNITS + COHERENT_UNITS

_ENOMEM = 12

Machine.declare("dmirror_device.chunk", np.int64, "first frame of a unit's newest chunk")
Machine.declare("dmirror_device.fresh", np.int64, "frames of that chunk never handed out")
Machine.declare("dmirror_device.free", np.int64, "frames of a unit on its free list")
Machine.declare("dmirror_chunk.number", np.int64, "place of a pagemap's chunk among all, by age")
Machine.declare("dmirror_chunk.remove", np.int32, "1 for a pagemap whose chunk is being given up")
for _unit in UNITS:
    Machine.declare(f"dmirror_device.free_list.{_unit}", np.int64, f"free frames of unit {_unit}")


class DmirrorDevice:
    """One unit and its device memory: chunks, and frames handed out last in, first out.

    A new chunk's frames are handed out from its last downwards. A device-private frame is only a
    label: its data are in a frame of RAM taken at the same time, which ``page.private`` names. A
    device-coherent frame holds its data itself, and its unit has one chunk only.
    """

    def __init__(self, machine: Machine, unit: int) -> None:
        self.machine, self.unit = machine, unit
        self.owner = unit + 1
        self.coherent = unit in COHERENT_UNITS
        self.free_list = f"dmirror_device.free_list.{unit}"
        self.new_chunk()

    def new_chunk(self) -> None:
        """One more chunk, at the highest free place of physical space.

        Raises
        ------
        KernelError
            ENOMEM when there is none.
        """
        if self.coherent and any(self.chunks()):
            raise KernelError(_ENOMEM, f"unit {self.unit} has one chunk of memory only")
        first = free_mem_region(self.machine, CHUNK_PAGES)
        kind = MEMORY_DEVICE_COHERENT if self.coherent else MEMORY_DEVICE_PRIVATE
        pagemap = memremap_pages(self.machine, first, CHUNK_PAGES, self.owner, self, kind)
        number = int(self.machine["dmirror_chunk.number"].max(initial=0)) + 1
        self.machine.write("dmirror_chunk.number", pagemap, number)
        self.machine.write("dmirror_device.chunk", self.unit, first)
        self.machine.write("dmirror_device.fresh", self.unit, CHUNK_PAGES)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First frame of each chunk, and the one past its last, oldest chunk first."""
        mine = np.flatnonzero(self.machine["pagemap.owner"] == self.owner)
        for pagemap in mine[np.argsort(self.machine["dmirror_chunk.number"][mine])].tolist():
            yield (
                int(self.machine["pagemap.first"][pagemap]),
                int(self.machine["pagemap.last"][pagemap]),
            )

    @kernel("lib/test_hmm.c", "dmirror_device_remove_chunks")
    def remove_chunks(self) -> Routine[None]:
        """Give up all device memory, chunk by chunk; what is on it comes home to RAM first.

        A frame that somebody holds cannot go: it waits for that.
        """
        machine = self.machine
        for first, last in list(self.chunks()):
            pagemap = int(pagemap_of(machine, np.array([first]))[0])
            machine.write("dmirror_chunk.remove", pagemap, 1)
            self._remove_free_pages(first, last)
            yield from self.evict_chunk(first, last)
            rows = np.sort(page_rows(machine, np.arange(first, last)))
            while machine["page.refcount"][as_rows(rows)].any():
                yield machine.step(
                    "Somebody holds device memory that is to go.", lock="a page of the device"
                )
            memunmap_pages(machine, pagemap)
            for column in ("remove", "number"):
                machine.write(f"dmirror_chunk.{column}", pagemap, 0)
        for column in ("chunk", "fresh", "free"):
            machine.write(f"dmirror_device.{column}", self.unit, 0)
        yield machine.step("The device has no memory; the next migration makes a new chunk.")

    def _remove_free_pages(self, first: int, last: int) -> None:
        """Take a chunk's free frames off the list. Habit: those before its last one go too."""
        machine, unit = self.machine, self.unit
        if machine["dmirror_device.chunk"][unit] == first:
            machine.write("dmirror_device.fresh", unit, 0)
            machine.write("dmirror_device.free", unit, 0)
        free = machine[self.free_list][: int(machine["dmirror_device.free"][unit])]
        mine = np.flatnonzero((free >= first) & (free < last))
        if mine.size:
            machine.write("dmirror_device.free", unit, int(mine[0]))

    @kernel("lib/test_hmm.c", "dmirror_device_evict_chunk")
    def evict_chunk(self, first: int, last: int) -> Routine[None]:
        """Bring what is on frames ``first`` to ``last - 1`` home to RAM, wherever it is mapped."""
        machine = self.machine
        migrate = yield from migrate_device_range(machine, np.arange(first, last), self.owner)
        _, wanted = migrate.valid_and_migrating()
        if any_of(wanted):
            fill_dst(machine, migrate, wanted)
        yield from migrate_device_pages(machine, migrate)
        yield from migrate_device_finalize(machine, migrate)

    def alloc_pages(self, count: int, file: int) -> Pfns:
        """Up to ``count`` device frames for ``file``, locked, in the order of handing out."""
        machine, taken = self.machine, []
        backing = np.zeros(0, np.int64) if self.coherent else alloc_pages(machine, count)[0]
        missing = count
        while missing:
            free = int(machine["dmirror_device.free"][self.unit])
            fresh = int(machine["dmirror_device.fresh"][self.unit])
            if free:
                got = min(missing, free)
                taken.append(machine[self.free_list][free - got : free][::-1].copy())
                machine.write("dmirror_device.free", self.unit, free - got)
            elif fresh:
                got = min(missing, fresh)
                top = int(machine["dmirror_device.chunk"][self.unit]) + fresh
                taken.append(np.arange(top - 1, top - 1 - got, -1))
                machine.write("dmirror_device.fresh", self.unit, fresh - got)
            else:
                try:
                    self.new_chunk()
                except KernelError:
                    put_page(machine, backing[count - missing :])
                    break
                continue
            missing -= got
        pfns = taken[0] if len(taken) == 1 else np.concatenate([np.zeros(0, np.int64), *taken])
        rows = pfn_to_page(machine, pfns)
        machine.called("zone_device_page_init", pfns.size)
        machine.write("page.refcount", rows, 1)
        set_flags(machine, pfns, PG_LOCKED, rows=rows)
        if self.coherent:
            machine.write("page.private", rows, file)
        else:
            machine.write("page.private", rows, backing[: pfns.size])
            machine.write("page.private", as_rows(backing[: pfns.size]), file)
        return pfns

    # --- struct dev_pagemap_ops -------------------------------------------------------------------
    def page_free(self, machine: Machine, pfns: Pfns) -> None:
        """Take device frames back, and free the RAM behind them (``dmirror_devmem_free``)."""
        machine.called("dmirror_devmem_free", pfns.size)
        rows = pfn_to_page(machine, pfns)
        if not self.coherent:
            put_page(machine, machine["page.private"][rows].copy())
        machine.write("page.private", rows, 0)
        if machine["dmirror_chunk.remove"].any():
            pfns = pfns[machine["dmirror_chunk.remove"][pagemap_of(machine, pfns)] == 0]
        free = int(machine["dmirror_device.free"][self.unit])
        machine.write(self.free_list, slice(free, free + pfns.size), pfns)
        machine.write("dmirror_device.free", self.unit, free + pfns.size)

    def migrate_to_ram(
        self, machine: Machine, vma: Vma, vpns: Pfns, pfns: Pfns, flags: int
    ) -> Routine[None]:
        """The CPU touched device pages: bring each back by a migration of its own."""
        files = machine.alike("page.private", as_rows(backing(machine, pfns))).copy()
        # One file after another in page order, for frames are freed in that order.
        edges = [0, *(np.flatnonzero(files[1:] != files[:-1]) + 1).tolist(), pfns.size]
        for first, last in pairwise(edges):
            mirror: Dmirror = machine.objects["device_file"][int(files[first])]
            yield from mirror.devmem_fault(vma, vpns[first:last], pfns[first:last])


def fill_dst(machine: Machine, migrate: MigrateVma, wanted: NDArray[np.bool_]) -> None:
    """New, locked frames of RAM as ``dst`` of ``wanted``, with the content of ``src``."""
    src = some(migrate.src, wanted)
    source = pfn_to_page(machine, backing(machine, migrate_pfn_to_pfn(src)))
    frames, rows = alloc_pages(machine, src.size, content=machine["page.content"][source])
    set_flags(machine, frames, PG_LOCKED, rows=rows)
    entries = migrate_pfn(frames, migrate_flags(src) & np.uint8(MIGRATE_PFN_WRITE))
    migrate.dst[rows_where(wanted, migrate.dst.size)] = entries


@Machine.at_boot
def _load(machine: Machine) -> None:
    """The module makes one chunk a unit when it is loaded."""
    machine.objects["dmirror_device"] = {u: DmirrorDevice(machine, u) for u in UNITS}
