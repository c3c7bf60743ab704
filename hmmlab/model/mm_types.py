"""Address spaces and their mappings: what they are, and finding them.

A VMA is a row of the ``vma.*`` columns; :class:`Vma` is a frozen look at one, so fetch a new one
after a change.

Source: include/linux/mm_types.h, mm/mmap.c (finding).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hmmlab.model.entry import ACCESSED, NX, PRESENT, PROTNONE, RW, USER
from hmmlab.model.machine import Machine
from hmmlab.model.page_table import free_root, new_root
from hmmlab.model.state import State

__all__ = [
    "VM_ACCESS_FLAGS",
    "VM_ACCOUNT",
    "VM_DONTCOPY",
    "VM_DONTEXPAND",
    "VM_EXEC",
    "VM_FLAG_NAMES",
    "VM_HUGEPAGE",
    "VM_HUGETLB",
    "VM_IO",
    "VM_LOCKED",
    "VM_MAYEXEC",
    "VM_MAYREAD",
    "VM_MAYSHARE",
    "VM_MAYWRITE",
    "VM_MERGEABLE",
    "VM_MIXEDMAP",
    "VM_NOHUGEPAGE",
    "VM_NORESERVE",
    "VM_PFNMAP",
    "VM_READ",
    "VM_SHARED",
    "VM_SOFTDIRTY",
    "VM_SPECIAL",
    "VM_WIPEONFORK",
    "VM_WRITE",
    "Vma",
    "find_vma",
    "find_vma_prev",
    "find_vmas_of_file",
    "flags_of_prot",
    "free_mm",
    "is_cow_mapping",
    "mm_is_alive",
    "mm_lock",
    "mm_root",
    "new_mm",
    "next_order",
    "vm_page_prot",
    "vma_at",
    "vma_lookup",
    "vmas_around",
    "vmas_in",
    "vmas_of",
]

VM_READ = 0x1
VM_WRITE = 0x2
VM_EXEC = 0x4
VM_SHARED = 0x8
VM_MAYREAD = 0x10
VM_MAYWRITE = 0x20
VM_MAYEXEC = 0x40
VM_MAYSHARE = 0x80
VM_PFNMAP = 0x400
VM_LOCKED = 0x2000
VM_IO = 0x4000
VM_DONTCOPY = 0x20000
VM_DONTEXPAND = 0x40000
VM_ACCOUNT = 0x100000
VM_NORESERVE = 0x200000
VM_HUGETLB = 0x400000
VM_WIPEONFORK = 0x02000000
VM_SOFTDIRTY = 0x08000000
VM_MIXEDMAP = 0x10000000
VM_HUGEPAGE = 0x20000000
VM_NOHUGEPAGE = 0x40000000
VM_MERGEABLE = 0x80000000

VM_ACCESS_FLAGS = VM_READ | VM_WRITE | VM_EXEC
VM_SPECIAL = VM_IO | VM_DONTEXPAND | VM_PFNMAP | VM_MIXEDMAP

#: Flag bits a reader may meet, with their names.
VM_FLAG_NAMES = {
    value: name
    for name, value in sorted(globals().items())
    if name.startswith("VM_") and name not in ("VM_ACCESS_FLAGS", "VM_SPECIAL")
}

_DEAD = -1

Machine.declare("mm.root", np.int64, "the process's PGD table; -1 when the process has ended")
Machine.declare("mm.lock", np.int64, "number of the mmap_lock")
Machine.declare("vma.mm", np.int32, "address space of the mapping; 0 is a free row")
Machine.declare("vma.start", np.int64, "first page of the mapping")
Machine.declare("vma.end", np.int64, "page past the last of the mapping")
Machine.declare("vma.flags", np.uint64, "VM_* bits")
Machine.declare("vma.pgoff", np.int64, "offset of the first page in what is mapped, in pages")
Machine.declare("vma.anon_vma", np.int32, "anon_vma of the mapping; 0 before its first own page")
Machine.declare("vma.file", np.int32, "file that is mapped; 0 for anonymous memory")
Machine.declare("vma.order", np.int64, "place among the mappings of a file that begin alike")
Machine.declare("vma.ra_page", np.int64, "page of the last read from swap for the mapping")
Machine.declare("vma.ra_window", np.int64, "pages that were read then")
Machine.declare("vma.ra_hits", np.int64, "pages found in the swap cache since, read ahead in time")
Machine.declare("vma.resv", np.int32, "reservation of huge pages; -1 where the pool took them back")
Machine.declare("resv.users", np.int32, "mappings that share a reservation of huge pages")
Machine.declare("order.next", np.int64, "what the next place in an order is called")


class Vma(NamedTuple):
    """A look at one mapping; pages ``start`` to ``end - 1``."""

    row: int
    mm: int
    start: int
    end: int
    flags: int
    pgoff: int
    anon_vma: int
    file: int

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return self.end - self.start

    @property
    def is_anonymous(self) -> bool:
        """Whether its pages come from nowhere but memory."""
        return not self.file

    @property
    def permissions(self) -> str:
        """As in /proc/self/maps: ``rw-p``."""
        letters = zip("rwx", (VM_READ, VM_WRITE, VM_EXEC), strict=True)
        return "".join(c if self.flags & bit else "-" for c, bit in letters) + (
            "s" if self.flags & VM_SHARED else "p"
        )

    def pgoff_of(self, vpn: int) -> int:
        """Offset of page ``vpn`` in what is mapped (``linear_page_index``)."""
        return self.pgoff + vpn - self.start


# --- address spaces -------------------------------------------------------------------------------


def new_mm(machine: Machine, name: str) -> int:
    """Number of a new, empty address space."""
    mm = machine.take("mm.root")
    machine.write("mm.lock", mm, machine.new_lock(f"the mmap_lock of {name}"))
    machine.write("mm.root", mm, new_root(machine))
    return mm


def free_mm(machine: Machine, mm: int) -> None:
    """Free an address space whose page tables are empty; its number is not used again."""
    free_root(machine, mm_root(machine, mm))
    machine.write("mm.root", mm, _DEAD)


def mm_is_alive(state: State, mm: int) -> bool:
    """Whether the address space still has a user (``mmget_not_zero``)."""
    return bool(state["mm.root"][mm] > 0)


def mm_root(state: State, mm: int) -> int:
    """The address space's PGD table."""
    return int(state["mm.root"][mm])


