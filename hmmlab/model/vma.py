"""Making, changing and removing one mapping, with its places in a file and in its anon_vmas.

Source: mm/mmap.c, kernel/fork.c (``vm_area_dup``).
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.anon_vma import anon_vma_chain, unlink_anon_vmas
from hmmlab.model.filemap import get_file, put_file
from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import Vma, next_order, vma_at

__all__ = ["insert_after", "move_edges", "new_vma", "remove_vma", "vm_area_dup"]

_HISTORY = ("vma.ra_page", "vma.ra_window", "vma.ra_hits")


def new_vma(
    machine: Machine, mm: int, start: int, end: int, flags: int, pgoff: int, file: int = 0
) -> Vma:
    """A new mapping, which nothing has merged with."""
    row = machine.take("vma.mm")
    for column, value in (
        ("mm", mm),
        ("start", start),
        ("end", end),
        ("flags", flags),
        ("pgoff", pgoff),
        ("file", file),
        ("order", next_order(machine) if file else 0),
    ):
        machine.write(f"vma.{column}", row, value)
    if file:
        get_file(machine, file)
    return vma_at(machine, row)


def vm_area_dup(machine: Machine, vma: Vma, mm: int, start: int, end: int, pgoff: int) -> Vma:
    """A new mapping of pages ``start`` to ``end - 1`` with all else as ``vma`` has it."""
    twin = new_vma(machine, mm, start, end, vma.flags, pgoff, vma.file)
    for column in _HISTORY:
        machine.write(column, twin.row, machine[column][vma.row])
    reservation = int(machine["vma.resv"][vma.row])
    if mm == vma.mm and reservation:  # a child has none
        machine.write("vma.resv", twin.row, reservation)
        if reservation > 0:
            machine.add("resv.users", reservation, 1)
    return twin


def remove_vma(machine: Machine, vma: Vma) -> None:
    """Free the row of a mapping, and its place in every anon_vma."""
    unlink_anon_vmas(machine, vma)
    for column in ("mm", "start", "end", "flags", "pgoff", "file", "order"):
        machine.write(f"vma.{column}", vma.row, 0)
    for column in (*_HISTORY, "vma.resv"):
        machine.write(column, vma.row, 0)
    if vma.file:
        put_file(machine, vma.file)


def move_edges(machine: Machine, vma: Vma, start: int, end: int) -> Vma:
    """Give a mapping other borders; it is the last of those that begin alike from now on."""
    machine.write("vma.start", vma.row, start)
    machine.write("vma.end", vma.row, end)
    machine.write("vma.pgoff", vma.row, vma.pgoff_of(start))
    if vma.file:
        machine.write("vma.order", vma.row, next_order(machine))
    links = anon_vma_chain(machine, vma)
    if links.size:
        machine.write("avc.order", links, next_order(machine))
    return vma_at(machine, vma.row)


def insert_after(machine: Machine, vma: Vma, before: Vma) -> None:
    """Let a mapping of a file come right after ``before``, which begins alike."""
    order = int(machine["vma.order"][before.row])
    later = np.flatnonzero((machine["vma.file"] == vma.file) & (machine["vma.order"] > order))
    machine.write("vma.order", later, machine["vma.order"][later] + 1)
    machine.write("vma.order", vma.row, order + 1)
    next_order(machine)
