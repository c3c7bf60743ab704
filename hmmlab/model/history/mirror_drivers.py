"""Small drivers of the eras of hmm_mirror: April 2017, 4.14, 5.2, 5.4."""

from __future__ import annotations

from typing import Any

import numpy as np

from hmmlab.model.driver import Driver
from hmmlab.model.entry import HMM_PFN_REQ_WRITE, Words
from hmmlab.model.history import lookup_2017, range_2019
from hmmlab.model.history.drivers import EraDriver, in_6_1
from hmmlab.model.history.era import EAGAIN, EBUSY, EFAULT, Era
from hmmlab.model.history.mirror_2017 import hmm_mirror_register, hmm_mirror_unregister
from hmmlab.model.history.struct_hmm import HmmMirror, hmm_of
from hmmlab.model.history.walk_2018 import HmmRange as HmmRange2018
from hmmlab.model.hmm import HmmRange, hmm_range_fault
from hmmlab.model.machine import KernelError, Routine, kernel
from hmmlab.model.mm_types import Vma, mm_lock, vma_lookup
from hmmlab.model.mmu_notifier import MmuNotifierRange

__all__ = ["Driver52", "Driver54", "Driver414", "Driver2017"]


class _MirrorDriver(EraDriver):
    """The eras of hmm_mirror. It stays subscribed as 6.1 has it too, and ignores what that says."""

    told_in = "hmm_invalidate_range_start"

    def open_file(self) -> Routine[Driver]:
        """Register a mirror."""
        yield from super().open_file()
        self.mirror = HmmMirror(_Callbacks(self))
        answer = yield from hmm_mirror_register(self.machine, self.mirror, self.mm, self.era)
        self.note("hmm_mirror_register", answer)
        return self

    def release_file(self) -> Routine[None]:
        """Take the mirror off the list."""
        yield from hmm_mirror_unregister(self.machine, self.mirror)
        self.note("hmm_mirror_unregister")
        yield from super().release_file()

    def counter(self) -> str:
        """Changes so far until 4.19, changes that run since 5.2."""
        which = "sequence" if self.era < Era.V4_20 else "notifiers"
        value = self.machine[f"hmm.{which}"][hmm_of(self.machine, self.mm)]
        return f"hmm->{which} = {value}"

    def invalidate(self, subscription: int, range: MmuNotifierRange, cur_seq: int) -> bool:
        """What 6.1 tells: not listened to."""
        return True

    def refuse(self, range: HmmRange, answer: int) -> KernelError:
        """The error of an operation whose lookup was refused."""
        place = self.machine.names.place(range.mm, range.start, range.end)
        return KernelError(-answer, f"{place}: the lookup was refused")


class _Callbacks:
    """``struct hmm_mirror_ops`` of a driver."""

    def __init__(self, driver: _MirrorDriver) -> None:
        self.driver, self.machine = driver, driver.machine

    @kernel("driver")
    def sync_cpu_device_pagetables(self, mirror: HmmMirror, *update: Any) -> Routine[int]:
        """Forget the pages."""
        driver = self.driver
        if len(update) == 3:
            start, end = update[1:]
        elif isinstance(update[0], MmuNotifierRange):
            start, end = int(update[0].start[0]), int(update[0].end[-1])
        else:
            start, end = update[0].start, update[0].end
        yield from self.machine.down_write(driver.lock)
        dropped = driver.forget(start, end)
        self.machine.up_write(driver.lock)
        driver.note(f"sync_cpu_device_pagetables({driver.pages(start, end)})")
        yield self.machine.step(
            f"{driver.name} forgets {{range}}: {dropped} entries.", driver.mm, start, end
        )
        return 0


class Driver2017(_MirrorDriver):
    """April 2017: the patch has no lookup, so the driver walks the page table on its own.

    Nothing tells it whether to use what it has seen.
    """

    era = Era.APRIL_2017

    def look(self, range: HmmRange) -> Routine[None]:
        """Look, and take the lock."""
        machine = self.machine
        range.notifier_seq = int(machine["interval.seq"][range.notifier])
        lock = mm_lock(machine, self.mm)
        yield from machine.down_read(lock)
        try:
            yield from hmm_range_fault(machine, range)
            self.note("(walks the page table)")
        finally:
            machine.up_read(lock)
        yield from self.looked(range)
        yield from machine.down_write(self.lock)


