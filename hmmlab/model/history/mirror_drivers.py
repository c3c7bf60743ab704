"""Small drivers of the eras of hmm_mirror: April 2017 to 5.4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hmmlab.model.driver import Driver
from hmmlab.model.entry import HMM_PFN_REQ_WRITE, Words
from hmmlab.model.history import lookup_2017, lookup_2018, range_2019
from hmmlab.model.history.drivers import EraDriver, in_6_1
from hmmlab.model.history.era import EAGAIN, EBUSY, EFAULT, Era
from hmmlab.model.history.mirror_2017 import hmm_mirror_register, hmm_mirror_unregister
from hmmlab.model.history.struct_hmm import HmmMirror, hmm_of
from hmmlab.model.history.walk_2018 import HmmRange as HmmRange2018
from hmmlab.model.hmm import HmmRange, hmm_range_fault
from hmmlab.model.machine import KernelError, Routine, kernel
from hmmlab.model.mm_types import Vma, mm_lock, vma_lookup
from hmmlab.model.mmu_notifier import MmuNotifierRange

__all__ = [
    "Driver52",
    "Driver53",
    "Driver54",
    "Driver414",
    "Driver417",
    "Driver420",
    "Driver2017",
    "in_2018",
]


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
        """Changes so far, which 4.20 counts no more; since 5.2 changes that run."""
        which = "sequence" if self.era < Era.V5_2 else "notifiers"
        value = self.machine[f"hmm.{which}"][hmm_of(self.machine, self.mm)]
        return f"hmm->{which} = {value}"

    def invalidate(self, subscription: int, range: MmuNotifierRange, cur_seq: int) -> bool:
        """What 6.1 tells: not listened to."""
        return True

    def refuse(self, range: HmmRange, answer: int) -> KernelError:
        """The error of an operation whose lookup was refused."""
        place = self.machine.names.place(range.mm, range.start, range.end)
        return KernelError(-answer, f"{place}: the lookup was refused")


def in_2018(range: HmmRange) -> HmmRange2018:
    """A request of 6.1 in a driver's own encoding, as default flags."""
    asked = HmmRange2018(range.start, range.end, np.zeros(range.end - range.start, np.uint64))
    asked.default_flags = asked.flags[0]
    if range.default_flags & HMM_PFN_REQ_WRITE:
        asked.default_flags |= asked.flags[1]
    return asked


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
            answers = range.hmm_pfns.copy()
            parts: list[Callable[[], bool]] = []
            answer = yield from self._look_parts(range, parts)
            if answer == -EBUSY:  # a fault has given the lock up
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
                return
            range.hmm_pfns[:] = answers
            machine.up_write(self.lock)

    def _look_parts(self, range: HmmRange, parts: list[Callable[[], bool]]) -> Routine[int]:
        at = range.start
        while at < range.end:  # over mappings
            vma = vma_lookup(self.machine, self.mm, at)
            if vma is None:
                return -EFAULT
            end = min(range.end, vma.end)
            words = range.hmm_pfns[at - range.start : end - range.start]
            answer, done = yield from self.look_up(vma, at, end, range, words)
            self.note("hmm_vma_fault", answer)
            if answer:
                return answer
            parts.append(done)
            at = end
        return 0

    def look_up(
        self, vma: Vma, start: int, end: int, range: HmmRange, words: Words
    ) -> Routine[tuple[int, Callable[[], bool]]]:
        """Look a part of one mapping up; returns the answer, and what ends the tracking of it."""
        machine, tracked = self.machine, lookup_2017.HmmRange()
        pfns = np.zeros(end - start, np.uint64)
        write = bool(range.default_flags & HMM_PFN_REQ_WRITE)
        answer = yield from lookup_2017.hmm_vma_fault(
            machine, vma, tracked, start, end, pfns, write, True
        )

        def done() -> bool:
            writable = (pfns & np.uint64(lookup_2017.HMM_PFN_WRITE)) != 0
            words[:] = in_6_1(lookup_2017.hmm_pfn_t_to_pfn(pfns), writable)
            return lookup_2017.hmm_vma_range_done(machine, vma, tracked)

        return answer, done

    def _done(self, parts: list[Callable[[], bool]]) -> bool:
        valid = [done() for done in parts]
        for answer in valid:
            self.note("hmm_vma_range_done", answer)
        return all(valid)


