"""Exercises on looking pages up (notebook 03)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hmmlab.exercises.races import interrupt, locked_out
from hmmlab.exercises.rules import Exercise, Trial, Wrong
from hmmlab.exercises.snapshots import look_up
from hmmlab.exercises.turns import discard_and_read
from hmmlab.invariants.promise import broken_promise, first_break
from hmmlab.model.driver import Driver
from hmmlab.model.entry import HMM_PFN_VALID, HMM_PFN_WRITE
from hmmlab.model.machine import KernelError
from hmmlab.model.mm_types import mm_lock
from hmmlab.model.race import Race
from hmmlab.model.region import Pages

__all__ = ["FaultLoop", "RequestFlags"]

_IMPORTS = """
from hmmlab import Driver, KernelError
from hmmlab.model.hmm import hmm_range_fault
from hmmlab.model.mm_types import mm_lock
from hmmlab.model.mmu_notifier import mmu_interval_read_begin, mmu_interval_read_retry
"""


class FaultLoop(Exercise):
    """Write `look`, the loop that asks until the answer holds.

    It begins with `mmu_interval_read_begin(machine, range.notifier)`, calls `hmm_range_fault` with
    the mmap_lock (`mm_lock(machine, range.mm)`) held for reading, and returns with `self.lock` held
    for writing and an answer in `range` that nothing has overtaken. Every call that may wait is
    made with `yield from`. `KernelError.errno` 16 is `-EBUSY`.
    """

    answer = "Mine"
    starter = (
        _IMPORTS
        + """

class Mine(Driver):
    def look(self, range):
        ...
"""
    )
    model_answer = (
        _IMPORTS
        + """

class Mine(Driver):
    def look(self, range):
        machine = self.machine
        mmap_lock = mm_lock(machine, range.mm)
        while True:
            range.notifier_seq = yield from mmu_interval_read_begin(machine, range.notifier)
            yield from machine.down_read(mmap_lock)
            try:
                yield from hmm_range_fault(machine, range)
            except KernelError as error:
                if error.errno != 16:
                    raise
                continue
            finally:
                machine.up_read(mmap_lock)
            yield from machine.down_write(self.lock)
            if not mmu_interval_read_retry(machine, range.notifier, range.notifier_seq):
                return
            machine.up_write(self.lock)
