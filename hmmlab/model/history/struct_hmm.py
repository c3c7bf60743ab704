"""struct hmm: what HMM keeps of an address space, 2017 to 2019, and what it does with a change.

One ``struct hmm`` an address space holds the list of its mirrors and listens as a classic MMU
notifier. Here is what it does with a change

- in the patch of April 2017 ("mm/hmm/mirror: mirror process address space on device with HMM
  helpers", v2): a start only counts; the mirrors' callbacks run at the end, after the page table
  has changed. Where a single page changes there is no start and no end but ``invalidate_page``,
  which does both at once. The number is counted and never read: it could not tell a reader to look
  again.
- as merged in 4.14: the same, and the ranges that somebody has looked up and not yet done with are
  marked as changed, at the end too.

:mod:`~hmmlab.model.history.mirror_2018` has the later kernels. All is reproduced, none of it
repaired.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from typing import Any, ClassVar, Protocol

import numpy as np

from hmmlab.model.history.era import Era
from hmmlab.model.history.ranges import invalidate_ranges, ranges_of
from hmmlab.model.history.sites import INVALIDATE_PAGE_SITES, raised_by
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.mmu_notifier import MmuNotifierRange
from hmmlab.model.state import State

__all__ = [
    "Hmm",
    "HmmMirror",
    "HmmMirrorOps",
    "HmmUpdateType",
    "free_hmm",
    "hmm_mm_destroy",
    "hmm_of",
    "hmm_put",
    "hmm_sequence",
    "mirrors_of",
    "unlist",
]

Machine.declare("hmm.era", np.int32, "2017: the kernel that a struct hmm is of; 0 is a free row")
Machine.declare("hmm.mm", np.int32, "2017: address space of which it is the struct hmm")
Machine.declare("hmm.notifier", np.int32, "2017: number of its classic notifier")
Machine.declare("hmm.sequence", np.int64, "2017: updates of the CPU page table so far")
Machine.declare("hmm.mirrors_lock", np.int64, "2017: number of the mirrors_sem")
Machine.declare("hmm.forgot_mm", np.int32, "4.17: 1 when hmm->mm was emptied by an unregister")
Machine.declare("hmm.notifiers", np.int32, "5.2: changes that have begun and not ended")
Machine.declare("hmm.dead", np.int32, "5.2: 1 when the address space is going away")
Machine.declare("hmm_mirror.hmm", np.int32, "2017: the struct hmm of a registered mirror")
Machine.declare("hmm_mirror.order", np.int64, "2017: when it was registered; the newest is first")


class HmmUpdateType(enum.IntEnum):
    """Why the device's page table must change: one value, which says nothing."""

    HMM_UPDATE_INVALIDATE = 0


class HmmMirrorOps(Protocol):
    """What a driver provides (``struct hmm_mirror_ops``).

    ``release(mirror)`` may be there too, since 4.17.
    """

    def sync_cpu_device_pagetables(self, mirror: HmmMirror, *update: Any) -> Any:
        """Pages have changed, or since 4.20 are about to; a function or a generator of steps.

        ``update`` is what its kernel passes:

        - until 4.19: the :class:`HmmUpdateType`, the first page and the page past the last;
        - 4.20 to 5.3: one :class:`~hmmlab.model.history.mirror_2018.HmmUpdate`; it returns 0, or
          -EAGAIN where it would have to sleep and may not;
        - 5.4: one :class:`~hmmlab.model.mmu_notifier.MmuNotifierRange`, with the same answers.
        """


class HmmMirror:
    """One device's mirror of one address space (``struct hmm_mirror``).

    Attributes
    ----------
    ops
        The driver's callbacks.
    hmm
        Row of the struct hmm that it was registered with; 0 before, and since 4.17 after it.
    row
        Row of its ``hmm_mirror.*`` columns while it is registered, else 0.
    """

    def __init__(self, ops: HmmMirrorOps | None) -> None:
        self.ops = ops
        self.hmm = self.row = 0


