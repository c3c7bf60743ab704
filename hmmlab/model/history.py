"""The interfaces of earlier years, over the same machine: named variants, never mixed into it.

Here: address-space mirroring as proposed in April 2017 ("mm/hmm/mirror: mirror process address
space on device with HMM helpers", v2). One ``struct hmm`` an address space holds a sequence number
and a list of mirrors, and listens as a classic MMU notifier. A start only counts; the mirrors'
callbacks run at the end, after the page table has changed. The number is counted and never read:
it could not tell a reader whether to look again. All of that is reproduced, none of it repaired.

Functions answer as theirs did: 0 or a negative errno.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from typing import Any, Protocol

import numpy as np

from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import mm_lock
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange, mmu_notifier_register
from hmmlab.model.state import State

__all__ = [
    "HmmMirror",
    "HmmMirrorOps",
    "HmmUpdateType",
    "hmm_mirror_register",
    "hmm_mirror_unregister",
    "hmm_sequence",
    "mmu_notifier_invalidate_page",
]

_EINVAL, _ENOMEM = 22, 12

Machine.declare("hmm.mm", np.int32, "2017: address space of a struct hmm; 0 is a free row")
Machine.declare("hmm.sequence", np.int64, "2017: updates of the CPU page table so far")
Machine.declare("hmm.mirrors_lock", np.int64, "2017: number of the mirrors_sem")
Machine.declare("hmm_mirror.hmm", np.int32, "2017: the struct hmm of a registered mirror")
Machine.declare("hmm_mirror.order", np.int64, "2017: when it was registered; the newest is first")


class HmmUpdateType(enum.IntEnum):
    """Why the device's page table must change: one value, which says nothing."""

    HMM_UPDATE_INVALIDATE = 0


class HmmMirrorOps(Protocol):
    """What a driver of 2017 provides (``struct hmm_mirror_ops``)."""

    def sync_cpu_device_pagetables(
        self, mirror: HmmMirror, update: HmmUpdateType, start: int, end: int
    ) -> Any:
        """Pages ``start`` to ``end - 1`` have changed. A plain function or a generator of steps."""


class HmmMirror:
    """One device's mirror of one address space (``struct hmm_mirror``).

    Attributes
    ----------
    ops
        The driver's callback.
    row
        Row of its ``hmm_mirror.*`` columns while it is registered, else 0.
    """

    def __init__(self, ops: HmmMirrorOps | None) -> None:
        self.ops = ops
        self.row = 0


class _Hmm:
    """The classic notifier that belongs to a struct hmm (``hmm_mmu_notifier_ops``)."""

    def __init__(self, machine: Machine, row: int) -> None:
        self.machine, self.row = machine, row

    @kernel("mm/hmm.c, 2017", "hmm_invalidate_range_start")
    def invalidate_range_start(self, range: MmuNotifierRange) -> Routine[None]:
        """A change begins: count it, and tell no mirror."""
        yield from self._count(
            range, "hmm counts one more update: {range}. It tells no mirror yet."
        )

    @kernel("mm/hmm.c, 2017", "hmm_invalidate_range_end")
    def invalidate_range_end(self, range: MmuNotifierRange) -> Routine[None]:
        """The change is over: tell every mirror."""
        yield from self._invalidate_range(range)

    @kernel("mm/hmm.c, 2017", "hmm_invalidate_page")
    def invalidate_page(self, range: MmuNotifierRange) -> Routine[None]:
        """One page has changed: count it and tell every mirror at once."""
        yield from self._count(range, "hmm counts one more update: {range}, changed already.")
        yield from self._invalidate_range(range)

    def _count(self, range: MmuNotifierRange, text: str) -> Routine[None]:
        self.machine.add("hmm.sequence", self.row, 1)
        yield self.machine.step(text, range.mm, int(range.start[0]), int(range.end[-1]))

    def _invalidate_range(self, range: MmuNotifierRange) -> Routine[None]:
        machine = self.machine
        lock = int(machine["hmm.mirrors_lock"][self.row])
        yield from machine.down_read(lock)
        rows = np.flatnonzero(machine["hmm_mirror.hmm"] == self.row)
        newest_first = rows[np.argsort(-machine["hmm_mirror.order"][rows])]
        start, end = int(range.start[0]), int(range.end[-1])
        for row in newest_first.tolist():
            mirror: HmmMirror = machine.objects["hmm_mirror"][row]
            assert mirror.ops is not None
            answer = mirror.ops.sync_cpu_device_pagetables(
                mirror, HmmUpdateType.HMM_UPDATE_INVALIDATE, start, end
            )
            if isinstance(answer, Generator):
                yield from answer
            yield machine.step(
                "sync_cpu_device_pagetables: a mirror hears of {range}, after the change.",
                range.mm,
                start,
                end,
            )
        machine.up_read(lock)


