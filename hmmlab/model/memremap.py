"""ZONE_DEVICE: device memory with struct pages, a pagemap for each region of it.

Which frame of a pagemap is used, and what becomes of it when it is free, is its driver's business.

Source: mm/memremap.c, kernel/resource.c (``request_free_mem_region``).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from hmmlab.model.alike import some
from hmmlab.model.entry import Bools, Pfns
from hmmlab.model.geometry import SECTION_PAGES
from hmmlab.model.machine import KernelError, Machine
from hmmlab.model.page import PHYSICAL_PAGES
from hmmlab.model.rows import Rows, unique_rows
from hmmlab.model.state import State

__all__ = [
    "MEMORY_DEVICE_COHERENT",
    "MEMORY_DEVICE_PRIVATE",
    "Pagemap",
    "free_mem_region",
    "free_zone_device_page",
    "is_device_private_page",
    "memremap_pages",
    "memunmap_pages",
    "of_pagemap",
    "pagemap_of",
]

Machine.declare("section.pagemap", np.int32, "pagemap of a section of device memory, from the top")
Machine.declare("pagemap.first", np.int64, "first frame of a pagemap")
Machine.declare("pagemap.last", np.int64, "frame past the last of a pagemap")
Machine.declare("pagemap.owner", np.int32, "device whose memory this is")
Machine.declare("pagemap.type", np.int32, "1 device-private, 2 device-coherent")

MEMORY_DEVICE_PRIVATE = 1
MEMORY_DEVICE_COHERENT = 2


class Pagemap(Protocol):
    """What a driver provides for its device memory (``struct dev_pagemap_ops``)."""

    def page_free(self, machine: Machine, pfns: Pfns) -> None:
        """The last reference to each of ``pfns`` is gone, in this order."""


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
    machine.reserve("page.refcount", last_row)
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


def free_zone_device_page(machine: Machine, pfns: Pfns, rows: Rows) -> None:
    """Hand free device frames back to their driver, in order (mm/memremap.c)."""
    machine.called("free_zone_device_page", pfns.size)
    for column in ("flags", "content", "mapping", "index"):
        machine.write(f"page.{column}", rows, 0)
    maps = pagemap_of(machine, pfns, rows)
    for pagemap in unique_rows(maps).tolist():
        machine.objects["pagemap"][pagemap].page_free(machine, some(pfns, maps == pagemap))


def is_device_private_page(state: State, pfns: Pfns, rows: Rows | None = None) -> Bools:
    """Whether frames are device memory that the CPU cannot reach; shaped as they are, or one."""
    found: Bools = of_pagemap(state, "type", pfns, rows) == MEMORY_DEVICE_PRIVATE
    return found
