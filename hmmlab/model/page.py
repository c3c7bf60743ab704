"""Frames: the columns of ``struct page``, the allocator of RAM, and ZONE_DEVICE.

    pfn   0 .. ram_pages            RAM, the first half node 0, the second half node 1
          .. 2**34                  free physical space
          2**34 - 65536 .. 2**34    the first chunk of device memory, then downwards

A frame's row is its pfn for RAM; device memory, which grows downwards from the top, follows
upwards: the frame below the top is the first row after RAM. Which RAM frame is handed out shows in
no answer of the kernel, so they go out in bulk; device frames are the driver's own business.

Source: include/linux/mm_types.h, mm/page_alloc.c, mm/memremap.c.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hmmlab.model.entry import Pfns
from hmmlab.model.geometry import MAX_PHYSMEM_BITS, PAGE_SHIFT, SECTION_PAGES
from hmmlab.model.machine import KernelError, Machine
from hmmlab.model.state import Rows, State

__all__ = [
    "GUP_PIN_COUNTING_BIAS",
    "PAGE_FLAGS",
    "PG_ANON",
    "PG_ANON_EXCLUSIVE",
    "PG_DIRTY",
    "PG_LOCKED",
    "PG_LRU",
    "PG_READAHEAD",
    "PG_SWAPBACKED",
    "PHYSICAL_PAGES",
    "ZERO_PFN",
    "Pagemap",
    "alloc_pages",
    "as_rows",
    "free_mem_region",
    "get_page",
    "is_zone_device",
    "memremap_pages",
    "memunmap_pages",
    "page_mapping",
    "page_rows",
    "pagemap_of",
    "put_page",
    "set_flags",
]

#: One more than the last frame number that a physical address can have.
PHYSICAL_PAGES = 1 << (MAX_PHYSMEM_BITS - PAGE_SHIFT)

#: The frame of zeros that every read of untouched anonymous memory maps.
ZERO_PFN = 1
_FIRST_FREE_PFN = 2

#: References from this many on may be pins.
GUP_PIN_COUNTING_BIAS = 1024

PG_LOCKED = 1 << 0
PG_DIRTY = 1 << 1
PG_LRU = 1 << 2
PG_ANON = 1 << 3
PG_ANON_EXCLUSIVE = 1 << 4
PG_SWAPBACKED = 1 << 5
PG_READAHEAD = 1 << 6

#: Names of the flag bits, from bit 0 up.
PAGE_FLAGS = ("locked", "dirty", "lru", "anon", "anon_exclusive", "swapbacked", "readahead")

Machine.declare("page.refcount", np.int32, "references to the frame; 0 is free")
Machine.declare("page.mapcount", np.int32, "page-table entries that map the frame")
Machine.declare("page.flags", np.uint32, "PG_* bits")
Machine.declare("page.content", np.uint64, "the frame's first eight bytes")
Machine.declare("page.mapping", np.int32, "number of the anon_vma or file that knows who maps it")
Machine.declare("page.index", np.int64, "offset of the page in its mapping, in pages")
Machine.declare("page.swap", np.int64, "slot of a frame in the swap cache; 0 for none")
Machine.declare("page.private", np.int64, "zone_device_data: the driver's own word")
Machine.declare("zone.used", np.int64, "frames of a node that were handed out at least once")
Machine.declare("zone.free", np.int64, "frames of a node on its free list")
Machine.declare("zone.free_list.0", np.int64, "free list of node 0")
Machine.declare("zone.free_list.1", np.int64, "free list of node 1")
Machine.declare("section.pagemap", np.int32, "pagemap of a section of device memory, from the top")
Machine.declare("pagemap.first", np.int64, "first frame of a pagemap")
Machine.declare("pagemap.last", np.int64, "frame past the last of a pagemap")
Machine.declare("pagemap.owner", np.int32, "device whose private memory this is")


_COLUMNS = ("refcount", "mapcount", "flags", "content", "mapping", "index", "swap", "private")


class Pagemap(Protocol):
    """What a driver provides for its device memory (``struct dev_pagemap_ops``)."""

    def page_free(self, machine: Machine, pfns: Pfns) -> None:
        """The last reference to each of ``pfns`` is gone, in this order."""


@Machine.at_boot
def _reserve_frames(machine: Machine) -> None:
    machine.write("zone.used", 0, _FIRST_FREE_PFN)
    machine.write("page.refcount", ZERO_PFN, 1)


# --- frame numbers and rows -----------------------------------------------------------------------


def page_rows(state: State, pfns: Pfns) -> Pfns:
    """Rows of the ``page.*`` columns for frame numbers (``pfn_to_page``)."""
    if pfns.size == 0 or pfns.max() < state.ram_pages:
        return pfns
    return np.where(pfns < state.ram_pages, pfns, state.ram_pages + PHYSICAL_PAGES - 1 - pfns)


def as_rows(rows: Pfns) -> Rows:
    """``rows`` as a slice where they are contiguous and ascending."""
    if rows.size and rows[-1] - rows[0] == rows.size - 1 and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def is_zone_device(state: State, pfns: Pfns) -> np.ndarray:
    """Whether frames are device memory, bool of the shape of ``pfns``."""
    return pfns >= state.ram_pages


def page_mapping(state: State, pfns: Pfns) -> np.ndarray:
    """Whether frames are in the cache of a file or in the swap cache (``page_mapping``)."""
    rows = page_rows(state, pfns)
    of_file = (state["page.mapping"][rows] != 0) & ((state["page.flags"][rows] & PG_ANON) == 0)
    return of_file | (state["page.swap"][rows] != 0)


# --- references and flags -------------------------------------------------------------------------


def get_page(machine: Machine, pfns: Pfns) -> None:
    """Take one reference to each of ``pfns``, which may repeat."""
    machine.add("page.refcount", as_rows(page_rows(machine, pfns)), 1)


def put_page(machine: Machine, pfns: Pfns) -> None:
    """Drop one reference to each of ``pfns``, which may repeat; free those that have no more.

    Device frames are given back to their driver in the order in which they stand in ``pfns``.
    """
    if pfns.size == 0:
        return
    rows = page_rows(machine, pfns)
    machine.add("page.refcount", as_rows(rows), -1)
    dead = machine["page.refcount"][as_rows(rows)] == 0
    if not dead.any():
        return
    gone = pfns[dead]
    if gone.size > 1 and (np.diff(np.sort(gone)) == 0).any():
        gone = gone[np.sort(np.unique(gone, return_index=True)[1])]
    device = is_zone_device(machine, gone)
    if not device.all():
        _free_ram(machine, gone[~device] if device.any() else gone)
    if device.any():
        _free_zone_device_page(machine, gone[device])


def set_flags(machine: Machine, pfns: Pfns, on: int = 0, off: int = 0) -> None:
    """Set and clear PG_* bits of ``pfns`` (unique)."""
    rows = as_rows(page_rows(machine, pfns))
    flags = machine.reserve("page.flags", rows)[rows]
    machine.write("page.flags", rows, (flags | np.uint32(on)) & np.uint32(~off & 0xFFFFFFFF))


# --- RAM ------------------------------------------------------------------------------------------


def _node_limits(machine: Machine, node: int) -> tuple[int, int]:
    half = machine.ram_pages // 2
    return (0, half) if node == 0 else (half, machine.ram_pages)


def alloc_pages(machine: Machine, count: int, node: int = 0) -> Pfns:
    """``count`` zeroed frames with one reference each, from ``node`` or else from the other.

    Raises
    ------
    KernelError
        ENOMEM when RAM is used up; then nothing has been taken.
    """
    taken: list[Pfns] = []
    missing = count
    for zone in (node, 1 - node):
        first, limit = _node_limits(machine, zone)
        free = int(machine["zone.free"][zone])
        used = int(machine["zone.used"][zone])
        recycled = min(missing, free)
        fresh = min(missing - recycled, limit - first - used)
        if recycled:
            stack = machine[f"zone.free_list.{zone}"]
            taken.append(stack[free - recycled : free][::-1].copy())
            machine.write("page.content", as_rows(taken[-1]), 0)
        if fresh:
            taken.append(np.arange(first + used, first + used + fresh))
        missing -= recycled + fresh
        if not missing:
            break
    if missing:
        raise KernelError(12, f"{count} frames wanted, RAM has {count - missing} left")
    for pfns in taken:
        _take_from_zone(machine, pfns)
    found = taken[0] if len(taken) == 1 else np.concatenate(taken or [np.zeros(0, np.int64)])
    machine.write("page.refcount", as_rows(found), 1)
    return found


def _take_from_zone(machine: Machine, pfns: Pfns) -> None:
    zone = int(pfns[0] >= _node_limits(machine, 0)[1])
    first, _ = _node_limits(machine, zone)
    if pfns[0] >= first + machine["zone.used"][zone]:
        machine.add("zone.used", zone, pfns.size)
    else:
        machine.add("zone.free", zone, -pfns.size)


def _free_ram(machine: Machine, pfns: Pfns) -> None:
    rows = as_rows(pfns)
    for column in ("flags", "mapping", "index", "private"):  # the content stays until it is reused
        machine.write(f"page.{column}", rows, 0)
    boundary = _node_limits(machine, 0)[1]
    high = pfns >= boundary
    for zone, freed in ((0, pfns[~high]), (1, pfns[high])):
        if freed.size:
            top = int(machine["zone.free"][zone])
            machine.write(f"zone.free_list.{zone}", slice(top, top + freed.size), freed)
            machine.write("zone.free", zone, top + freed.size)


# --- ZONE_DEVICE ----------------------------------------------------------------------------------


def _sections(first: int, last: int) -> slice:
    return slice(
        (PHYSICAL_PAGES - last) // SECTION_PAGES, (PHYSICAL_PAGES - first) // SECTION_PAGES
    )


def free_mem_region(machine: Machine, pages: int) -> int:
    """First frame of the highest free region of ``pages`` frames (``request_free_mem_region``).

    Raises
    ------
    KernelError
        ENOMEM when physical space has no such gap.
    """
    need = -(-pages // SECTION_PAGES)
    free = machine["section.pagemap"] == 0
    run = np.convolve(np.concatenate([free, np.ones(need, bool)]), np.ones(need, int), "valid")
    for slot in np.flatnonzero(run == need).tolist():
        last = PHYSICAL_PAGES - slot * SECTION_PAGES
        if last - need * SECTION_PAGES >= machine.ram_pages:
            return int(last - need * SECTION_PAGES)
    raise KernelError(12, f"no free region of {pages} frames in physical space")


def memremap_pages(machine: Machine, first: int, pages: int, owner: int, ops: Pagemap) -> int:
    """Give device memory its struct pages, all free. Returns the number of the pagemap."""
    pagemap = machine.take("pagemap.last")
    machine.write("pagemap.first", pagemap, first)
    machine.write("pagemap.last", pagemap, first + pages)
    machine.write("pagemap.owner", pagemap, owner)
    machine.write("section.pagemap", _sections(first, first + pages), pagemap)
    last_row = machine.ram_pages + PHYSICAL_PAGES - 1 - first
    for column in _COLUMNS:
        machine.reserve(f"page.{column}", last_row)
    machine.objects.setdefault("pagemap", {})[pagemap] = ops
    return pagemap


def memunmap_pages(machine: Machine, pagemap: int) -> None:
    """Take the struct pages of a pagemap away; every one of them must be free."""
    first, last = (int(machine[f"pagemap.{edge}"][pagemap]) for edge in ("first", "last"))
    machine.write("section.pagemap", _sections(first, last), 0)
    for column in ("first", "last", "owner"):
        machine.write(f"pagemap.{column}", pagemap, 0)


def pagemap_of(state: State, pfns: Pfns) -> Pfns:
    """Number of the pagemap of each device frame (``page->pgmap``), 0 for none."""
    slots = (PHYSICAL_PAGES - 1 - pfns) // SECTION_PAGES
    table = state["section.pagemap"]
    inside = (slots >= 0) & (slots < table.size)
    return np.where(inside, table[np.where(inside, slots, 0)], 0).astype(np.int64)


def _free_zone_device_page(machine: Machine, pfns: Pfns) -> None:
    """Hand free device frames back to their driver, in order (mm/memremap.c)."""
    machine.called("free_zone_device_page", pfns.size)
    rows = as_rows(page_rows(machine, pfns))
    for column in ("flags", "content", "mapping", "index"):
        machine.write(f"page.{column}", rows, 0)
    maps = pagemap_of(machine, pfns)
    for pagemap in np.unique(maps).tolist():
        machine.objects["pagemap"][pagemap].page_free(machine, pfns[maps == pagemap])