def _hmm_of(state: State, mm: int) -> int:
    rows = np.flatnonzero(state["hmm.mm"] == mm)
    return int(rows[0]) if rows.size else 0


def hmm_sequence(state: State, mm: int) -> int:
    """The sequence number of an address space: 0 at first, and where there is no struct hmm."""
    return int(state["hmm.sequence"][_hmm_of(state, mm)])


@kernel("mm/hmm.c, 2017")
def hmm_register(machine: Machine, mm: int) -> Routine[int]:
    """Row of the struct hmm of an address space, which is made when there is none."""
    hmm = _hmm_of(machine, mm)
    if hmm:
        return hmm
    hmm = machine.take("hmm.mm")
    listener = _Hmm(machine, hmm)
    machine.write("hmm.mm", hmm, mm)
    machine.write("hmm.mirrors_lock", hmm, machine.new_lock("the mirrors_sem"))
    machine.objects.setdefault("hmm", {})[hmm] = listener
    yield from mmu_notifier_register(machine, mm, listener)
    return hmm


@kernel("mm/hmm.c, 2017")
def hmm_mirror_register(machine: Machine, mirror: HmmMirror, mm: int) -> Routine[int]:
    """Let a mirror hear of an address space. Returns 0, or -EINVAL where something is missing."""
    if not mm or mirror.ops is None:
        return -_EINVAL
    lock = mm_lock(machine, mm)
    yield from machine.down_write(lock)
    hmm = yield from hmm_register(machine, mm)
    machine.up_write(lock)
    if not hmm:
        return -_ENOMEM
    mirrors = int(machine["hmm.mirrors_lock"][hmm])
    yield from machine.down_write(mirrors)
    mirror.row = machine.take("hmm_mirror.hmm")
    machine.write("hmm_mirror.hmm", mirror.row, hmm)
    machine.write("hmm_mirror.order", mirror.row, int(machine["hmm_mirror.order"].max()) + 1)
    machine.objects.setdefault("hmm_mirror", {})[mirror.row] = mirror
    machine.up_write(mirrors)
    yield machine.step("The mirror is the first of the list now.", mm)
    return 0


@kernel("mm/hmm.c, 2017")
def hmm_mirror_unregister(machine: Machine, mirror: HmmMirror) -> Routine[None]:
    """Take a mirror off the list; the struct hmm stays as long as the address space."""
    hmm = int(machine["hmm_mirror.hmm"][mirror.row])
    mirrors = int(machine["hmm.mirrors_lock"][hmm])
    yield from machine.down_write(mirrors)
    machine.write("hmm_mirror.hmm", mirror.row, 0)
    machine.write("hmm_mirror.order", mirror.row, 0)
    machine.up_write(mirrors)
    mirror.row = 0
    yield machine.step("The mirror hears no more.", int(machine["hmm.mm"][hmm]))


@kernel("mm/mmu_notifier.c, 2017")
def mmu_notifier_invalidate_page(machine: Machine, mm: int, vpn: int) -> Routine[None]:
    """Tell every struct hmm that one page has changed, without a start and an end.

    Kernels up to 4.12 called it where one word changed under the page-table lock.
    """
    hmm = _hmm_of(machine, mm)
    if hmm:
        range = MmuNotifierRange.one(mm, Event.CLEAR, vpn, vpn + 1)
        yield from machine.objects["hmm"][hmm].invalidate_page(range)