class Hmm:
    """The classic notifier that belongs to a struct hmm (``hmm_mmu_notifier_ops``), April 2017.

    Later kernels are subclasses. Attributes are the machine, the era, and ``row``: the row of the
    ``hmm.*`` columns.
    """

    of_era: ClassVar[dict[Era, type[Hmm]]] = {}
    #: Before 5.12 nobody's end was called after a refusal.
    unpaired = True

    def __init__(self, machine: Machine, era: Era, row: int) -> None:
        self.machine, self.era, self.row = machine, era, row

    def __init_subclass__(cls, *, eras: tuple[Era, ...]) -> None:
        super().__init_subclass__()
        Hmm.of_era.update(dict.fromkeys(eras, cls))

    def invalidate_range_start(self, range: MmuNotifierRange) -> Routine[int]:
        """A change begins: count it, and tell no mirror. Nobody hears of a single page yet."""
        if raised_by(self.machine) not in INVALIDATE_PAGE_SITES:
            yield from self._start(range)
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> Routine[None]:
        """The change is over: tell every mirror. Of a single page nobody was told before."""
        if raised_by(self.machine) in INVALIDATE_PAGE_SITES:
            yield from self.invalidate_page(range)
        else:
            yield from self._end(range)

    @kernel("mm/hmm.c, 2017", "hmm_invalidate_range_start")
    def _start(self, range: MmuNotifierRange) -> Routine[None]:
        yield from self._count(
            range, "hmm counts one more update: {range}. It tells no mirror yet."
        )

    @kernel("mm/hmm.c, 2017", "hmm_invalidate_range_end")
    def _end(self, range: MmuNotifierRange) -> Routine[None]:
        yield from self.tell_mirrors(range, "after the change")

    @kernel("mm/hmm.c, 2017", "hmm_invalidate_page")
    def invalidate_page(self, range: MmuNotifierRange) -> Routine[None]:
        """One page has changed: count it and tell every mirror at once."""
        yield from self._count(range, "hmm counts one more update: {range}, changed already.")
        yield from self.tell_mirrors(range, "after the change")

    def _count(self, range: MmuNotifierRange, text: str) -> Routine[None]:
        self.machine.add("hmm.sequence", self.hmm(range.mm), 1)
        yield self.machine.step(text, range.mm, int(range.start[0]), int(range.end[-1]))

    def hmm(self, mm: int) -> int:
        """Row of ``mm->hmm``: the callbacks ask for it until 5.2, and take it for their own.

        While two register at once, so that both have a notifier, one struct hmm hears all twice.

        Raises
        ------
        ValueError
            Where there is none, where the kernel stops with VM_BUG_ON(): until 4.19 a change can be
            told before it is published, and after it is taken away.
        """
        if self.era >= Era.V5_3:
            return self.row
        hmm = hmm_of(self.machine, mm)
        if not hmm:
            raise ValueError(f"address space {mm} has a notifier of HMM and no struct hmm: a BUG")
        return hmm

    def tell_mirrors(self, range: MmuNotifierRange, when: str) -> Routine[int]:
        """Call every mirror, the newest first. Returns 0, or what the first to refuse said."""
        machine, hmm = self.machine, self.hmm(range.mm)
        lock = int(machine["hmm.mirrors_lock"][hmm])
        yield from machine.down_read(lock)
        refused = 0
        start, end = int(range.start[0]), int(range.end[-1])
        for mirror in mirrors_of(machine, hmm):
            answer = self.call(mirror, range)
            if isinstance(answer, Generator):
                answer = yield from answer
            yield machine.step(
                f"sync_cpu_device_pagetables: a mirror hears of {{range}}, {when}.",
                range.mm,
                start,
                end,
            )
            refused = self.refusal(range, answer)
            if refused:
                break
        machine.up_read(lock)
        return refused

    def call(self, mirror: HmmMirror, range: MmuNotifierRange) -> Any:
        """The mirror's callback, with the arguments of this kernel."""
        assert mirror.ops is not None
        start, end = int(range.start[0]), int(range.end[-1])
        invalidate = HmmUpdateType.HMM_UPDATE_INVALIDATE
        return mirror.ops.sync_cpu_device_pagetables(mirror, invalidate, start, end)

    def refusal(self, range: MmuNotifierRange, answer: Any) -> int:
        """What a callback's answer means: nothing, before 4.20."""
        return 0

    @kernel("mm/hmm.c, 4.17", "hmm_release")
    def release(self, mm: int) -> Routine[None]:
        """The address space is about to be torn down: tell every mirror that wants to know.

        Until 4.16 nobody does. Until 5.2 one mirror after another is taken off the list and called
        without the mirrors_sem; since 5.3 all stay, and it is held for reading, so that none may
        unregister itself then. In 5.2 no range is valid any more and none can be registered;
        before, that is the end of the struct hmm. Since 5.3 there are no ranges at that time, for
        each keeps the address space alive.
        """
        machine = self.machine
        lock = int(machine["hmm.mirrors_lock"][self.row])
        if self.era is Era.V5_2:
            machine.write("hmm.dead", self.row, 1)
            machine.write("hmm_range.valid", ranges_of(machine, self.row), 0)
        if self.era >= Era.V5_3:
            yield from machine.down_read(lock)
            for mirror in mirrors_of(machine, self.row):
                yield from self._release(mirror, mm)
            machine.up_read(lock)
        elif self.era >= Era.V4_17:
            while mirrors := mirrors_of(machine, self.row):
                yield from machine.down_write(lock)
                unlist(machine, mirrors[0])
                machine.up_write(lock)
                yield from self._release(mirrors[0], mm)
        if self.era < Era.V5_2:
            hmm_mm_destroy(machine, mm)

    def _release(self, mirror: HmmMirror, mm: int) -> Routine[None]:
        release = getattr(mirror.ops, "release", None)
        answer = release(mirror) if release else None
        if isinstance(answer, Generator):
            yield from answer
        yield self.machine.step("release: a mirror hears that the address space goes away.", mm)


