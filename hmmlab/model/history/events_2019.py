"""Why a range changes: the notifier events of February 2019, and change_pte.

"mmu notifier provide context informations", v5: until then a listener heard that a range changes
and had to assume the worst, that it is unmapped. The series gives a range an event, a mapping and
flags. Eight of its nine patches came with 5.2. The ninth never did: it marks the changes of which
``change_pte`` tells everything, so that a listener that has this callback need not forget anything
at the start. Without the mark the start has thrown the entry away before ``change_pte`` could keep
it, and so nobody ever gained by that callback.

A listener of 2019 is registered beside those of 6.1, and hears of the same changes in the words of
its time: migration was a CLEAR then, and the end of an address space was no event.

Source: include/linux/mmu_notifier.h, mm/mmu_notifier.c of 5.2, and patch 9/9.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from hmmlab.model.history.era import EAGAIN
from hmmlab.model.history.sites import CHANGE_PTE_SITES, raised_by
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_READ, mm_root, vma_at
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange, mmu_notifier_register
from hmmlab.model.page_table import read_range
from hmmlab.model.state import State

__all__ = [
    "MMU_NOTIFIER_RANGE_BLOCKABLE",
    "MMU_NOTIFIER_USE_CHANGE_PTE",
    "MmuNotifierEvent",
    "MmuNotifierOps",
    "MmuNotifierRange2019",
    "mmu_notifier_range_blockable",
    "mmu_notifier_range_init",
    "mmu_notifier_range_update_to_read_only",
    "mmu_notifier_range_use_change_pte",
    "mmu_notifier_register_2019",
]

#: Set when the start is told; only the reaper of a process out of memory does not.
MMU_NOTIFIER_RANGE_BLOCKABLE = 1 << 0
#: Only in the ninth patch, which was never merged.
MMU_NOTIFIER_USE_CHANGE_PTE = 1 << 1


class MmuNotifierEvent(enum.IntEnum):
    """The five events of the series (``enum mmu_notifier_event`` of 5.2)."""

    MMU_NOTIFY_UNMAP = 0
    MMU_NOTIFY_CLEAR = 1
    MMU_NOTIFY_PROTECTION_VMA = 2
    MMU_NOTIFY_PROTECTION_PAGE = 3
    MMU_NOTIFY_SOFT_DIRTY = 4


@dataclass(frozen=True, slots=True)
class MmuNotifierRange2019:
    """A range that changes (``struct mmu_notifier_range`` of the series).

    Attributes
    ----------
    event
        Why.
    flags
        MMU_NOTIFIER_* bits.
    vma
        Row of the mapping, 0 for none.
    mm
        Address space.
    start, end
        Pages ``start`` to ``end - 1``.
    """

    event: MmuNotifierEvent
    flags: int
    vma: int
    mm: int
    start: int
    end: int


def mmu_notifier_range_init(
    event: MmuNotifierEvent, flags: int, vma: int, mm: int, start: int, end: int
) -> MmuNotifierRange2019:
    """A range before it is told. Whether a callback may sleep is not said here but by who tells."""
    return MmuNotifierRange2019(event, flags, vma, mm, start, end)


def mmu_notifier_range_blockable(range: MmuNotifierRange2019) -> bool:
    """Whether a callback may sleep."""
    return bool(range.flags & MMU_NOTIFIER_RANGE_BLOCKABLE)


def mmu_notifier_range_update_to_read_only(state: State, range: MmuNotifierRange2019) -> bool:
    """Whether all that happens is that the pages become read-only.

    The mapping has its new flags already, so whether it can be read decides; whether it could be
    written before is not asked.
    """
    if not range.vma or range.event is not MmuNotifierEvent.MMU_NOTIFY_PROTECTION_VMA:
        return False
    return bool(vma_at(state, range.vma).flags & VM_READ)


def mmu_notifier_range_use_change_pte(range: MmuNotifierRange2019) -> bool:
    """Whether ``change_pte`` will tell all about this change, so that the start may be ignored."""
    return bool(range.flags & MMU_NOTIFIER_USE_CHANGE_PTE)


# --- listening ------------------------------------------------------------------------------------


class MmuNotifierOps(Protocol):
    """A listener of 2019 (``struct mmu_notifier_ops``); functions or generators of steps.

    ``change_pte(mm, address, pte)``, with a page number and its new word, and ``release(mm)`` may
    be there too.
    """

    def invalidate_range_start(self, range: MmuNotifierRange2019) -> Any:
        """A change begins. -EAGAIN where it would have to sleep and may not; else 0 or None."""

    def invalidate_range_end(self, range: MmuNotifierRange2019) -> Any:
        """It is over."""


class _Listener:
    """Tells a listener of 2019 what a classic notifier of 6.1 hears."""

    unpaired = True

    def __init__(self, machine: Machine, ops: MmuNotifierOps, marks: bool) -> None:
        self.machine, self.ops, self.marks = machine, ops, marks
        self.before: dict[int, int] = {}  # words of pages of which change_pte may tell

    @kernel("mm/mmu_notifier.c, 5.2", "mmu_notifier_invalidate_range_start")
    def invalidate_range_start(self, range: MmuNotifierRange) -> Routine[int]:
        if raised_by(self.machine) in CHANGE_PTE_SITES:
            self.before[int(range.start[0])] = self._word(range)
        answer = yield from _call(self.ops.invalidate_range_start(self._in_2019(range)))
        return -EAGAIN if answer == -EAGAIN and not range.blockable else 0

    @kernel("mm/mmu_notifier.c, 5.2", "mmu_notifier_invalidate_range_end")
    def invalidate_range_end(self, range: MmuNotifierRange) -> Routine[None]:
        if raised_by(self.machine) in CHANGE_PTE_SITES:
            # The word was set, and this callback made, before the end; if it was set at all.
            page, word = int(range.start[0]), self._word(range)
            if self.before.pop(page, word) != word and hasattr(self.ops, "change_pte"):
                yield from _call(self.ops.change_pte(range.mm, page, word))
        yield from _call(self.ops.invalidate_range_end(self._in_2019(range)))

    def release(self, mm: int) -> Routine[None]:
        """The address space ends, which is no event but a callback of its own."""
        if hasattr(self.ops, "release"):
            yield from _call(self.ops.release(mm))

    def _word(self, range: MmuNotifierRange) -> int:
        page = int(range.start[0])
        return int(read_range(self.machine, mm_root(self.machine, range.mm), page, page + 1)[0])

    def _in_2019(self, range: MmuNotifierRange) -> MmuNotifierRange2019:
        later = range.event > Event.SOFT_DIRTY
        event = MmuNotifierEvent.MMU_NOTIFY_CLEAR if later else MmuNotifierEvent(range.event)
        marked = self.marks and raised_by(self.machine) in CHANGE_PTE_SITES
        flags = MMU_NOTIFIER_USE_CHANGE_PTE if marked else 0
        flags |= MMU_NOTIFIER_RANGE_BLOCKABLE if range.blockable else 0
        start, end = int(range.start[0]), int(range.end[-1])
        # Of a migration to a device the mapping is said since 5.9 only.
        vma = 0 if range.event is Event.MIGRATE else range.vma
        return mmu_notifier_range_init(event, flags, vma, range.mm, start, end)


def _call(answer: Any) -> Routine[Any]:
    return (yield from answer) if isinstance(answer, Generator) else answer


@kernel("mm/mmu_notifier.c, 5.2", "mmu_notifier_register")
def mmu_notifier_register_2019(
    machine: Machine, mm: int, ops: MmuNotifierOps, *, use_change_pte: bool = False
) -> Routine[int]:
    """Let a listener of 2019 hear of an address space. Returns the number of its notifier.

    With ``use_change_pte`` the kernel is the one that was proposed, with the ninth patch.
    """
    listener = _Listener(machine, ops, use_change_pte)
    return (yield from mmu_notifier_register(machine, mm, listener))
