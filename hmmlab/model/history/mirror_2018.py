"""Mirrors of 4.20 to 5.4: they are told at the start of a change, and may refuse it.

At the end it is too late: the CPU's page table has changed, and the device goes on reading and
writing the old frames; what it writes now is lost, and which pages it has dirtied nobody asks any
more. Since 4.20 the callbacks run at the start, so when the table changes the device has stopped.

From 5.2 on changes are counted. A range that a change touches is not valid until the last running
change has ended; then *every* range is valid again, also the one that has changed. Whoever looks
before and after sees "valid" both times.

Source: mm/hmm.c of 4.20, 5.2, 5.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hmmlab.model.history.era import EAGAIN, Era
from hmmlab.model.history.ranges import invalidate_ranges, ranges_of
from hmmlab.model.history.struct_hmm import Hmm, HmmMirror, HmmUpdateType
from hmmlab.model.machine import Routine, kernel
from hmmlab.model.mmu_notifier import MmuNotifierRange

__all__ = ["HmmUpdate"]


@dataclass(frozen=True, slots=True)
class HmmUpdate:
    """What a mirror is told from 4.20 to 5.3 (``struct hmm_update``).

    Attributes
    ----------
    start, end
        Pages ``start`` to ``end - 1``.
    event
        Why; there is still only one value.
    blockable
        Whether the callback may sleep.
    """

    start: int
    end: int
    event: HmmUpdateType
    blockable: bool


class Hmm420(Hmm, eras=(Era.V4_20,)):
    """4.20 to 5.1: mark the ranges and tell the mirrors at the start, mark again at the end."""

    @kernel("mm/hmm.c, 4.20", "hmm_invalidate_range_start")
    def invalidate_range_start(self, range: MmuNotifierRange) -> Routine[int]:
        """A change begins: mark what it touches, and tell every mirror. Returns 0 or -EAGAIN."""
        invalidate_ranges(self.machine, self.hmm(range.mm), range, wipe=True)
        return (yield from self.tell_mirrors(range, "before the change"))

    @kernel("mm/hmm.c, 4.20", "hmm_invalidate_range_end")
    def invalidate_range_end(self, range: MmuNotifierRange) -> Routine[None]:
        """The change is over: mark who has looked meanwhile, and tell no mirror."""
        invalidate_ranges(self.machine, self.hmm(range.mm), range, wipe=True)
        yield self.machine.step(
            "The change of {range} is over; no mirror is told.",
            range.mm,
            int(range.start[0]),
            int(range.end[-1]),
        )

    def call(self, mirror: HmmMirror, range: MmuNotifierRange) -> Any:
        """The mirror's callback, with a ``struct hmm_update``."""
        assert mirror.ops is not None
        invalidate = HmmUpdateType.HMM_UPDATE_INVALIDATE
        update = HmmUpdate(int(range.start[0]), int(range.end[-1]), invalidate, range.blockable)
        return mirror.ops.sync_cpu_device_pagetables(mirror, update)

    def refusal(self, range: MmuNotifierRange, answer: Any) -> int:
        """-EAGAIN counts where the change may not sleep; anything else is ignored."""
        return -EAGAIN if answer == -EAGAIN and not range.blockable else 0


class Hmm52(Hmm420, eras=(Era.V5_2,)):
    """5.2: a count of running changes decides when ranges are valid again."""

    @kernel("mm/hmm.c, 5.2", "hmm_invalidate_range_start")
    def invalidate_range_start(self, range: MmuNotifierRange) -> Routine[int]:
        """A change begins: count it, mark what it touches, and tell every mirror.

        Returns 0; -EAGAIN where the change may not sleep, and the list of mirrors is being changed,
        or, since 5.3, a mirror would have to sleep. After that nobody calls the end, and until 5.2
        the count stays one too high.
        """
        machine, hmm = self.machine, self.hmm(range.mm)
        machine.add("hmm.notifiers", hmm, 1)
        invalidate_ranges(machine, hmm, range, wipe=False)
        if not range.blockable and machine.holders(int(machine["hmm.mirrors_lock"][hmm]))[0]:
            answer = -EAGAIN
        else:
            answer = self.passed_on((yield from self.tell_mirrors(range, "before the change")))
        if answer:
            self.refused(hmm)
        return answer

    @kernel("mm/hmm.c, 5.2", "hmm_invalidate_range_end")
    def invalidate_range_end(self, range: MmuNotifierRange) -> Routine[None]:
        """The change is over: when it was the last that ran, every range is valid again."""
        hmm = self.hmm(range.mm)
        self.decrement(hmm)
        yield self.machine.step(
            "The change of {range} is over; "
            f"{int(self.machine['hmm.notifiers'][hmm])} others still run.",
            range.mm,
            int(range.start[0]),
            int(range.end[-1]),
        )

    def passed_on(self, answer: int) -> int:
        """What becomes of a mirror's refusal: it is lost, and the change happens all the same.

        The kernel keeps it in a second variable of the same name.
        """
        return 0

    def refused(self, hmm: int) -> None:
        """The change is refused: the count is left as it is."""

    def decrement(self, hmm: int) -> None:
        """One change less; at none, all ranges are valid, whatever has happened to them."""
        machine = self.machine
        machine.add("hmm.notifiers", hmm, -1)
        rows = ranges_of(machine, hmm)
        if not machine["hmm.notifiers"][hmm] and rows.size:
            machine.write("hmm_range.valid", rows, 1)


class Hmm53(Hmm52, eras=(Era.V5_3,)):
    """5.3: a refusal is passed on and counted back ("Fix error flows", June 2019)."""

    def passed_on(self, answer: int) -> int:
        """What becomes of a mirror's refusal."""
        return answer

    def refused(self, hmm: int) -> None:
        """The change does not happen, so it is no longer counted."""
        self.decrement(hmm)


class Hmm54(Hmm53, eras=(Era.V5_4,)):
    """5.4: the callback gets the notifier's own range."""

    def call(self, mirror: HmmMirror, range: MmuNotifierRange) -> Any:
        """The mirror's callback, with the ``struct mmu_notifier_range``."""
        assert mirror.ops is not None
        return mirror.ops.sync_cpu_device_pagetables(mirror, range)