Hmm.of_era[Era.APRIL_2017] = Hmm


class Hmm414(Hmm, eras=(Era.V4_14, Era.V4_17)):
    """4.14 to 4.19: the end also marks the tracked ranges; there is no ``invalidate_page``."""

    def invalidate_range_start(self, range: MmuNotifierRange) -> Routine[int]:
        """A change begins: count it, and tell no mirror."""
        yield from self._start(range)
        return 0

    @kernel("mm/hmm.c, 4.14", "hmm_invalidate_range_end")
    def invalidate_range_end(self, range: MmuNotifierRange) -> Routine[None]:
        """The change is over: mark the ranges that it touches, then tell every mirror."""
        invalidate_ranges(self.machine, self.hmm(range.mm), range, wipe=True)
        yield from self.tell_mirrors(range, "after the change")


# --- finding and freeing --------------------------------------------------------------------------


def hmm_of(state: State, mm: int) -> int:
    """Row of the struct hmm of an address space (``mm->hmm``), 0 for none."""
    rows = np.flatnonzero(state["hmm.mm"] == mm) if mm else np.zeros(0, np.int64)
    return int(rows[0]) if rows.size else 0


def mirrors_of(machine: Machine, hmm: int) -> list[HmmMirror]:
    """The mirrors of a struct hmm, the newest first."""
    rows = np.flatnonzero(machine["hmm_mirror.hmm"] == hmm)
    newest_first = rows[np.argsort(-machine["hmm_mirror.order"][rows])]
    return [machine.objects["hmm_mirror"][row] for row in newest_first.tolist()]


def hmm_sequence(state: State, mm: int) -> int:
    """The sequence number of an address space: 0 at first, and where there is no struct hmm."""
    return int(state["hmm.sequence"][hmm_of(state, mm)])


def unlist(machine: Machine, mirror: HmmMirror) -> None:
    """Take a mirror off its list."""
    machine.write("hmm_mirror.hmm", mirror.row, 0)
    machine.write("hmm_mirror.order", mirror.row, 0)
    mirror.row = 0


def hmm_mm_destroy(machine: Machine, mm: int) -> None:
    """The address space is gone, and its struct hmm with it."""
    if hmm := hmm_of(machine, mm):
        machine.write("notifier.mm", int(machine["hmm.notifier"][hmm]), 0)
        free_hmm(machine, hmm)


def hmm_put(machine: Machine, hmm: int) -> None:
    """Let a struct hmm go that no mirror and no range holds any more; counted so in 5.2 and 5.3."""
    counted = machine["hmm.era"][hmm] in (Era.V5_2, Era.V5_3)
    if counted and not mirrors_of(machine, hmm) and not ranges_of(machine, hmm).size:
        machine.write("notifier.mm", int(machine["hmm.notifier"][hmm]), 0)
        free_hmm(machine, hmm)


def free_hmm(machine: Machine, hmm: int) -> None:
    """Free the row of a struct hmm."""
    for column in (
        "mm",
        "era",
        "notifier",
        "sequence",
        "mirrors_lock",
        "forgot_mm",
        "notifiers",
        "dead",
    ):
        machine.write(f"hmm.{column}", hmm, 0)
