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
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mm_types import VM_READ, mm_root, vma_at
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange, mmu_notifier_register
from hmmlab.model.page_table import read_range
from hmmlab.model.state import State

__all__ = [
    "CHANGE_PTE_SITES",
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

MMU_NOTIFIER_RANGE_BLOCKABLE = 1 << 0
#: Only in the ninth patch, which was never merged.
MMU_NOTIFIER_USE_CHANGE_PTE = 1 << 1

#: Functions that set a word with ``set_pte_at_notify`` where a listener may rely on it: a copy on
#: write, and the two halves of merging equal pages (KSM). The fourth, uprobes, is left out.
CHANGE_PTE_SITES = ("wp_page_copy", "write_protect_page", "replace_page")


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
    """A range as most callers begin it: whoever is told may sleep."""
    return MmuNotifierRange2019(event, flags | MMU_NOTIFIER_RANGE_BLOCKABLE, vma, mm, start, end)


def mmu_notifier_range_blockable(range: MmuNotifierRange2019) -> bool:
    """Whether a callback may sleep; only the reaper of a process out of memory forbids it."""
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

    @kernel("mm/mmu_notifier.c, 5.2", "mmu_notifier_invalidate_range_start")
    def invalidate_range_start(self, range: MmuNotifierRange) -> Routine[int]:
        answer = yield from _call(self.ops.invalidate_range_start(self._in_2019(range)))
        return -EAGAIN if answer == -EAGAIN and not range.blockable else 0

    @kernel("mm/mmu_notifier.c, 5.2", "mmu_notifier_invalidate_range_end")
    def invalidate_range_end(self, range: MmuNotifierRange) -> Routine[None]:
        if _raised_by(self.machine) in CHANGE_PTE_SITES and hasattr(self.ops, "change_pte"):
            # The word was set, and this callback made, before the end.
            start, end = int(range.start[0]), int(range.end[-1])
            words = read_range(self.machine, mm_root(self.machine, range.mm), start, end)
            yield from _call(self.ops.change_pte(range.mm, start, int(words[0])))
        yield from _call(self.ops.invalidate_range_end(self._in_2019(range)))

    def release(self, mm: int) -> Routine[None]:
        """The address space ends, which is no event but a callback of its own."""
        if hasattr(self.ops, "release"):
            yield from _call(self.ops.release(mm))

    def _in_2019(self, range: MmuNotifierRange) -> MmuNotifierRange2019:
        later = range.event > Event.SOFT_DIRTY
        event = MmuNotifierEvent.MMU_NOTIFY_CLEAR if later else MmuNotifierEvent(range.event)
        marked = self.marks and _raised_by(self.machine) in CHANGE_PTE_SITES
        flags = MMU_NOTIFIER_USE_CHANGE_PTE if marked else 0
        flags |= MMU_NOTIFIER_RANGE_BLOCKABLE if range.blockable else 0
        start, end = int(range.start[0]), int(range.end[-1])
        return MmuNotifierRange2019(event, flags, range.vma, range.mm, start, end)


def _raised_by(machine: Machine) -> str:
    """The kernel function that raised the change of which a notifier is being told."""
    outwards = machine.actor.stack[::-1]
    raising = (name for name in outwards if "mmu_notifier_invalidate_range" not in name)
    return next(raising, "")


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
