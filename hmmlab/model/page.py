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

from typing import Any, Protocol

import numpy as np

from hmmlab.model.alike import alike, all_of, any_of, some
from hmmlab.model.entry import Bools, Pfns
from hmmlab.model.geometry import MAX_PHYSMEM_BITS, PAGE_SHIFT, PMD_PAGES, SECTION_PAGES
from hmmlab.model.machine import KernelError, Machine
from hmmlab.model.state import Rows, State, are_unique, first_and_last, row_numbers, unique_rows

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
    "of_pagemap",
    "page_mapping",
    "page_rows",
    "pfn_to_page",
    "put_page",
    "set_flags",
    "some_rows",
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
    """``rows`` as a slice where they are contiguous, ascending or descending.

    A row of a slice costs 0.1 to 0.3 ns to read or write, one of an index array 0.7 to 2.
    """
    if not rows.size:
        return rows
    first, last = int(rows[0]), int(rows[-1])
    if last - first == rows.size - 1 and (rows[1:] > rows[:-1]).all():
        return slice(first, last + 1)
    if first - last == rows.size - 1 and last and (rows[1:] < rows[:-1]).all():
        return slice(first, last - 1, -1)
    return rows


def some_rows(rows: Rows, mask: Bools) -> Rows:
    """The masked ones of ``rows``."""
    if all_of(mask):
        return rows
    return as_rows(some(row_numbers(rows), mask))


def pfn_to_page(state: State, pfns: Pfns) -> Rows:
    """Rows of the ``page.*`` columns for frame numbers, a slice where they are contiguous."""
    numbers = as_rows(pfns)
    if not isinstance(numbers, slice):
        return page_rows(state, pfns)
    low, high = first_and_last(numbers)
    if high < state.ram_pages:
        return numbers
    if low < state.ram_pages:
        return page_rows(state, pfns)
    top, step = state.ram_pages + PHYSICAL_PAGES - 1, -(numbers.step or 1)
    return slice(top - numbers.start, top - numbers.stop, step if step < 0 else None)


# Who has the rows of some frames at hand gives them too, here and below, for to find them takes
# half as long as to use them. Where they are a slice, one answer may stand for all of them.


def is_zone_device(state: State, pfns: Pfns, rows: Rows | None = None) -> Bools:
    """Whether frames are device memory, bool of the shape of ``pfns``, or one for all."""
    if isinstance(rows, slice):  # which is all RAM, or all device memory
        return np.array([rows.start >= state.ram_pages])
    return pfns >= state.ram_pages


def is_device_private_page(state: State, pfns: Pfns, rows: Rows | None = None) -> Bools:
    """Whether frames are device memory that the CPU cannot reach; shaped as they are, or one."""
    found: Bools = of_pagemap(state, "type", pfns, rows) == MEMORY_DEVICE_PRIVATE
    return found


def folio_maybe_dma_pinned(state: State, pfns: Pfns, rows: Rows | None = None) -> Bools:
    """Whether frames, or others of their huge page, may be pinned.

    Shaped as ``pfns`` are; where their ``rows`` are given, maybe one for all.
    """
    at = pfn_to_page(state, pfns) if rows is None else rows
    refcounts, heads = state["page.refcount"][at], alike(state["page.compound"][at])
    if not any_of(heads) and rows is not None:
        return alike(refcounts) >= GUP_PIN_COUNTING_BIAS
    pinned: Bools = refcounts >= GUP_PIN_COUNTING_BIAS
    heads = np.broadcast_to(heads, pinned.shape)
    if any_of(heads):
        block = frames_of(heads[heads != 0]).reshape(-1, PMD_PAGES)
        mine = state["page.compound"][block] == heads[heads != 0][:, None]
        many = (state["page.refcount"][block] >= GUP_PIN_COUNTING_BIAS) & mine
        pinned[heads != 0] = many.any(axis=1)
    return pinned


def page_mapping(state: State, pfns: Pfns, rows: Rows | None = None) -> Bools:
    """Whether frames are in the cache of a file or in the swap cache (``page_mapping``).

    Shaped as ``pfns`` are; where their ``rows`` are given, maybe one for all.
    """
    at = pfn_to_page(state, pfns) if rows is None else rows
    found: Bools = (alike(state["page.flags"][at]) & np.uint32(PG_ANON)) == 0
    if any_of(found):
        found = found & (state["page.mapping"][at] != 0)
    found = found | (alike(state["page.swap"][at]) != 0)
    return np.broadcast_to(found, pfns.shape) if rows is None else found


# --- references and flags -------------------------------------------------------------------------


def get_page(machine: Machine, pfns: Pfns, rows: Rows | None = None) -> None:
    """Take one reference to each of ``pfns``, which may repeat."""
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    machine.add("page.refcount", rows, 1)


def put_page(machine: Machine, pfns: Pfns, rows: Rows | None = None) -> None:
    """Drop one reference to each of ``pfns``, which may repeat; free those that have no more.

    Device frames are given back to their driver in the order in which they stand in ``pfns``.
    """
    if pfns.size == 0:
        return
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    machine.add("page.refcount", rows, -1)
    dead = machine["page.refcount"][rows] == 0
    if not any_of(dead):
        return
    if not isinstance(rows, slice) or not all_of(dead):
        pfns = some(pfns, dead)
        if not are_unique(pfns):
            pfns = pfns[np.sort(np.unique(pfns, return_index=True)[1])]
        rows = pfn_to_page(machine, pfns)
    device = is_zone_device(machine, pfns, rows)
    if not any_of(device):
        _free_ram(machine, pfns, rows)
    elif all_of(device):
        _free_zone_device_page(machine, pfns, rows)
    else:
        for free, kind in ((_free_ram, ~device), (_free_zone_device_page, device)):
            free(machine, pfns[kind], pfn_to_page(machine, pfns[kind]))