class Driver417(Driver414):
    """4.17: the same with a range for argument, and the driver's encoding."""

    era = Era.V4_17

    def look_up(
        self, vma: Vma, start: int, end: int, range: HmmRange, words: Words
    ) -> Routine[tuple[int, Callable[[], bool]]]:
        """Each page says itself what it wants."""
        machine, tracked = self.machine, in_2018(range)
        tracked.start, tracked.end, tracked.vma = start, end, vma
        tracked.pfns = np.full(end - start, tracked.default_flags, np.uint64)
        answer = yield from lookup_2018.hmm_vma_fault(machine, tracked, True, self.era)

        def done() -> bool:
            words[:] = _answered(tracked)
            return lookup_2018.hmm_vma_range_done(machine, tracked)

        return answer, done


class Driver420(Driver417):
    """4.20: the same lookup; the callback comes before the change, with a ``struct hmm_update``."""

    era = Era.V4_20


def _answered(range: HmmRange2018) -> Words:
    return in_6_1(range.device_entry_to_pfn(range.pfns), (range.pfns & range.write_bit) != 0)


class Driver52(_MirrorDriver):
    """5.2: register, wait, fault; under the driver's lock, ask whether the range is valid."""

    era = Era.V5_2

    def fault(self, range: HmmRange2018) -> Routine[int]:
        """Fault as this kernel has it: with ``block``."""
        return (yield from range_2019.hmm_range_fault(self.machine, range, True))

    def register(self, range: HmmRange2018) -> Routine[int]:
        """Register as this kernel has it: with the address space."""
        return (
            yield from range_2019.hmm_range_register(
                self.machine, range, self.mm, range.start, range.end
            )
        )

    def look(self, range: HmmRange) -> Routine[None]:
        """Look until the range is valid; wait for that without the mmap_lock."""
        machine, lock = self.machine, mm_lock(self.machine, self.mm)
        asked = in_2018(range)
        answer = yield from self.register(asked)
        self.note("hmm_range_register", answer)
        if answer:
            raise self.refuse(range, answer)
        try:
            yield from self._wait(asked)
            while True:
                yield from machine.down_read(lock)
                answer = yield from self.fault(asked)
                self.note("hmm_range_fault", answer)
                if answer < 0:
                    if answer != -EAGAIN:  # else the lock is gone
                        machine.up_read(lock)
                    if answer not in (-EAGAIN, -EBUSY):
                        raise self.refuse(range, answer)
                    yield from self._wait(asked)
                    continue
                yield from self.looked(range)
                yield from machine.down_write(self.lock)
                valid = range_2019.hmm_range_valid(machine, asked)
                self.note("hmm_range_valid", valid)
                machine.up_read(lock)
                if valid:
                    break
                machine.up_write(self.lock)
        finally:
            range_2019.hmm_range_unregister(machine, asked)
            self.note("hmm_range_unregister")
        range.hmm_pfns[:] = _answered(asked)

    def _wait(self, asked: HmmRange2018) -> Routine[None]:
        valid = yield from range_2019.hmm_range_wait_until_valid(self.machine, asked)
        self.note("hmm_range_wait_until_valid", valid)


class Driver53(Driver52):
    """5.3: the same with the mirror for argument, and -EBUSY for a range that is not valid."""

    era = Era.V5_3

    def register(self, range: HmmRange2018) -> Routine[int]:
        """Register as this kernel has it: with the mirror."""
        return (
            yield from range_2019.hmm_range_register(
                self.machine, range, self.mirror, range.start, range.end
            )
        )


class Driver54(Driver52):
    """5.4: the same with flags, and the callback gets the notifier's range."""

    era = Era.V5_4

    def register(self, range: HmmRange2018) -> Routine[int]:
        """Register as this kernel has it: the range says itself where it is."""
        return (yield from range_2019.hmm_range_register(self.machine, range, self.mirror))

    def fault(self, range: HmmRange2018) -> Routine[int]:
        """Fault as this kernel has it: without HMM_FAULT_ALLOW_RETRY, so the lock stays held."""
        return (yield from range_2019.hmm_range_fault(self.machine, range, 0))
