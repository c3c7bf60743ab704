"""anon_vmas: which mappings may have a page of private memory.

An anon_vma is a number: pages of private memory remember it (``page.mapping``), and the ``avc.*``
columns tell which VMAs belong to it, for whoever asks who maps a page.

Source: mm/rmap.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import (
    VM_ACCESS_FLAGS,
    VM_SOFTDIRTY,
    Vma,
    find_vma,
    find_vma_prev,
    next_order,
    vma_at,
)
from hmmlab.model.rows import as_rows
from hmmlab.model.state import State

__all__ = [
    "anon_vma_chain",
    "anon_vma_clone",
    "anon_vma_fork",
    "anon_vma_prepare",
    "find_vmas_of_anon_vma",
    "is_singular",
    "root_anon_vma",
    "unlink_anon_vmas",
]

Machine.declare("avc.vma", np.int32, "a mapping that belongs to an anon_vma; 0 is a free row")
Machine.declare("avc.anon_vma", np.int32, "the anon_vma it belongs to")
Machine.declare("avc.age", np.int64, "place in the mapping's own list, oldest first")
Machine.declare("avc.order", np.int64, "place among the anon_vma's mappings that begin alike")
Machine.declare("anon_vma.used", np.int32, "anon_vmas made so far")
Machine.declare("anon_vma.parent", np.int32, "the one it was forked from; itself for a root")
Machine.declare("anon_vma.children", np.int32, "anon_vmas forked from it, a root being its own")
Machine.declare("anon_vma.active", np.int32, "mappings whose own anon_vma it is")


def find_vmas_of_anon_vma(state: State, anon_vma: int) -> list[int]:
    """Rows of the mappings that belong to an anon_vma, in the order of its interval tree."""
    links = np.flatnonzero(state["avc.anon_vma"] == anon_vma)
    rows = state["avc.vma"][links]
    order = np.lexsort((state["avc.order"][links], state["vma.pgoff"][rows]))
    return [int(row) for row in rows[order]]


def anon_vma_chain(state: State, vma: Vma) -> np.ndarray:
    """Rows of the mapping's links, oldest first."""
    links = (state["avc.vma"] == vma.row).nonzero()[0]
    return links[state["avc.age"][links].argsort()] if links.size > 1 else links


def is_singular(state: State, vma: Vma) -> bool:
    """Whether a mapping belongs to just one anon_vma, so to no relative by fork."""
    return anon_vma_chain(state, vma).size == 1


def _link(machine: Machine, vma: Vma, anon_vma: int) -> None:
    row, order = machine.take("avc.vma"), next_order(machine)
    machine.write("avc.vma", row, vma.row)
    machine.write("avc.anon_vma", row, anon_vma)
    machine.write("avc.age", row, order)
    machine.write("avc.order", row, order)


def root_anon_vma(state: State, anon_vma: int) -> int:
    """The oldest anon_vma of a family."""
    parent = int(state["anon_vma.parent"][anon_vma])
    return anon_vma if parent == anon_vma else root_anon_vma(state, parent)


def _own(machine: Machine, vma: Vma, anon_vma: int) -> None:
    machine.write("vma.anon_vma", vma.row, anon_vma)
    machine.add("anon_vma.active", anon_vma, 1)


def _new_anon_vma(machine: Machine, parent: int = 0) -> int:
    """A new anon_vma, which is its own parent when it is given none."""
    anon_vma = int(machine["anon_vma.used"][0]) + 1
    machine.write("anon_vma.used", 0, anon_vma)
    machine.write("anon_vma.parent", anon_vma, parent or anon_vma)
    machine.add("anon_vma.children", parent or anon_vma, 1)
    return anon_vma


def unlink_anon_vmas(machine: Machine, vma: Vma) -> None:
    """Take a mapping out of every anon_vma."""
    links = anon_vma_chain(machine, vma)
    if links.size:
        left, rows = machine["avc.anon_vma"][links], as_rows(links)
        for column in ("vma", "anon_vma", "age", "order"):
            machine.write(f"avc.{column}", rows, 0)
        used = machine["avc.anon_vma"]
        used = used[used.nonzero()[0]]
        empty = left[~(left[:, None] == used).any(axis=1)]
        for parent in machine["anon_vma.parent"][empty].tolist():
            machine.add("anon_vma.children", parent, -1)
    if vma.anon_vma:
        machine.add("anon_vma.active", vma.anon_vma, -1)
        machine.write("vma.anon_vma", vma.row, 0)


def anon_vma_clone(machine: Machine, to: Vma, source: Vma) -> None:
    """Let ``to`` belong to all that ``source`` belongs to, with the same anon_vma of its own."""
    for anon_vma in machine["avc.anon_vma"][anon_vma_chain(machine, source)].tolist():
        _link(machine, to, anon_vma)
    if source.anon_vma:
        _own(machine, to, source.anon_vma)


def anon_vma_fork(machine: Machine, to: Vma, source: Vma) -> None:
    """Let a child's mapping belong to all that its parent's does, and to one of its own.

    An anon_vma that no mapping owns any more, and that has fewer than two children, serves again.
    """
    if not source.anon_vma:
        return
    own = 0
    for anon_vma in machine["avc.anon_vma"][anon_vma_chain(machine, source)].tolist():
        _link(machine, to, anon_vma)
        idle = (
            machine["anon_vma.children"][anon_vma] < 2 and not machine["anon_vma.active"][anon_vma]
        )
        own = own or (anon_vma if idle else 0)
    if not own:
        own = _new_anon_vma(machine, source.anon_vma)
        _link(machine, to, own)
    _own(machine, to, own)


def anon_vma_prepare(machine: Machine, vma: Vma) -> Vma:
    """Give a mapping an anon_vma before its first own page: a neighbour's if that may be shared.

    Two neighbours may share one when only their access permissions differ, so that they can merge
    again later (``find_mergeable_anon_vma``: the next one is asked first).
    """
    vma = vma_at(machine, vma.row)
    if vma.anon_vma:
        return vma
    above, below = find_vma(machine, vma.mm, vma.end), find_vma_prev(machine, vma.mm, vma.start)[1]
    shared = 0
    for neighbour, low, high in ((above, vma, above), (below, below, vma)):
        if (
            not shared
            and low
            and high
            and neighbour
            and _may_share_anon_vma(low, high)
            and neighbour.anon_vma
            and is_singular(machine, neighbour)
        ):
            shared = neighbour.anon_vma
    if not shared:
        shared = _new_anon_vma(machine)
    _link(machine, vma, shared)
    _own(machine, vma, shared)
    return vma_at(machine, vma.row)


def _may_share_anon_vma(low: Vma, high: Vma) -> bool:
    return (
        low.end == high.start
        and low.file == high.file
        and not (low.flags ^ high.flags) & ~(VM_ACCESS_FLAGS | VM_SOFTDIRTY)
        and high.pgoff == low.pgoff_of(high.start)
    )