def set_flags(
    machine: Machine, pfns: Pfns, on: int = 0, off: int = 0, rows: Rows | None = None
) -> None:
    """Set and clear PG_* bits of ``pfns`` (unique)."""
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    flags = alike(machine.reserve("page.flags", rows)[rows])
    if on:
        flags = flags | np.uint32(on)
    if off:
        flags = flags & np.uint32(~off & 0xFFFFFFFF)
    machine.write("page.flags", rows, flags)


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
        rows = as_rows(pfns)
        machine.write("page.content", rows, 0)
        machine.write("page.refcount", rows, 1)
    for zone, pfns in fresh:
        machine.add("zone.used", zone, pfns.size)
        machine.write("page.refcount", as_rows(pfns), 1)
    taken = [pfns for _, pfns in sorted(recycled + fresh, key=lambda part: part[0] != node)]
    return taken[0] if len(taken) == 1 else np.concatenate(taken or [np.zeros(0, np.int64)])


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


def _free_ram(machine: Machine, pfns: Pfns, rows: Rows) -> None:
    # The content stays until the frame is used again.
    for column in ("flags", "mapping", "index", "compound", "private"):
        machine.write(f"page.{column}", rows, 0)
    high = pfns >= _node_limits(machine, 1)[0]
    for zone, freed in ((0, some(pfns, ~high)), (1, some(pfns, high))):
        if freed.size:
            top = int(machine["zone.free"][zone])
            machine.write(f"zone.free_list.{zone}", slice(top, top + freed.size), freed)
            machine.write("zone.free", zone, top + freed.size)


# --- ZONE_DEVICE ----------------------------------------------------------------------------------


def _section(pfns: Any) -> Any:
    """Place of a frame's section, from the top of physical space downwards."""
    return (PHYSICAL_PAGES - 1 - pfns) // SECTION_PAGES


def _sections(first: int, last: int) -> slice:
    return slice(
        (PHYSICAL_PAGES - last) // SECTION_PAGES, (PHYSICAL_PAGES - first) // SECTION_PAGES
    )


def free_mem_region(machine: Machine, pages: int) -> int:
    """First frame of a free region of ``pages`` frames (``request_free_mem_region``).

    The search begins at the top and goes down by the whole size, not to the next edge.

    Raises
    ------
    KernelError
        ENOMEM when physical space has no such gap.
    """
    need = -(-pages // SECTION_PAGES)
    free = machine["section.pagemap"] == 0
    run = np.convolve(np.concatenate([free, np.ones(need, bool)]), np.ones(need, int), "valid")
    for step in np.flatnonzero(run[::need] == need).tolist():
        last = PHYSICAL_PAGES - step * need * SECTION_PAGES
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


def pagemap_of(state: State, pfns: Pfns, rows: Rows | None = None) -> Pfns:
    """Number of the pagemap of each device frame (``page->pgmap``), 0 for none.

    Shaped as ``pfns`` are; where their ``rows`` are given, maybe one for all.
    """
    only = _only_pagemap(state, pfns, rows)
    if only is not None:
        return np.full(1 if isinstance(rows, slice) else pfns.size, only)
    table = state["section.pagemap"]
    slots = _section(pfns)
    inside = (slots >= 0) & (slots < table.size)
    return np.where(inside, table[np.where(inside, slots, 0)], 0).astype(np.int64)


def _only_pagemap(state: State, pfns: Pfns, rows: Rows | None = None) -> int | None:
    """The pagemap of all of some frames, 0 for RAM; None where it is not so simple."""
    if not pfns.size:
        return 0
    ends = pfns[[0, -1]] if isinstance(rows, slice) else pfns
    low, high = int(ends.min()), int(ends.max())
    if high < state.ram_pages:
        return 0
    between = state["section.pagemap"][_section(high) : _section(low) + 1]
    if between.size == _section(low) + 1 - _section(high) and (between == between[0]).all():
        return int(between[0])
    return None


def of_pagemap(state: State, field: str, pfns: Pfns, rows: Rows | None = None) -> np.ndarray:
    """What the pagemap of each frame has as ``field``, such as its ``owner``; 0 in RAM.

    Shaped as :func:`pagemap_of` says.
    """
    return state[f"pagemap.{field}"][pagemap_of(state, pfns, rows)]


def _free_zone_device_page(machine: Machine, pfns: Pfns, rows: Rows) -> None:
    """Hand free device frames back to their driver, in order (mm/memremap.c)."""
    machine.called("free_zone_device_page", pfns.size)
    for column in ("flags", "content", "mapping", "index"):
        machine.write(f"page.{column}", rows, 0)
    maps = pagemap_of(machine, pfns, rows)
    for pagemap in unique_rows(maps).tolist():
        machine.objects["pagemap"][pagemap].page_free(machine, some(pfns, maps == pagemap))