class Driver414(_MirrorDriver):
    """4.14: ``hmm_vma_range_done`` says, under the driver's lock, whether the answer holds.

    A lookup is of one mapping, so a range over several is looked up in parts.
    """

    era = Era.V4_14

    def look(self, range: HmmRange) -> Routine[None]:
        """Look until the answer holds; the mmap_lock is held all the while."""
        machine, lock = self.machine, mm_lock(self.machine, self.mm)
        while True:
            yield from machine.down_read(lock)
            pfns = np.zeros(range.end - range.start, np.uint64)
            parts: list[tuple[Vma, lookup_2017.HmmRange]] = []
            answer = yield from self._look_parts(range, pfns, parts)
            if answer == -EBUSY:  # the lock is gone
                self._done(parts)
                continue
            if not answer:
                yield from self.looked(range)
                yield from machine.down_write(self.lock)
            valid = self._done(parts)
            machine.up_read(lock)
            if answer:
                raise self.refuse(range, answer)
            if valid:
                writable = (pfns & np.uint64(lookup_2017.HMM_PFN_WRITE)) != 0
                range.hmm_pfns[:] = in_6_1(lookup_2017.hmm_pfn_t_to_pfn(pfns), writable)
                return
            machine.up_write(self.lock)

    def _look_parts(
        self, range: HmmRange, pfns: Words, parts: list[tuple[Vma, lookup_2017.HmmRange]]
    ) -> Routine[int]:
        write = bool(range.default_flags & HMM_PFN_REQ_WRITE)
        at = range.start
        while at < range.end:  # over mappings
            vma = vma_lookup(self.machine, self.mm, at)
            if vma is None:
                return -EFAULT
            end, tracked = min(range.end, vma.end), lookup_2017.HmmRange()
            part = pfns[at - range.start : end - range.start]
            answer = yield from lookup_2017.hmm_vma_fault(
                self.machine, vma, tracked, at, end, part, write, True
            )
            self.note("hmm_vma_fault", answer)
            if answer:
                return answer
            parts.append((vma, tracked))
            at = end
        return 0

    def _done(self, parts: list[tuple[Vma, lookup_2017.HmmRange]]) -> bool:
        valid = [lookup_2017.hmm_vma_range_done(self.machine, *part) for part in parts]
        for answer in valid:
            self.note("hmm_vma_range_done", answer)
        return all(valid)


class Driver52(_MirrorDriver):
    """5.2: register, wait, fault; under the driver's lock, ask whether the range is valid."""

    era = Era.V5_2

    def fault(self, range: HmmRange2018) -> Routine[int]:
        """Fault as this kernel has it: with ``block``."""
        return (yield from range_2019.hmm_range_fault(self.machine, range, True))

    def look(self, range: HmmRange) -> Routine[None]:
        """Look until the range is valid; the mmap_lock is held all the while."""
        machine, lock = self.machine, mm_lock(self.machine, self.mm)
        asked = HmmRange2018(pfns=np.zeros(range.end - range.start, np.uint64))
        asked.default_flags = asked.flags[0]
        if range.default_flags & HMM_PFN_REQ_WRITE:
            asked.default_flags |= asked.flags[1]
        answer = yield from range_2019.hmm_range_register(
            machine, asked, self.mm, range.start, range.end, era=self.era
        )
        self.note("hmm_range_register", answer)
        if answer:
            raise self.refuse(range, answer)
        try:
            yield from machine.down_read(lock)
            while True:
                valid = yield from range_2019.hmm_range_wait_until_valid(machine, asked)
                self.note("hmm_range_wait_until_valid", valid)
                answer = yield from self.fault(asked)
                self.note("hmm_range_fault", answer)
                if answer == -EAGAIN:  # the lock is gone
                    yield from machine.down_read(lock)
                    continue
                if answer == -EBUSY:
                    continue
                if answer < 0:
                    machine.up_read(lock)
                    raise self.refuse(range, answer)
                yield from self.looked(range)
                yield from machine.down_write(self.lock)
                valid = range_2019.hmm_range_valid(machine, asked)
                self.note("hmm_range_valid", valid)
                if valid:
                    break
                machine.up_write(self.lock)
            machine.up_read(lock)
        finally:
            range_2019.hmm_range_unregister(machine, asked)
            self.note("hmm_range_unregister")
        writable = (asked.pfns & asked.write_bit) != 0
        range.hmm_pfns[:] = in_6_1(asked.device_entry_to_pfn(asked.pfns), writable)


class Driver54(Driver52):
    """5.4: the same with flags, and the callback gets the notifier's range."""

    era = Era.V5_4

    def fault(self, range: HmmRange2018) -> Routine[int]:
        """Fault as this kernel has it: without HMM_FAULT_ALLOW_RETRY, so the lock stays held."""
        return (yield from range_2019.hmm_range_fault(self.machine, range, 0))
