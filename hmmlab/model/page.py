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
from hmmlab.model.geometry import MAX_PHYSMEM_BITS, PAGE_SHIFT, PMD_PAGES, SECTION_PAGES
from hmmlab.model.machine import KernelError, Machine
from hmmlab.model.state import Rows, State, are_unique, unique_rows

__all__ = [
    "GUP_PIN_COUNTING_BIAS",
    "MEMORY_DEVICE_COHERENT",
    "MEMORY_DEVICE_PRIVATE",
    "PAGE_FLAGS",
    "PG_ANON",
    "PG_ANON_EXCLUSIVE",
    "PG_DIRTY",
    "PG_KSM",
    "PG_LOCKED",
    "PG_LRU",
    "PG_READAHEAD",
    "PG_SWAPBACKED",
    "PHYSICAL_PAGES",
    "ZERO_PFN",
    "Pagemap",
    "alloc_huge_pages",
    "alloc_pages",
    "as_rows",
    "folio_maybe_dma_pinned",
    "frames_of",
    "free_mem_region",
    "free_ram",
    "get_page",
    "is_device_private_page",
    "is_zone_device",
    "memremap_pages",
    "memunmap_pages",
    "node_of",
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
PG_KSM = 1 << 7

#: Names of the flag bits, from bit 0 up.
PAGE_FLAGS = ("locked", "dirty", "lru", "anon", "anon_exclusive", "swapbacked", "readahead", "ksm")

Machine.declare("page.refcount", np.int32, "references to the frame; 0 is free")
Machine.declare("page.mapcount", np.int32, "page-table entries that map the frame")
Machine.declare("page.flags", np.uint32, "PG_* bits")
Machine.declare("page.content", np.uint64, "the frame's first eight bytes")
Machine.declare("page.mapping", np.int32, "the anon_vma, file or KSM node that knows who maps it")
Machine.declare("page.index", np.int64, "offset of the page in its mapping, in pages")
Machine.declare("page.swap", np.int64, "slot of a frame in the swap cache; 0 for none")
Machine.declare("page.compound", np.int64, "first frame of the huge page; 0 for a page of its own")
Machine.declare("page.private", np.int64, "zone_device_data: the driver's own word")
Machine.declare("zone.used", np.int64, "frames of a node that were handed out at least once")
Machine.declare("zone.free", np.int64, "frames of a node on its free list")
Machine.declare("zone.huge", np.int64, "frames of a node handed out from its end, 512 at a time")
Machine.declare("zone.free_list.0", np.int64, "free list of node 0")
Machine.declare("zone.free_list.1", np.int64, "free list of node 1")
Machine.declare("section.pagemap", np.int32, "pagemap of a section of device memory, from the top")
Machine.declare("pagemap.first", np.int64, "first frame of a pagemap")
Machine.declare("pagemap.last", np.int64, "frame past the last of a pagemap")
Machine.declare("pagemap.owner", np.int32, "device whose memory this is")
Machine.declare("pagemap.type", np.int32, "1 device-private, 2 device-coherent")


_COLUMNS = (
    "refcount",
    "mapcount",
    "flags",
    "content",
    "mapping",
    "index",
    "swap",
    "compound",
    "private",
)


MEMORY_DEVICE_PRIVATE = 1
MEMORY_DEVICE_COHERENT = 2


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
    device = state.ram_pages + PHYSICAL_PAGES - 1 - pfns
    if pfns.min() >= state.ram_pages:
        return device
    return np.where(pfns < state.ram_pages, pfns, device)


def as_rows(rows: Pfns) -> Rows:
    """``rows`` as a slice where they are contiguous and ascending."""
    if rows.size and rows[-1] - rows[0] == rows.size - 1 and (rows[1:] > rows[:-1]).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def is_zone_device(state: State, pfns: Pfns) -> np.ndarray:
    """Whether frames are device memory, bool of the shape of ``pfns``."""
    return pfns >= state.ram_pages


def is_device_private_page(state: State, pfns: Pfns) -> np.ndarray:
    """Whether frames are device memory that the CPU cannot reach, bool of their shape."""
    device = is_zone_device(state, pfns)
    if not device.any():
        return device
    kinds = state["pagemap.type"][pagemap_of(state, pfns)]
    return device & (kinds == MEMORY_DEVICE_PRIVATE)


def folio_maybe_dma_pinned(state: State, pfns: Pfns) -> np.ndarray:
    """Whether frames, or others of their huge page, may be pinned; bool of their shape."""
    rows = page_rows(state, pfns)
    pinned = state["page.refcount"][rows] >= GUP_PIN_COUNTING_BIAS
    heads = state["page.compound"][rows]
    if heads.any():
        block = frames_of(heads[heads != 0]).reshape(-1, PMD_PAGES)
        mine = state["page.compound"][block] == heads[heads != 0][:, None]
        many = (state["page.refcount"][block] >= GUP_PIN_COUNTING_BIAS) & mine
        pinned[heads != 0] = many.any(axis=1)
    return pinned


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
    if not are_unique(gone):
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


def node_of(state: State, pfns: Pfns) -> Pfns:
    """NUMA node of frames of RAM."""
    return (pfns >= state.ram_pages // 2).astype(np.int64)


def free_ram(state: Machine) -> int:
    """How many frames :func:`alloc_pages` could hand out."""
    used = state["zone.used"][:2] + state["zone.huge"][:2] - state["zone.free"][:2]
    return state.ram_pages - int(used.sum())


def alloc_pages(machine: Machine, count: int, node: int = 0) -> Pfns:
    """``count`` zeroed frames with one reference each, from ``node`` or else from the other.

    Raises
    ------
    KernelError
        ENOMEM when RAM is used up; then nothing has been taken.
    """
    recycled: list[tuple[int, Pfns]] = []
    fresh: list[tuple[int, Pfns]] = []
    missing = count
    for zone in (node, 1 - node):
        first, limit = _node_limits(machine, zone)
        free, used, huge = (int(machine[f"zone.{n}"][zone]) for n in ("free", "used", "huge"))
        again = min(missing, free)
        anew = min(missing - again, limit - first - used - huge)
        if again:
            stack = machine[f"zone.free_list.{zone}"]
            recycled.append((zone, stack[free - again : free].copy()))
        if anew:
            fresh.append((zone, np.arange(first + used, first + used + anew)))
        missing -= again + anew
        if not missing:
            break
    if missing:
        raise KernelError(12, f"{count} frames wanted, RAM has {count - missing} left")
    for zone, pfns in recycled:
        machine.add("zone.free", zone, -pfns.size)
        machine.write("page.content", as_rows(pfns), 0)
    for zone, pfns in fresh:
        machine.add("zone.used", zone, pfns.size)
    taken = [pfns for _, pfns in sorted(recycled + fresh, key=lambda part: part[0] != node)]
    found = taken[0] if len(taken) == 1 else np.concatenate(taken or [np.zeros(0, np.int64)])
    machine.write("page.refcount", as_rows(found), 1)
    return found


def alloc_huge_pages(machine: Machine, count: int, node: int = 0) -> Pfns:
    """First frames of up to ``count`` zeroed huge pages of node ``node``, referenced and compound.

    Fewer where the node has no more 512 frames side by side that were never used.
    """
    first, limit = _node_limits(machine, node)
    used, huge = int(machine["zone.used"][node]), int(machine["zone.huge"][node])
    top = limit - huge
    count = min(count, (top - first - used) // PMD_PAGES, top // PMD_PAGES)
    heads = top - PMD_PAGES * np.arange(1, count + 1)
    heads -= heads % PMD_PAGES
    heads = heads[heads >= first + used]
    if heads.size:
        machine.write("zone.huge", node, limit - int(heads[-1]))
        pfns = (np.sort(heads)[:, None] + np.arange(PMD_PAGES)).ravel()
        machine.write("page.refcount", as_rows(pfns), 1)
        machine.write("page.compound", as_rows(pfns), pfns - pfns % PMD_PAGES)
    return heads


def frames_of(heads: Pfns) -> Pfns:
    """All frames of huge pages, in their order."""
    return (heads[:, None] + np.arange(PMD_PAGES)).ravel()


def _free_ram(machine: Machine, pfns: Pfns) -> None:
    rows = as_rows(pfns)
    # The content stays until the frame is used again.
    for column in ("flags", "mapping", "index", "compound", "private"):
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


def memremap_pages(
    machine: Machine,
    first: int,
    pages: int,
    owner: int,
    ops: Pagemap,
    kind: int = MEMORY_DEVICE_PRIVATE,
) -> int:
    """Give device memory its struct pages, all free. Returns the number of the pagemap."""
    pagemap = machine.take("pagemap.last")
    machine.write("pagemap.first", pagemap, first)
    machine.write("pagemap.last", pagemap, first + pages)
    machine.write("pagemap.owner", pagemap, owner)
    machine.write("pagemap.type", pagemap, kind)
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
    for column in ("first", "last", "owner", "type"):
        machine.write(f"pagemap.{column}", pagemap, 0)


def pagemap_of(state: State, pfns: Pfns) -> Pfns:
    """Number of the pagemap of each device frame (``page->pgmap``), 0 for none."""
    if pfns.size == 0 or pfns.max() < state.ram_pages:
        return np.zeros(pfns.size, np.int64)
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
    for pagemap in unique_rows(maps).tolist():
        machine.objects["pagemap"][pagemap].page_free(machine, pfns[maps == pagemap])
