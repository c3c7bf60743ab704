"""The allocator of RAM: two nodes, each with frames never used and a free list.

Which RAM frame is handed out shows in no answer of the kernel, so they go out in bulk.

Source: mm/page_alloc.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.alike import some
from hmmlab.model.entry import Pfns, Words
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.machine import KernelError, Machine
from hmmlab.model.page import ZERO_PFN
from hmmlab.model.rows import Rows, as_rows, first_and_last
from hmmlab.model.state import State

__all__ = [
    "alloc_huge_pages",
    "alloc_pages",
    "free_pages",
    "free_ram",
    "node_of",
]

_FIRST_FREE_PFN = 2

#: What is forgotten of a frame that is freed.
_FORGOTTEN = ("page.flags", "page.mapping", "page.index", "page.compound", "page.private")

Machine.declare("zone.used", np.int64, "frames of a node that were handed out at least once")
Machine.declare("zone.free", np.int64, "frames of a node on its free list")
Machine.declare("zone.huge", np.int64, "frames of a node handed out from its end, 512 at a time")
Machine.declare("zone.free_list.0", np.int64, "free list of node 0")
Machine.declare("zone.free_list.1", np.int64, "free list of node 1")


@Machine.at_boot
def _reserve_frames(machine: Machine) -> None:
    machine.write("zone.used", 0, _FIRST_FREE_PFN)
    machine.write("page.refcount", ZERO_PFN, 1)


def _node_limits(machine: Machine, node: int) -> tuple[int, int]:
    half = machine.ram_pages // 2
    return (0, half) if node == 0 else (half, machine.ram_pages)


def node_of(state: State, pfns: Pfns, rows: Rows | None = None) -> Pfns:
    """NUMA node of frames of RAM, one for all where their ``rows`` are given and say so."""
    middle = state.ram_pages // 2
    if isinstance(rows, slice):
        low, high = first_and_last(rows)
        if high < middle or low >= middle:
            return np.array([int(low >= middle)])
    return (pfns >= middle).astype(np.int64)


def free_ram(state: Machine) -> int:
    """How many frames :func:`alloc_pages` could hand out."""
    used = state["zone.used"][:2] + state["zone.huge"][:2] - state["zone.free"][:2]
    return state.ram_pages - int(used.sum())


def alloc_pages(
    machine: Machine, count: int, node: int = 0, content: Words | None = None
) -> tuple[Pfns, Rows]:
    """``count`` frames with one reference each, from ``node`` or else from the other.

    They hold zeros, or ``content``, uint64 of shape (count,). Returns their numbers and their rows.

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
            last = machine[f"zone.free_list.{zone}"][free - again : free]
            # Upwards, where it is one way or the other: that is what passes are fastest in.
            recycled.append((zone, (last[::-1] if last[0] > last[-1] else last).copy()))
        if anew:
            fresh.append((zone, np.arange(first + used, first + used + anew)))
        missing -= again + anew
        if not missing:
            break
    if missing:
        raise KernelError(12, f"{count} frames wanted, RAM has {count - missing} left")
    parts = [pfns for _, pfns in sorted(recycled + fresh, key=lambda part: part[0] != node)]
    taken = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.int64)])
    rows = as_rows(taken)
    for zone, pfns in recycled:
        machine.add("zone.free", zone, -pfns.size)
        if content is None:
            machine.write("page.content", rows if pfns is taken else as_rows(pfns), 0)
    for zone, pfns in fresh:
        machine.add("zone.used", zone, pfns.size)
    if content is not None:
        machine.write("page.content", rows, content)
    machine.write("page.refcount", rows, 1)
    return taken, rows


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


def free_pages(machine: Machine, pfns: Pfns, rows: Rows) -> None:
    """Give frames of RAM back, whose ``rows`` these are."""
    # The content stays until the frame is used again.
    for column in _FORGOTTEN:
        machine.write(column, rows, 0)
    high = node_of(machine, pfns, rows) != 0
    for zone, freed in ((0, some(pfns, ~high)), (1, some(pfns, high))):
        if freed.size:
            top = int(machine["zone.free"][zone])
            machine.write(f"zone.free_list.{zone}", slice(top, top + freed.size), freed)
            machine.write("zone.free", zone, top + freed.size)
