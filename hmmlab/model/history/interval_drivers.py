"""Small drivers of 5.5 and 5.7: an interval subscription, and still a driver's own encoding."""

from __future__ import annotations

import numpy as np

from hmmlab.model.history import range_2020
from hmmlab.model.history.drivers import Driver61, in_6_1
from hmmlab.model.history.era import Era
from hmmlab.model.history.mirror_drivers import in_2018
from hmmlab.model.history.walk_2018 import HmmRange as HmmRange2018
from hmmlab.model.hmm import HmmRange
from hmmlab.model.machine import KernelError, Routine
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange

__all__ = ["Driver55", "Driver57"]


class Driver55(Driver61):
    """5.5 and 5.6: no mirror any more; the fault has flags, and answers how many pages."""

    era = Era.V5_5

    def event(self, range: MmuNotifierRange) -> Event:
        """Why the range changes: a migration was a CLEAR until 5.8."""
        return Event.CLEAR if range.event > Event.RELEASE else range.event

    def look_up(self, asked: HmmRange2018) -> Routine[int]:
        """Look as this kernel does."""
        return (yield from range_2020.hmm_range_fault_5_5(self.machine, asked, self.mm, 0))

    def fault(self, range: HmmRange) -> Routine[int]:
        """Fault as this kernel has it."""
        asked = in_2018(range)
        asked.notifier, asked.notifier_seq = range.notifier, range.notifier_seq
        asked.dev_private_owner = self.device
        answer = yield from self.look_up(asked)
        if answer < 0:
            place = self.machine.names.place(range.mm, range.start, range.end)
            raise KernelError(-answer, f"{place}: the lookup was refused")
        writable = (asked.pfns & asked.write_bit) != 0
        range.hmm_pfns[:] = in_6_1(asked.device_entry_to_pfn(asked.pfns), np.asarray(writable))
        return answer


class Driver57(Driver55):
    """5.7: no flags; the answer is a count for the last time."""

    era = Era.V5_7

    def look_up(self, asked: HmmRange2018) -> Routine[int]:
        """Look as this kernel does."""
        return (yield from range_2020.hmm_range_fault_5_7(self.machine, asked, self.mm))