"""
    )
    hints = (
        "Begin, look, take your lock, ask whether it still holds. If not, from the beginning.",
        "That is a new `mmu_interval_read_begin`, each time; and `-EBUSY` sends you there too.",
        "Ask `mmu_interval_read_retry` with `self.lock` held, and give the lock up before you go "
        "round. The mmap_lock is given up before either.",
    )
    rounds = 8

    def rule(self, answer: Any, trial: Trial) -> None:
        """Whenever a discard comes between, the device reads what is there afterwards."""
        process = trial.process
        before = [100, 101, 102, 103]
        pages = process.mmap(len(before))
        process.store(pages, before)
        device = trial.attach(answer)

        def discard() -> None:
            trial.finish(process.steps.madvise(pages[:2], "dontneed"))

        steps = device.steps.read(pages)
        data = self._run(trial, interrupt, steps, 1 + trial.round % 6, discard)
        self._hold(trial, pages, data, before)
        process.store(pages[:2], before[:2])
        device.forget(pages.start, pages.stop)
        steps = device.steps.read(pages)
        data = self._run(trial, locked_out, device, steps, discard)
        self._hold(trial, pages, data, before)
        self._unlocked(trial, "")
        self._refused(trial, device)
        self._unlocked(trial, " after an error")
        if trial.round == self.rounds - 1:
            self._in_every_order(answer)

    @staticmethod
    def _unlocked(trial: Trial, when: str) -> None:
        if any(trial.machine.holders(mm_lock(trial.machine, trial.process.mm))):
            raise trial.wrong(f"The mmap_lock is still held{when}.")

    @staticmethod
    def _refused(trial: Trial, device: Driver) -> None:
        """Where nothing may be read, the refusal is handed on."""
        try:
            trial.finish(device.steps.read(trial.process.mmap(1, "none")))
        except KernelError as error:
            if error.errno == 14:
                return
            raise trial.wrong(f"Nothing may be read there: EFAULT, and not {error}.") from None
        except Wrong as wrong:
            why = "Nothing may be read there, and that is no reason to ask again."
            raise trial.wrong(f"{why} {wrong.reason}") from None
        raise trial.wrong("Nothing may be read there, and nobody was told.")

    @staticmethod
    def _in_every_order(driver: type[Driver]) -> None:
        """No order of turns against a discard leaves a stale entry, gets stuck or never ends."""
        race = Race(discard_and_read(driver))
        found = race.every_order(broken_promise)
        if found.first is not None:
            run = race.run(found.first)
            assert run.trace is not None
            why = f"In the order of turns {found.first!r}: {found.why}"
            raise Wrong(why, run.trace, len(run.trace))

    @staticmethod
    def _run(trial: Trial, race: Callable[..., Any], *args: Any) -> Any:
        try:
            return race(trial, *args)
        except KernelError as error:
            raise trial.wrong(f"It gave up with {error}. Who was overtaken asks again.") from None

    @staticmethod
    def _hold(trial: Trial, pages: Pages, data: Any, before: list[int]) -> None:
        broken = first_break(trial.trace, pages)
        if broken:
            raise trial.wrong(f"It mapped an answer that was overtaken. {broken[1]}", broken[0])
        after = [0, 0, *before[2:]]
        if data.tolist() not in (before, after):
            raise trial.wrong(f"The device reads {data.tolist()}, neither {before} nor {after}.")


class RequestFlags(Exercise):
    """Write `request`: what to ask of `hmm_range_fault` for some pages.

    `writes` is a bool array: which pages the device will write; the others it will read, and some
    of those are read-only. Return `default_flags`, `pfn_flags_mask`, and one word a page for
    `hmm_pfns`. All pages must come back valid, those in `writes` writable.
    """

    answer = "request"
    starter = """
import numpy as np
from hmmlab.model.entry import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE


def request(writes):
    ...
"""
    model_answer = """
        import numpy as np
        from hmmlab.model.entry import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE


        def request(writes):
            words = np.where(writes, np.uint64(HMM_PFN_REQ_WRITE), np.uint64(0))
            return HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, words
    """
    hints = (
        "A page's request is `(hmm_pfns & pfn_flags_mask) | default_flags`.",
        "All pages want `HMM_PFN_REQ_FAULT`: that is a default. Who wants more?",
        "What stands in `hmm_pfns` counts only where `pfn_flags_mask` lets it through.",
    )

    def rule(self, answer: Any, trial: Trial) -> None:
        """Ask, and look at the answer."""
        process, rng = trial.process, trial.rng
        pages = process.mmap(8)
        process.store(pages, 7)
        first = int(rng.integers(0, 6))
        process.mprotect(pages[first : first + 2], "r")
        writes = rng.integers(0, 2, 8).astype(bool)
        writes[first : first + 2] = False
        writes[(first + 2) % 8] = True
        process.madvise(pages[(first + 2) % 8], "dontneed")
        device = process.attach(Driver)
        default_flags, mask, words = answer(writes)
        try:
            found = look_up(
                device, pages, words, default_flags=int(default_flags), pfn_flags_mask=int(mask)
            )
        except KernelError as error:
            raise trial.wrong(f"{error}, and the device only wants to read there.") from None
        valid = (found & np.uint64(HMM_PFN_VALID)) != 0
        writable = (found & np.uint64(HMM_PFN_WRITE)) != 0
        for page in np.flatnonzero(~valid).tolist():
            raise trial.wrong(f"Page {page} came back without a frame: nobody asked for it.")
        for page in np.flatnonzero(writes & ~writable).tolist():
            raise trial.wrong(f"Page {page} came back read-only, and the device will write it.")
