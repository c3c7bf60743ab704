"""Exercises on keeping a mirror true (notebook 01): when to look again, and what to forget."""

from __future__ import annotations

from typing import Any

import numpy as np

from hmmlab.exercises.races import LockWatch, Subscriber, interrupt
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.invariants.promise import device_letters, first_break
from hmmlab.model.driver import Driver
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
    mmu_interval_notifier_insert,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
)
from hmmlab.model.region import Pages

__all__ = ["Invalidate", "MustRetry"]


class MustRetry(Exercise):
    """Write `must_retry`, which says whether a look-up must throw its answer away.

    A driver has subscribed to `interval`, a pair (first, stop) of page numbers. `history` lists in
    order what has happened until it holds its lock and is about to map: `("start", first, stop)`
    and `("end", first, stop)` of changes, and once `("begin", first, stop)`, when
    `mmu_interval_read_begin` let a look-up of these pages go. All ranges are half-open.
    """

    answer = "must_retry"
    starter = "def must_retry(history, interval):\n    ..."
    model_answer = """
        def must_retry(history, interval):
            begun = False
            for what, first, stop in history:
                if what == "begin":
                    begun = True
                elif what == "start" and begun and first < interval[1] and stop > interval[0]:
                    return True
            return False
    """
    hints = (
        "The number is compared, and nothing else. When does the driver note a new one?",
        "In its callback, which runs at a start. Ends do not matter, nor does what was over when "
        "the look-up began.",
        "The callback runs for every change that overlaps the *interval*, whichever pages were "
        "looked up. `(2, 4)` and `(4, 6)` do not overlap.",
    )
    rounds = 10

    def history(self, trial: Trial) -> tuple[list[tuple[str, int, int]], tuple[int, int]]:
        """Draw what happens to 16 pages, of which some are subscribed to and some looked up."""
        rng = trial.rng
        first = int(rng.integers(3, 5))
        stop = first + 8
        looked = (first + 3, first + 5)
        near = [looked, (first, first + 2), (stop - 2, stop + 1)]
        far = [(first - 2, first), (stop, stop + 2), (first - 3, first - 1)]
        before = [_draw(rng, near), _draw(rng, far)]
        after = [_draw(rng, far)]
        if trial.round % 2:  # something hits after the beginning; not always what is looked up
            after.append(near[trial.round // 2 % len(near)])
        events = [(what, *change) for change in before for what in ("start", "end")]
        if rng.integers(2):  # one of the far changes runs on
            events.remove(("end", *before[1]))
        events.append(("begin", *looked))
        events += [(what, *change) for change in after for what in ("start", "end")]
        if rng.integers(2):  # and the last is not over when the driver has its lock
            events.pop()
        return events, (first, stop)

    def rule(self, must_retry: Any, trial: Trial) -> None:
        """The answer is that of `mmu_interval_read_retry` after the same history in the model."""
        machine, process = trial.machine, trial.process
        pages = process.mmap(16)
        process.store(pages, 7)
        history, interval = self.history(trial)
        first, stop = (pages.start + page for page in interval)
        subscription = process.run(
            f"subscribe to pages {interval}",
            mmu_interval_notifier_insert(machine, process.mm, first, stop, Subscriber(machine)),
        )
        seq, shown = 0, 0
        for what, *where in history:
            if what == "begin":
                seq = process.run(what, mmu_interval_read_begin(machine, subscription))
                shown = len(trial.trace)
                continue
            start, end = (pages.start + page for page in where)
            change = MmuNotifierRange.one(process.mm, Event.CLEAR, start, end)
            tell = invalidate_range_start if what == "start" else invalidate_range_end
            process.run(f"{what} of pages {tuple(where)}", tell(machine, change))
            if seq and what == "start" and machine["interval.seq"][subscription] != seq:
                shown = len(trial.trace)
        truth = mmu_interval_read_retry(machine, subscription, seq)
        said = must_retry(list(history), interval)
        if bool(said) != truth:
            how = "the number has changed" if truth else "the number is still the same"
            what = f"{said} for interval {interval} and {history}, but {how}."
            raise trial.wrong(what, shown)


def _draw(rng: np.random.Generator, ranges: list[tuple[int, int]]) -> tuple[int, int]:
    return ranges[int(rng.integers(len(ranges)))]


# --- the callback ---------------------------------------------------------------------------------


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
