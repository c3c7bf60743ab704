"""References to frames, and who holds those that no mapping tells of.

Who drops the last one frees the frame.

Source: include/linux/mm.h (``get_page``, ``put_page``), mm/swap.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.alike import all_of, any_of, some
from hmmlab.model.entry import Pfns
from hmmlab.model.machine import Machine
from hmmlab.model.memremap import free_zone_device_page
from hmmlab.model.page import is_zone_device, pfn_to_page
from hmmlab.model.page_alloc import free_pages
from hmmlab.model.rows import Rows, are_unique

__all__ = ["NOBODY", "get_page", "note_held", "put_page"]

#: Who holds references that the kernel has lost: they are given back never.
NOBODY = -1

Machine.declare("held.pfn", np.int64, "frame that somebody holds; 0 is a free row")
Machine.declare("held.holder", np.int32, "pipe or io_uring that holds it; -1: the kernel lost it")
Machine.declare("held.references", np.int32, "references that are held")


def note_held(machine: Machine, holder: int, pfns: Pfns, references: int) -> None:
    """Remember who holds so many references to each of ``pfns``, taken already."""
    used = np.flatnonzero(machine["held.pfn"])
    first = int(used[-1]) + 1 if used.size else 1
    rows = slice(first, first + pfns.size)
    for column, value in (("pfn", pfns), ("holder", holder), ("references", references)):
        machine.write(f"held.{column}", rows, value)


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
        free_pages(machine, pfns, rows)
    elif all_of(device):
        free_zone_device_page(machine, pfns, rows)
    else:
        for free, kind in ((free_pages, ~device), (free_zone_device_page, device)):
            free(machine, pfns[kind], pfn_to_page(machine, pfns[kind]))
