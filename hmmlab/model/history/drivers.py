"""Small drivers that note what they call and what they are called, in the words of their kernel.

Each looks a range up as the documentation of its kernel tells it to. Here are what all have in
common, and the drivers of 6.1 and today; :mod:`~hmmlab.model.history.mirror_drivers` has the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hmmlab.model.driver import Driver
from hmmlab.model.entry import HMM_PFN_VALID, HMM_PFN_WRITE, Pfns, Words
from hmmlab.model.history import today
from hmmlab.model.history.calls import Calls
from hmmlab.model.history.era import EBUSY, EFAULT, Era
from hmmlab.model.hmm import HmmRange, hmm_range_fault
from hmmlab.model.machine import KernelError, Routine, kernel
from hmmlab.model.mm_types import mm_lock
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
)

__all__ = ["Driver61", "DriverToday", "EraDriver", "in_6_1"]


class EraDriver(Driver, Calls):
    """A driver that notes its calls."""

    era: Era
    #: The kernel function in which a driver is told that a change begins.
    told_in = "__mmu_notifier_invalidate_range_start"

    def __init__(self, *args: Any, **rest: Any) -> None:
        Driver.__init__(self, *args, **rest)
        Calls.__init__(self, self.machine, self.mm)

    def counter(self) -> str:
        """What this kernel counts of changes: a number, odd while one runs that hits somebody."""
        return f"invalidate_seq = {self.machine['mm.invalidate_seq'][self.mm]}"

    def map_answers(self, range: HmmRange) -> None:
        """Map what was answered; until 5.6 a lookup could succeed and leave a page out.

        Raises
        ------
        KernelError
            EFAULT where a page has no answer, or none that can be written as it was asked for.
        """
        missing = (range.hmm_pfns & np.uint64(HMM_PFN_VALID)) == 0
        if missing.any():
            self.note(f"(no answer for {int(missing.sum())} pages)")
            place = self.machine.names.place(range.mm, range.start, range.end)
            raise KernelError(EFAULT, f"{place}: some pages have no answer")
        super().map_answers(range)

    def looked(self, range: HmmRange) -> Routine[None]:
        """The answer is there, and the driver's lock not yet taken: others may run now."""
        yield from self._looked(range)

    @kernel("driver", "looked")
    def _looked(self, range: HmmRange) -> Routine[None]:
        yield self.machine.step(
            f"{self.name} has its answer for {{range}}, and not yet its lock.",
            range.mm,
            range.start,
            range.end,
        )


def in_6_1(pfns: Pfns, writable: np.ndarray) -> Words:
    """Answers as the words of 6.1, of frames that are -1 where there is none."""
    valid = pfns >= 0
    words = np.where(valid, pfns, 0).astype(np.uint64)
    words |= np.where(valid, np.uint64(HMM_PFN_VALID), np.uint64(0))
    return words | np.where(valid & writable, np.uint64(HMM_PFN_WRITE), np.uint64(0))


class Driver61(EraDriver):
    """6.1: an interval subscription, and sequence numbers."""

    era = Era.V6_1

    def open_file(self) -> Routine[Driver]:
        """Subscribe."""
        yield from super().open_file()
        self.note("mmu_interval_notifier_insert")
        return self

    def release_file(self) -> Routine[None]:
        """End the subscription."""
        yield from super().release_file()
        self.note("mmu_interval_notifier_remove")

    def event(self, range: MmuNotifierRange) -> Event:
        """Why the range changes, in the words of this kernel."""
        return range.event

    def invalidate(self, subscription: int, range: MmuNotifierRange, cur_seq: int) -> Any:
        """Forget the pages."""
        start, end = int(range.start[0]), int(range.end[-1])
        self.note(f"invalidate({self.event(range).name}, {self.pages(start, end)})")
        return super().invalidate(subscription, range, cur_seq)

    def fault(self, range: HmmRange) -> Routine[int]:
        """Fault as this kernel has it; returns its answer."""
        yield from hmm_range_fault(self.machine, range)
        return 0

    def look(self, range: HmmRange) -> Routine[None]:
        """Look until nothing has changed meanwhile."""
        machine, lock = self.machine, mm_lock(self.machine, self.mm)
        while True:
            range.notifier_seq = yield from mmu_interval_read_begin(machine, range.notifier)
            self.note("mmu_interval_read_begin", f"number {range.notifier_seq}")
            yield from machine.down_read(lock)
            try:
                answer = yield from self.fault(range)
                self.note("hmm_range_fault", answer)
            except KernelError as error:
                self.note("hmm_range_fault", -error.errno)
                if error.errno != EBUSY:
                    raise
                continue
            finally:
                machine.up_read(lock)
            yield from self.looked(range)
            yield from machine.down_write(self.lock)
            again = mmu_interval_read_retry(machine, range.notifier, range.notifier_seq)
            self.note("mmu_interval_read_retry", again)
            if not again:
                return
            machine.up_write(self.lock)


class DriverToday(Driver61):
    """Today: the words of an answer lie otherwise, and keep the marks of a DMA mapping."""

    era = Era.TODAY

    def event(self, range: MmuNotifierRange) -> Event:
        """Breaking exclusive access is a CLEAR."""
        return today.event_since_6_15(range)

    def fault(self, range: HmmRange) -> Routine[int]:
        """Fault as today's kernel has it; returns its answer."""
        yield from today.hmm_range_fault(self.machine, range)
        frames = today.hmm_pfn_to_pfn(range.hmm_pfns)
        range.hmm_pfns[:] = in_6_1(
            np.where((range.hmm_pfns & np.uint64(HMM_PFN_VALID)) != 0, frames, -1),
            (range.hmm_pfns & np.uint64(HMM_PFN_WRITE)) != 0,
        )
        return 0