def mm_lock(state: State, mm: int) -> int:
    """The address space's mmap_lock."""
    return int(state["mm.lock"][mm])


# --- protection -----------------------------------------------------------------------------------


def flags_of_prot(prot: str) -> int:
    """VM_* access bits of a protection such as ``rw``, ``r``, ``none``.

    Raises
    ------
    ValueError
        When ``prot`` is not a subset of ``rwx`` or ``none``.
    """
    if prot == "none":
        return 0
    if not prot or set(prot) - set("rwx") or len(set(prot)) != len(prot):
        raise ValueError(f"protection {prot!r}; expected letters of 'rwx', or 'none'")
    bits = {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC}
    return sum(bits[letter] for letter in prot)


def vm_page_prot(flags: int) -> int:
    """Bits of a new word in a mapping with ``flags`` (``vm_get_page_prot``).

    A private mapping's words are never born writable, for the first write must be seen; nor are
    those of a shared one whose writes are tracked (soft-dirty).
    """
    if not flags & VM_ACCESS_FLAGS:
        return PROTNONE | ACCESSED
    prot = PRESENT | USER | ACCESSED
    if not flags & VM_EXEC:
        prot |= NX
    if flags & VM_WRITE and flags & VM_SHARED and flags & VM_SOFTDIRTY:
        prot |= RW
    return prot


def is_cow_mapping(flags: int) -> bool:
    """Whether writes to a mapping with ``flags`` are its own, now or once they are allowed."""
    return flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE


# --- finding --------------------------------------------------------------------------------------


def vma_at(state: State, row: int) -> Vma:
    """A look at the VMA in ``row``."""
    return Vma(
        row,
        state["vma.mm"].item(row),
        state["vma.start"].item(row),
        state["vma.end"].item(row),
        state["vma.flags"].item(row),
        state["vma.pgoff"].item(row),
        state["vma.anon_vma"].item(row),
        state["vma.file"].item(row),
    )


def _sorted_rows(state: State, mm: int) -> np.ndarray:
    rows = (state["vma.mm"] == mm).nonzero()[0] if mm else np.zeros(0, np.int64)
    return rows[state["vma.start"][rows].argsort()] if rows.size > 1 else rows


def vmas_of(state: State, mm: int) -> list[Vma]:
    """All mappings of an address space, by address."""
    return [vma_at(state, row) for row in _sorted_rows(state, mm).tolist()]


def vmas_around(
    state: State, mm: int, start: int, stop: int
) -> tuple[Vma | None, list[Vma], Vma | None]:
    """Mappings that overlap pages ``start`` to ``stop - 1``, the one below them, and above them."""
    rows = _sorted_rows(state, mm)
    first = int(state["vma.end"][rows].searchsorted(start, "right"))
    last = int(state["vma.start"][rows].searchsorted(stop, "left"))
    below = vma_at(state, int(rows[first - 1])) if first else None
    above = vma_at(state, int(rows[last])) if last < rows.size else None
    return below, [vma_at(state, row) for row in rows[first:last].tolist()], above


def vmas_in(state: State, mm: int, start: int, stop: int) -> Iterator[Vma]:
    """Mappings that overlap pages ``start`` to ``stop - 1``, by address."""
    rows = _sorted_rows(state, mm)
    keep = (state["vma.end"][rows] > start) & (state["vma.start"][rows] < stop)
    return (vma_at(state, row) for row in rows[keep].tolist())


def find_vma_prev(state: State, mm: int, vpn: int) -> tuple[Vma | None, Vma | None]:
    """The first mapping that ends above ``vpn``, and the one before it."""
    rows = _sorted_rows(state, mm)
    at = int(state["vma.end"][rows].searchsorted(vpn, "right"))
    found = vma_at(state, int(rows[at])) if at < rows.size else None
    return found, vma_at(state, int(rows[at - 1])) if at else None


def find_vma(state: State, mm: int, vpn: int) -> Vma | None:
    """The first mapping that ends above ``vpn``; it may begin above it too."""
    return find_vma_prev(state, mm, vpn)[0]


def vma_lookup(state: State, mm: int, vpn: int) -> Vma | None:
    """The mapping that holds ``vpn``."""
    vma = find_vma(state, mm, vpn)
    return vma if vma and vma.start <= vpn else None


def find_vmas_of_file(state: State, file: int) -> list[int]:
    """Rows of the mappings of a file, in the order of its interval tree (``i_mmap``)."""
    rows = np.flatnonzero(state["vma.file"] == file)
    order = np.lexsort((state["vma.order"][rows], state["vma.pgoff"][rows]))
    return [int(row) for row in rows[order]]


# --- order ----------------------------------------------------------------------------------------


def next_order(machine: Machine) -> int:
    """A place behind all that were given out before."""
    order = int(machine["order.next"][0]) + 1
    machine.write("order.next", 0, order)
    return order
