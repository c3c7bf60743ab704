"""Exercises on keeping a mirror true (notebook 01)."""

from __future__ import annotations

from typing import Any

from hmmlab.exercises.promise import device_letters, first_break
from hmmlab.exercises.races import LockWatch, interrupt
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.model.driver import Driver
from hmmlab.model.region import Pages

__all__ = ["Invalidate"]


class Invalidate(Exercise):
    """Write the callback `invalidate` of a driver.

    `range.start[0]` and `range.end[0]` are the pages that are about to change, half-open.
    `self.forget(start, stop)` empties entries; `self.lock` guards them. Forget what must be
    forgotten, no more, and leave behind what a look-up that is under way needs to know.
    """

    answer = "Mine"
    starter = """
from hmmlab import Driver
from hmmlab.model.mmu_notifier import mmu_interval_set_seq


class Mine(Driver):
    def invalidate(self, subscription, range, cur_seq):
        ...
"""
    model_answer = """
        from hmmlab import Driver
        from hmmlab.model.mmu_notifier import mmu_interval_set_seq


        class Mine(Driver):
            def invalidate(self, subscription, range, cur_seq):
                yield from self.machine.down_write(self.lock)
                mmu_interval_set_seq(self.machine, subscription, cur_seq)
                self.forget(int(range.start[0]), int(range.end[0]))
                self.machine.up_write(self.lock)
                return True
    """
    hints = (
        "Three things: the entries, the number, the lock. And it answers True.",
        "A look-up that began before must find another number: "
        "`mmu_interval_set_seq(self.machine, subscription, cur_seq)`.",
        "Both happen between `yield from self.machine.down_write(self.lock)` and "
        "`self.machine.up_write(self.lock)`, so the callback is a generator.",
    )
    rounds = 8

    def rule(self, answer: Any, trial: Trial) -> None:
        """After any change nothing is stale, nothing else is lost, and no look-up is misled."""
        process, rng = trial.process, trial.rng
        pages = process.mmap(8)
        process.store(pages, range(100, 108))
        device = trial.attach(answer)
        device.read(pages)
        watch = LockWatch(trial, device, "interval.seq")
        first = int(rng.integers(1, 4))
        some = pages[first : first + int(rng.integers(2, 4))]
        if rng.integers(2):
            trial.finish(process.steps.mprotect(some, "r"))
        else:
            trial.finish(process.steps.madvise(some, "dontneed"))
        self._check_table(trial, pages, some)
        if watch.unlocked:
            raise trial.wrong("The number is noted while nobody holds the lock.", watch.unlocked[0])
        if any(trial.machine.holders(device.lock)):
            raise trial.wrong("The driver's lock is still held.")
        self._check_look_up(trial, device)

    @staticmethod
    def _check_table(trial: Trial, pages: Pages, changed: Pages) -> None:
        broken = first_break(trial.trace, pages)
        if broken:
            raise trial.wrong(broken[1], broken[0])
        letters = device_letters(trial.machine, pages)
        first, last = changed.start - pages.start, changed.stop - pages.start - 1
        for page, letter in enumerate(letters):
            if letter == "." and not first <= page <= last:
                what = f"Page {page} was forgotten, and only pages {first} to {last} changed."
                raise trial.wrong(f"{what} That is safe, but costs a fault.")

    @staticmethod
    def _check_look_up(trial: Trial, device: Driver) -> None:
        """A change in the middle of a look-up, wherever that may be."""
        process = trial.process
        fresh = process.mmap(2)
        process.store(fresh, 7)
        since = len(trial.trace)
        interrupt(
            trial,
            device.steps.read(fresh),
            1 + trial.round % 4,
            lambda: trial.finish(process.steps.madvise(fresh, "dontneed")),
        )
        broken = first_break(trial.trace, fresh, since=since)
        if broken:
            why = "A look-up that was under way did not notice the change. "
            raise trial.wrong(why + broken[1], broken[0])
